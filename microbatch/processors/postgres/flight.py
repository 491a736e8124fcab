"""Commands that go out together and are answered in order: libpq's pipeline, with a stop rule of our own.

psycopg's pipeline loses the connection, and the error, when an implicit commit fails; here the answers are read
until as many synchronisation points came back as were sent. Only documented calls of libpq are used, and the
socket is waited on with `poll`: libpq's own blocking wait holds the interpreter's lock.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from typing import TypeAlias

import psycopg
from psycopg import pq
from psycopg.abc import Buffer
from psycopg.pq import DiagnosticField, ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from .conversions import encoding_of
from .errors import ServerSilent

Parameters: TypeAlias = Sequence[Buffer | None]

_PARSE, _COMMAND, _SYNC = range(3)
_KEPT = 100  # prepared statements of one connection; what comes later is parsed every time
_NEVER_POLLED = 60_000  # milliseconds; without a deadline the wait is merely renewed
_COPY = (ExecStatus.COPY_IN, ExecStatus.COPY_OUT, ExecStatus.COPY_BOTH)


class Prepared:
    """The statements that one connection keeps prepared: their names, by text and types of parameters."""

    def __init__(self) -> None:
        self.names: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._count = 0

    def new_name(self) -> bytes:
        self._count += 1
        return b"microbatch_%d" % self._count

    def is_full(self) -> bool:
        return len(self.names) >= _KEPT


class Flight:
    """One pipeline on *connection*: queue commands and synchronisation points, then `land`.

    A command behind a failed one is not run; the next synchronisation point ends that, and without an open
    transaction it also commits. Commands are prepared, and kept among *prepared*; without *keep* only those are
    used that are there already. Not to be shared between threads.

    Raises:
        psycopg.OperationalError: the link is gone, or *give_up* (monotonic) has passed; the connection is closed.
    """

    def __init__(
        self,
        connection: psycopg.Connection[object],
        prepared: Prepared | None = None,
        give_up: float | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self._connection = connection
        self._pgconn: PGconn = connection.pgconn
        self._prepared = prepared
        self._give_up = give_up
        self._keep = keep
        self._sent: list[int] = []
        self._keys: list[tuple[bytes, tuple[int, ...]]] = []
        self._is_flying = False
        self.answered = 0  # commands that were done before the link broke

    def run(
        self,
        command: bytes | str,
        parameters: Parameters | None = None,
        types: tuple[int, ...] = (),
        formats: Sequence[pq.Format] | None = None,
        *,
        once: bool = False,
    ) -> None:
        """Queue one command, in the connection's encoding if it is bytes.

        It is prepared for the next time unless it comes only *once*.
        """
        self._begin()
        if isinstance(command, str):
            command = command.encode(encoding_of(self._connection))
        name = None if once else self._name(command, types)
        values = parameters or None  # psycopg 3.2 takes no empty tuple
        if name is None:
            self._pgconn.send_query_params(command, values, param_types=types or None, param_formats=formats or None)
        else:
            self._pgconn.send_query_prepared(name, values, param_formats=formats or None)
        self._sent.append(_COMMAND)

    def describe(self, command: bytes, types: tuple[int, ...] = ()) -> None:
        """Queue the question for its parameters and columns: two answers, of which the second one tells."""
        self._begin()
        self._pgconn.send_prepare(b"", command, param_types=types or None)
        self._pgconn.send_describe_prepared(b"")
        self._sent += (_COMMAND, _COMMAND)

    def describe_prepared(self, command: bytes) -> int:
        """Queue the question what a kept statement takes and returns; 0 commands, and not 1, where it is not kept.

        The answer is an error where it would return something else than when it was prepared. Nothing is run.
        """
        name = None if self._prepared is None else self._prepared.names.get((command, ()))
        if name is None:
            return 0
        self._begin()
        self._pgconn.send_describe_prepared(name)
        self._sent.append(_COMMAND)
        return 1

    def parse(self, command: bytes, types: tuple[int, ...]) -> None:
        """Queue its preparation without a name: it is looked at, its tables are locked, and nothing is run."""
        self._begin()
        self._pgconn.send_prepare(b"", command, param_types=types or None)
        self._sent.append(_COMMAND)

    def prepare(self, command: bytes) -> None:
        """Queue its preparation, if it is to be kept and is not yet; behind a failed command nothing comes of it."""
        self._begin()
        self._name(command, ())

    def push(self) -> None:
        """Send what is queued before more is: libpq holds no more than 2 GB, and a copy of large values is enough."""
        try:
            self._send_all()
        except BaseException:
            self._connection.close()  # as in `land`
            raise

    def sync(self) -> None:
        """Queue a synchronisation point."""
        self._begin()
        self._pgconn.pipeline_sync()
        self._sent.append(_SYNC)

    def extend(self, until: float | None) -> None:
        """Give up then instead (monotonic)."""
        self._give_up = until

    def send(self) -> None:
        """Send everything that is queued; `land` does so, too."""
        try:
            self._send_all()
        except BaseException:
            self._connection.close()
            raise

    def land(self) -> list[list[PGresult]]:
        """Send everything and wait for every answer: per synchronisation point, one per command before it.

        An implicit commit that fails is one answer more.
        """
        try:
            answers = self._answers()
            self._pgconn.exit_pipeline_mode()
            self._is_flying = False
            return self._sorted(answers)
        except BaseException:
            # Half a flight is still on its way: whoever used the link next would read our answers.
            self._connection.close()
            raise

    def _begin(self) -> None:
        if not self._is_flying:
            self._is_flying = True
            self._pgconn.enter_pipeline_mode()
            self._pgconn.nonblocking = 1

    def _name(self, command: bytes, types: tuple[int, ...]) -> bytes | None:
        """The name under which the command is prepared, from now on if it was not; None if it is not kept."""
        prepared = self._prepared
        if prepared is None:
            return None
        key = (command, types)
        name = prepared.names.get(key)
        if name is None and self._keep and not prepared.is_full():
            name = prepared.new_name()
            self._pgconn.send_prepare(name, command, param_types=types or None)
            prepared.names[key] = name
            self._sent.append(_PARSE)
            self._keys.append(key)
        return name

    def _answers(self) -> list[list[PGresult]]:
        segments: list[list[PGresult]] = [[]]
        try:
            self._send_all()
            self._read_into(segments)
        except psycopg.OperationalError:
            self.answered = sum(not is_error(result) for segment in segments for result in segment)
            # What the server said before it hung up says more than that it did; behind it libpq makes answers up.
            for result in filter(_ends_session, segments[-1]):
                raise self._error(result) from None
            raise
        return segments[:-1]

    def _send_all(self) -> None:
        # Reading along: a server whose answers nobody takes stops reading, too.
        pgconn = self._pgconn
        while pgconn.flush():
            if self._poll(select.POLLIN | select.POLLOUT) & ~select.POLLOUT:
                pgconn.consume_input()

    def _read_into(self, segments: list[list[PGresult]]) -> None:
        pgconn = self._pgconn
        left = self._sent.count(_SYNC)
        while left:
            while pgconn.is_busy():
                self._poll(select.POLLIN)
                pgconn.consume_input()
            result = pgconn.get_result()
            if result is None:  # the end of one command
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                segments.append([])
                left -= 1
            elif result.status == ExecStatus.FATAL_ERROR and pgconn.status == pq.ConnStatus.BAD:
                raise self._error(result)
            elif result.status in _COPY:
                # libpq would give this same answer for ever.
                raise psycopg.NotSupportedError("COPY from or to the client cannot be part of a batch")
            else:
                segments[-1].append(result)

    def _poll(self, events: int) -> int:
        poll = select.poll()
        poll.register(self._pgconn.socket, events)
        while True:
            if ready := poll.poll(self._milliseconds()):
                return ready[0][1]
            if self._give_up is not None and time.monotonic() >= self._give_up:
                raise ServerSilent("the server did not answer within the batch's deadline")

    def _error(self, result: PGresult) -> psycopg.Error:
        return psycopg.errors.error_from_result(result, encoding_of(self._connection))

    def _milliseconds(self) -> float:
        if self._give_up is None:
            return _NEVER_POLLED
        return min(_NEVER_POLLED, max(0.0, self._give_up - time.monotonic()) * 1000 + 1)

    def _sorted(self, segments: list[list[PGresult]]) -> list[list[PGresult]]:
        """Without the answers to preparations; the error of one takes the place of its command's answer."""
        kinds, keys = iter(self._sent), iter(self._keys)
        sorted_segments = []
        for segment in segments:
            answers: list[PGresult] = []
            failed: PGresult | None = None
            results = iter(segment)
            for kind in kinds:
                if kind == _SYNC:
                    break
                result = next(results)
                if kind == _COMMAND:
                    answers.append(failed or result)
                    failed = None
                elif result.status != ExecStatus.COMMAND_OK:
                    self._forget(next(keys))
                    failed = failed or (result if result.status == ExecStatus.FATAL_ERROR else None)
                else:
                    next(keys)
            if failed is not None:
                answers.append(failed)
            sorted_segments.append([*answers, *results])
        return sorted_segments

    def _forget(self, key: tuple[bytes, tuple[int, ...]]) -> None:
        if self._prepared is not None:
            self._prepared.names.pop(key, None)


def _ends_session(result: PGresult) -> bool:
    return result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED) in (b"FATAL", b"PANIC")


def is_error(answer: PGresult) -> bool:
    """Whether the command failed, or was not run because one before it did."""
    return answer.status in (ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_ABORTED)
