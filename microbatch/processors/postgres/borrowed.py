"""Connections of the user's: a callable's, or a pool's."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo, PipelineStatus, TransactionStatus
from psycopg_pool import ConnectionPool, PoolTimeout

from microbatch.errors import OutcomeUnknown
from microbatch.protocols import Batch

from .connecting import Making, connect, failed_to_connect
from .log import tell
from .misuse import instead_of_connection, name_of
from .session import Facts, Session, before
from .sqlstate import is_retryable

_A_WHILE = 1.0  # seconds for a pool; then it is asked why it has none

Lent: TypeAlias = AbstractContextManager[psycopg.Connection[Any]]
Source: TypeAlias = Callable[[], Lent]


class BorrowedConnections:
    """One connection per batch out of *source*; nothing is opened or cut here."""

    def __init__(self, source: Source, kind: str = "a callable") -> None:
        self._source = source
        self._kind = kind
        self._lent: dict[int, int] = {}  # id() of a connection, to the thread that has it

    @property
    def where(self) -> str:
        """Which server it is, is the user's business."""
        return ""

    def __str__(self) -> str:
        return f"connections of {self._kind}"

    @contextmanager
    def lend(self, batch: Batch[Any], *, fresh: bool = False, given: Lent | None = None) -> Iterator[Session]:
        """The batch's verdict stands, whatever the source's context manager does on its way out.

        Whether it is *fresh* is the source's business.
        """
        verdict: BaseException | None = None
        succeeded = committed = False
        try:
            give_up = before(batch.deadline)
            with _Entering(self._lender(give_up) if given is None else lambda: given) as connection:
                try:
                    with self._alone(_checked(connection)):
                        _check_usable(connection)
                        is_ours = connection.info.transaction_status == TransactionStatus.IDLE
                        session = None
                        try:
                            session = self._session(connection, give_up)
                            yield session
                        finally:
                            _end(connection, session is not None and session.is_open)
                except BaseException as error:
                    verdict = error
                    raise
                succeeded, committed = True, is_ours
        except BaseException as error:
            if committed and isinstance(error, Exception):
                kind = type(error).__name__
                message = "batch %s is committed; giving its connection back failed (%s)"
                tell(logging.WARNING, message, batch.id, kind)
            elif succeeded:
                raise OutcomeUnknown(
                    f"the connection's own context manager failed after batch {batch.id} was written"
                    f" ({type(error).__name__}): it may have undone it or not",
                    batch_id=batch.id,
                ) from error
            elif verdict is None:
                raise
        # A context manager that swallows an error, or raises its own over it, must not turn "unknown" into
        # "nothing was written", nor a failure into a success.
        if verdict is not None:
            raise verdict

    def _lender(self, give_up: float | None) -> Source:
        """What to call for a connection that is wanted no later than *give_up*."""
        return self._source

    def _session(self, connection: psycopg.Connection[Any], give_up: float | None) -> Session:
        # On the connection, for what is known refers to it: a table of ours would keep both for ever. By lender,
        # weakly, for a pool's connections outlive processors.
        known: _Known = connection.__dict__.setdefault("_microbatch_known", WeakKeyDictionary())
        if self in known:
            facts, memory = known[self]
            return Session(connection, facts, memory=memory, give_up=give_up)
        session = Session(connection, give_up=give_up)
        if session.status == TransactionStatus.IDLE:  # inside a transaction not everything is told
            known[self] = (session.facts, session.memory)
        return session

    @contextmanager
    def _alone(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        # Two batches on one connection share a transaction: the rollback of one takes the other's rows along.
        # setdefault is one step under the interpreter's lock; a lock of ours could be inherited by a fork.
        # By thread, which has one batch at a time: what an interruption leaves behind here shuts nobody out.
        me = threading.get_ident()
        try:
            if self._lent.setdefault(id(connection), me) != me:
                raise RuntimeError(
                    "the callable gave a connection that another batch is using; give each call its own,"
                    " or leave max_concurrent_batches at 1"
                )
            yield
        finally:
            if self._lent.get(id(connection)) == me:
                del self._lent[id(connection)]

    @contextmanager
    def visit(self) -> Iterator[None]:
        """None: the user's connections are not asked for before there is a batch."""
        yield None

    def close(self, leave: Callable[[Session], None]) -> None:
        """Nothing to do."""

    def abandon(self, batch: Batch[Any]) -> None:
        """Nothing to do: a connection that is not ours is not ours to cut."""


_Known: TypeAlias = WeakKeyDictionary[BorrowedConnections, tuple[Facts, dict[object, Any]]]


class PooledConnections(BorrowedConnections):
    """A pool's connections, refused in a child of the process that opened the pool."""

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        super().__init__(pool.connection, "a pool")
        self._pool = pool
        self._opened_in: int | None = None
        self._failures = 0
        self._note_process()

    def _lender(self, give_up: float | None) -> Source:
        return lambda: self._connection(give_up)

    @contextmanager
    def _connection(self, give_up: float | None) -> Iterator[psycopg.Connection[Any]]:
        self._note_process()
        if self._opened_in not in (None, os.getpid()):
            raise RuntimeError(
                "this connection pool was opened before the fork: parent and child would read each other's"
                " answers; open the pool in the process that uses it, or pass a connection string"
            )
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._pool.connection(self._seconds(give_up, _A_WHILE)))
            except PoolTimeout as late:
                self._ask_why(give_up)
                if (seconds := self._seconds(give_up, self._pool.timeout - _A_WHILE)) <= 0:
                    raise late
                connection = stack.enter_context(self._pool.connection(seconds))
            self._failures = self._failures_so_far()
            yield connection

    def _seconds(self, give_up: float | None, most: float) -> float:
        most = min(most, self._pool.timeout)
        return most if give_up is None else min(most, max(0.0, give_up - time.monotonic()))

    def _ask_why(self, give_up: float | None) -> None:
        """A pool goes on connecting, whatever the server says. Raises what it says if that is for good."""
        if self._failures_so_far() <= self._failures:
            return
        until = time.monotonic() + _A_WHILE
        making = Making(connect(_parameters_of(self._pool)))
        try:
            connection = making.finish(until if give_up is None else min(until, give_up))
            if connection is not None:
                connection.close()
        except psycopg.OperationalError as error:
            if not is_retryable(error):
                raise
        finally:
            making.close()

    def _failures_so_far(self) -> int:
        return self._pool.get_stats().get("connections_errors", 0)

    def _note_process(self) -> None:
        if self._opened_in is None and not self._pool.closed:
            self._opened_in = os.getpid()


def _parameters_of(pool: ConnectionPool[Any]) -> dict[str, Any]:
    conninfo: Any = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
    given: Any = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    return conninfo_to_dict(conninfo, **{name: value for name, value in (given or {}).items() if name in known})


class _Entering:
    """The context manager that *source* gives; what keeps it from giving a connection says whether to try again."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> psycopg.Connection[Any]:
        try:
            self._given = self._source()
            return self._given.__enter__()
        except Exception as error:
            failure = failed_to_connect(error)
            if failure is None or failure is error:
                raise
        # Outside any handler: as its context psycopg's own error would come along.
        raise failure

    def __exit__(self, *error: Any) -> bool | None:
        return self._given.__exit__(*error)


def _checked(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(
            f"the callable's context manager gave {name_of(connection)}, not a psycopg.Connection;"
            f" {instead_of_connection(connection)}"
        )
    return connection


def _check_usable(connection: psycopg.Connection[Any]) -> None:
    if connection.info.pipeline_status != PipelineStatus.OFF:
        raise psycopg.NotSupportedError("a connection in pipeline mode cannot be lent: its answers are not ours alone")
    if connection.info.transaction_status == TransactionStatus.INERROR:
        raise psycopg.errors.InFailedSqlTransaction("the connection is lent inside a transaction that has failed")


def _end(connection: psycopg.Connection[Any], is_open: bool) -> None:
    """Close a connection on which something of ours *is open*: its owner would commit it, or read our answers."""
    info = connection.info
    half_a_flight = info.pipeline_status != PipelineStatus.OFF
    if not connection.closed and (half_a_flight or (is_open and info.transaction_status != TransactionStatus.IDLE)):
        connection.close()
