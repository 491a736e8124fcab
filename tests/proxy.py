"""Stands between client and server, understands the messages they exchange, and does harm at one of them."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Harm(Enum):
    """What happens at a message."""

    CUT = "both sides are cut off before it"
    CUT_INSIDE = "half of it is delivered, then both sides are cut off"
    CUT_BEHIND = "it is delivered, then both sides are cut off"
    STALL = "it is swallowed, and from then on there is silence, with both sockets open"
    STALL_BEHIND = "it is delivered, and then there is silence"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the protocol; *query* is what a Parse, Bind or Query is about, *tag* a command's completion."""

    to_server: bool
    kind: str  # its letter; empty for the one that opens the connection
    body: bytes
    query: str = ""

    @property
    def tag(self) -> str:
        return self.body[:-1].decode() if self.kind == "C" and not self.to_server else ""


Plan = Callable[[Message], Harm | None]


class Once:
    """Harm at the first message that *is_it* knows; `fired` is set then. Everything else passes."""

    def __init__(self, is_it: Callable[[Message], bool], harm: Harm) -> None:
        self.fired = threading.Event()
        self._is_it = is_it
        self._harm = harm

    def __call__(self, message: Message) -> Harm | None:
        if self.fired.is_set() or not self._is_it(message):
            return None
        self.fired.set()
        return self._harm


def at_nth(number: int, to_server: bool, harm: Harm) -> Once:
    """At the message with this number of one direction, from 1, the opening of the connection aside."""
    left = [number]

    def is_it(message: Message) -> bool:
        if message.to_server is not to_server or not message.kind:
            return False
        left[0] -= 1
        return left[0] == 0

    return Once(is_it, harm)


def is_commit(message: Message) -> bool:
    """The first message on the way to a COMMIT."""
    return message.to_server and message.query == "COMMIT"


def is_committed(message: Message) -> bool:
    return message.tag == "COMMIT"


def behind_commit() -> Callable[[Message], bool]:
    """The synchronisation point behind a COMMIT, or a plain query: the server has all it needs to carry it out."""
    seen = threading.Event()

    def is_it(message: Message) -> bool:
        if is_commit(message):
            seen.set()
        return seen.is_set() and message.to_server and message.kind in ("S", "Q")

    return is_it


def mentions(word: str) -> Callable[[Message], bool]:
    """A message to the server whose query contains *word*."""
    return lambda message: message.to_server and word in message.query


class Proxy:
    """Use it in a `with`; clients connect to `conninfo`. `plan` may be exchanged at any time; None carries everything.

    `refuses` makes it hang up on whoever connects, `is_deaf` accept and never answer.
    """

    def __init__(self, database: str, plan: Plan | None = None) -> None:
        target = conninfo_to_dict(database)
        self.target = (str(target.get("host", "127.0.0.1")), int(target.get("port") or 5432))
        self.plan = plan
        self.refuses = False
        self.is_deaf = False
        self.connections = 0
        self._is_over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = self._listener.getsockname()[1]
        self.conninfo = make_conninfo(database, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        self._threads = [threading.Thread(target=self._serve)]

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._is_over.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client, _ = self._listener.accept()
            self.connections += 1
            thread = threading.Thread(target=self._run, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _run(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.is_deaf:
                self._keep_silent()
            elif not self.refuses:
                with self._connect() as server:
                    Carrier(client, server, lambda message: self.plan(message) if self.plan else None, self).run()

    def _keep_silent(self) -> None:
        self._is_over.wait()

    def _connect(self) -> socket.socket:
        host, port = self.target
        if host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{port}")
            return server
        return socket.create_connection(self.target, timeout=10)


@dataclass(slots=True)
class Stream:
    """The messages out of one direction's bytes."""

    to_server: bool
    is_open: bool = True  # the first message to the server has no letter
    data: bytes = b""
    statements: dict[bytes, str] = field(default_factory=dict)

    def messages(self, data: bytes) -> Iterator[tuple[bytes, Message]]:
        self.data += data
        while True:
            start = 0 if self.to_server and self.is_open else 1
            if len(self.data) < start + 4:
                return
            end = start + struct.unpack("!I", self.data[start : start + 4])[0]
            if len(self.data) < end:
                return
            raw, self.data = self.data[:end], self.data[end:]
            self.is_open = False
            kind = raw[:start].decode()
            yield raw, Message(self.to_server, kind, raw[start + 4 :], self._query(kind, raw[start + 4 :]))

    def _query(self, kind: str, body: bytes) -> str:
        if not self.to_server:
            return ""
        first, _, rest = body.partition(b"\0")
        second = rest.partition(b"\0")[0]
        if kind == "P":
            self.statements[first] = second.decode(errors="replace")
            return self.statements[first]
        if kind == "B":
            return self.statements.get(second, "")
        return first.decode(errors="replace") if kind == "Q" else ""


class Carrier:
    """One connection."""

    def __init__(self, client: socket.socket, server: socket.socket, plan: Plan, proxy: Proxy) -> None:
        self._client = client
        self._server = server
        self._plan = plan
        self._proxy = proxy

    def run(self) -> None:
        other = {self._client: self._server, self._server: self._client}
        streams = {self._client: Stream(True), self._server: Stream(False)}
        while not self._proxy._is_over.is_set():
            for source in select.select(list(other), [], [], 0.05)[0]:
                data = source.recv(65536)
                if not data or self._carry(streams[source], data, other[source]):
                    return

    def _carry(self, stream: Stream, data: bytes, to: socket.socket) -> bool:
        """Whether the connection is over."""
        passed = b""
        for raw, message in stream.messages(data):
            harm = self._plan(message)
            if harm is None:
                passed += raw
                continue
            if harm is Harm.CUT_INSIDE:
                passed += raw[: len(raw) // 2]
            elif harm in (Harm.CUT_BEHIND, Harm.STALL_BEHIND):
                passed += raw
            to.sendall(passed)
            if harm in (Harm.STALL, Harm.STALL_BEHIND):
                self._proxy._keep_silent()
            # Only the client gets a reset: the server is to read what was delivered.
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return True
        to.sendall(passed)
        return False
