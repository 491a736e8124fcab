"""Connections of our own: made per process, lent to one batch at a time."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from microbatch.protocols import Batch

from .conninfo import connection_parameters
from .flight import Prepared
from .log import tell
from .session import Session, before

_PATIENCE = 5.0  # seconds for an answer where no batch sets a deadline


class OwnConnections:
    """As many connections as there are batches in flight at once, kept for the next ones."""

    def __init__(self, conninfo: str) -> None:
        self._parameters = connection_parameters(conninfo)
        # By process id. Inherited ones stay here untouched: closing one would end the parent's session,
        # using one would mix the answers of two processes.
        self._stocks: dict[int, _Stock] = {}

    def __str__(self) -> str:
        return "own connections"

    @contextmanager
    def lend(self, batch: Batch[Any], *, fresh: bool = False) -> Iterator[Session]:
        """A connection for *batch* alone; made if none is idle, closed afterwards if it is not clean.

        A *fresh* one is made in the place of an idle one.
        """
        stock = self._stock()
        link = stock.take()
        if fresh and link is not None:
            link.close()
            link = None
        link = link or self._connect(before(batch.deadline))
        stock.lend(batch.id, link)
        try:
            link.session.give_up = before(batch.deadline)
            yield link.session
        finally:
            if not stock.take_back(batch.id, link):
                self._discard(batch, link)

    @contextmanager
    def visit(self) -> Iterator[Session | None]:
        """A connection to look at, made if none is idle."""
        stock = self._stock()
        link = stock.take() or self._connect(_soon())
        try:
            link.session.give_up = _soon()
            yield link.session
        finally:
            if link.is_clean():
                stock.add(link)
            else:
                link.close()

    def close(self, leave: Callable[[Session], None]) -> None:
        """Close the idle connections of this process; *leave* gets one of them to say goodbye."""
        stock = self._stock()
        has_left = False
        while link := stock.take():
            try:
                if not has_left:
                    has_left = True
                    link.session.give_up = _soon()
                    leave(link.session)
            finally:
                link.close()

    def abandon(self, batch: Batch[Any]) -> None:
        """Cut the connection that *batch* is using, if it still does."""
        self._stock().cut(batch.id)

    def _stock(self) -> _Stock:
        # One step under the interpreter's lock: two threads that come first in a child get the same stock.
        return self._stocks.setdefault(os.getpid(), _Stock())

    def _connect(self, give_up: float | None) -> Link:
        error = None
        try:
            connection = psycopg.connect(autocommit=True, **self._parameters)
        except psycopg.Error as failure:
            error = failure
        if error is not None:
            # The same error anew: psycopg's own carries every connection parameter, the password too.
            raise type(error)(*error.args)
        try:
            return Link(connection, give_up)
        except BaseException:
            connection.close()
            raise

    def _discard(self, batch: Batch[Any], link: Link) -> None:
        defect = link.defect()
        link.close()
        tell(logging.WARNING, "batch %s lost its connection (%s); the next one connects", batch.id, defect)


class Link:
    """A connection with a second handle on its socket."""

    def __init__(self, connection: psycopg.Connection[Any], give_up: float | None) -> None:
        self.connection = connection
        self.session = Session(connection, prepared=Prepared(), give_up=give_up)
        self.was_cut = False
        # A descriptor of our own, because libpq closes its own when the link breaks, and by the time another
        # thread has read its number it may stand for a stranger's file.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def is_clean(self) -> bool:
        """Whether the next batch may begin on it; False if a transaction is left open or the link is gone."""
        return self.session.is_clean()

    def cut(self) -> None:
        """Shut the socket down under whoever waits on it."""
        self.was_cut = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was faster
            pass

    def defect(self) -> str:
        if self.was_cut:
            return "cut at its deadline"
        if self.session.is_retired:
            return "the server takes no writes"
        return "link lost" if self.connection.closed else "transaction left open"

    def close(self) -> None:
        self.connection.close()
        self._socket.close()


class _Stock:
    """The connections of one process."""

    def __init__(self) -> None:
        # Guards both containers, and that a link is cut only while the batch it is cut for holds it.
        self._lock = threading.RLock()
        self._idle: list[Link] = []
        self._lent: dict[str, Link] = {}

    def take(self) -> Link | None:
        # The latest one first: those that a quiet time leaves over stay at the bottom.
        with self._lock:
            return self._idle.pop() if self._idle else None

    def add(self, link: Link) -> None:
        with self._lock:
            self._idle.append(link)

    def lend(self, batch_id: str, link: Link) -> None:
        with self._lock:
            self._lent[batch_id] = link

    def take_back(self, batch_id: str, link: Link) -> bool:
        """Whether the link goes back among the idle; otherwise the caller closes it."""
        clean = link.is_clean()
        with self._lock:
            self._lent.pop(batch_id, None)
            if clean and not link.was_cut:
                self._idle.append(link)
                return True
            return False

    def cut(self, batch_id: str) -> None:
        # Under the lock, for it does not block, and a moment later the link may be another batch's.
        with self._lock:
            link = self._lent.get(batch_id)
            if link is not None:
                link.cut()


def _soon() -> float:
    return time.monotonic() + _PATIENCE
