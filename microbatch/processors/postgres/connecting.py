"""A connection of our own in the making.

It is made step by step: what a batch has no time left for goes on for the next one. So jobs with deadlines shorter
than a connection takes get one all the same, and no deadline is overrun.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import psycopg
import psycopg.conninfo
from psycopg import pq
from psycopg.conninfo import make_conninfo
from psycopg.pq import ConnStatus, PollingStatus
from psycopg.pq.abc import PGconn

from .refused import all_for_good, ask_for_code, is_for_good, read_code
from .sqlstate import finally_failed, is_listed

_T = TypeVar("_T")

_UNLIMITED = 130  # seconds; what libpq's own wait comes to where nothing is said
_LEAST = 2  # seconds, as in libpq
_MANY = "Multiple connection attempts failed. All failures were:"
_FILES = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_EVENTS = {PollingStatus.READING: select.POLLIN, PollingStatus.WRITING: select.POLLOUT}


def failed_to_connect(error: BaseException) -> psycopg.Error | None:
    """*error*, met where a connection was to be made, as one that says whether to try again; None if it is another's.

    Without the connection parameters, the password too, that psycopg's own carries.
    """
    if isinstance(error, psycopg.Error):
        return error if error.pgconn is None else type(error)(*error.args)
    if isinstance(error, OSError) and not isinstance(error, _FILES):
        return psycopg.OperationalError(f"no connection can be made: {error.strerror or type(error).__name__}")
    # Django and SQLAlchemy raise their own error from psycopg's.
    cause = error.__cause__
    return type(cause)(*cause.args) if isinstance(cause, psycopg.OperationalError) else None


class Wait(NamedTuple):
    """For a socket to be ready, so many seconds at most."""

    socket: int
    events: int
    seconds: float


# Each wait is answered with the seconds that are left of it.
Steps: TypeAlias = Generator[Wait, float, _T]


class Making(Generic[_T]):
    """Goes through *steps* as far as there is time; used by one thread at a time."""

    def __init__(self, steps: Steps[_T]) -> None:
        self._steps = steps
        self._wait: Wait | None = None

    def finish(self, until: float | None) -> _T | None:
        """What the steps make; None where that is not there *until* (monotonic) and may be asked for again.

        Time in which nobody asks does not count.
        """
        try:
            wait = self._wait or next(self._steps)
            while True:
                began = time.monotonic()
                seconds = wait.seconds if until is None else min(wait.seconds, until - began)
                is_ready = _is_ready(wait, seconds)
                left = wait.seconds - (time.monotonic() - began)
                if is_ready:
                    wait = self._steps.send(left)
                elif left <= 0:
                    wait = self._steps.throw(psycopg.errors.ConnectionTimeout("connection timeout expired"))
                else:
                    self._wait = wait._replace(seconds=left)
                    return None
        except StopIteration as done:
            made: _T = done.value
            return made

    def close(self) -> None:
        """Undo what there is of it."""
        self._steps.close()


def _is_ready(wait: Wait, seconds: float) -> bool:
    poll = select.poll()
    poll.register(wait.socket, wait.events)
    # A little late rather than twice: poll counts milliseconds.
    return bool(poll.poll(int(seconds * 1000) + 1 if seconds > 0 else 0))


def connect(parameters: dict[str, Any]) -> Steps[psycopg.Connection[Any]]:
    """Connect to the first of the hosts that takes us, in autocommit mode.

    Raises:
        psycopg.OperationalError: not one of them does. It has the server's SQLSTATE, and is not tried again if every
            one of them has refused for good.
    """
    failures = []
    for attempt in _attempts(parameters):
        try:
            pgconn = yield from _connect(attempt, _patience(parameters))
        except psycopg.OperationalError as error:
            failures.append((attempt, error))
        else:
            connection: psycopg.Connection[Any] = psycopg.Connection(pgconn)
            connection.autocommit = True
            return connection
    raise _failure(failures)


def _attempts(parameters: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One host and address each, for libpq bounds nothing here; it tries all of them itself where psycopg cannot."""
    split: Callable[[Any], Any] | None = getattr(psycopg.conninfo, "conninfo_attempts", None)
    return [parameters] if split is None else split(parameters)


def _patience(parameters: dict[str, Any]) -> float:
    """Seconds for one host, by libpq's rules."""
    given = parameters.get("connect_timeout", os.environ.get("PGCONNECT_TIMEOUT", _UNLIMITED))
    try:
        seconds = int(float(given))
    except (ValueError, OverflowError):
        raise psycopg.ProgrammingError(f"bad value for connect_timeout: {given!r}") from None
    return max(_LEAST, seconds) if seconds > 0 else _UNLIMITED


def _connect(attempt: dict[str, Any], seconds: float) -> Steps[PGconn]:
    pgconn: PGconn = pq.PGconn.connect_start(make_conninfo("", **attempt).encode())
    try:
        if pgconn.status == ConnStatus.BAD:
            raise _told("connection is bad", pgconn)
        ask_for_code(pgconn)
        while (status := pgconn.connect_poll()) in _EVENTS:
            seconds = yield Wait(pgconn.socket, _EVENTS[PollingStatus(status)], seconds)
        if status != PollingStatus.OK:
            raise _told("connection failed", pgconn)
        ask_for_code(pgconn, False)
        pgconn.nonblocking = 1
    except BaseException:
        pgconn.finish()
        raise
    return pgconn


def _told(what: str, pgconn: PGconn) -> psycopg.OperationalError:
    text, code = read_code(pgconn.error_message.decode("utf-8", "replace").strip())
    return _error(f"{what}: {text}", code)


def _error(text: str, code: str | None) -> psycopg.OperationalError:
    kind: type[psycopg.Error] = psycopg.OperationalError
    for_good = is_for_good(text, code)
    if code is not None and (for_good or is_listed(code)):
        try:
            kind = psycopg.errors.lookup(code)
        except KeyError:
            pass
    error = kind(text) if issubclass(kind, psycopg.OperationalError) else psycopg.OperationalError(text)
    # A code that the table of errors does not know would be taken for a job's fault.
    if for_good or (code is not None and is_listed(code)):
        error.sqlstate = code
    return error if not for_good else finally_failed(error)


def _failure(failures: list[tuple[dict[str, Any], psycopg.OperationalError]]) -> psycopg.OperationalError:
    """What all attempts came to, in one error."""
    by_host = [((at.get("host"), at.get("port")), is_for_good(str(error), error.sqlstate)) for at, error in failures]
    refused = all_for_good(by_host)
    # One that is tried again must not look like one that is not.
    error = [error for (_, error), (_, for_good) in zip(failures, by_host, strict=True) if for_good == refused][-1]
    if len(failures) == 1:
        return error
    lines = [str(error), _MANY]
    for at, each in failures:
        lines.append(f"- host: {at.get('host')!r}, port: {at.get('port')!r}, hostaddr: {at.get('hostaddr')!r}: {each}")
    whole = type(error)("\n".join(lines))
    whole.sqlstate = error.sqlstate
    return finally_failed(whole) if refused else whole
