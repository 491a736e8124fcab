"""Connections of the user's: a callable's, or a pool's."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg_pool import ConnectionPool

from microbatch.errors import OutcomeUnknown
from microbatch.protocols import Batch

from .log import tell
from .session import Facts, Session, before

Source: TypeAlias = Callable[[], AbstractContextManager[psycopg.Connection[Any]]]


class BorrowedConnections:
    """One connection per batch out of *source*; nothing is opened or cut here."""

    def __init__(self, source: Source, kind: str = "a callable") -> None:
        self._source = source
        self._kind = kind
        self._lent: dict[int, int] = {}  # id() of a connection, to the thread that has it

    def __str__(self) -> str:
        return f"connections of {self._kind}"

    @contextmanager
    def lend(self, batch: Batch[Any], *, fresh: bool = False) -> Iterator[Session]:
        """The batch's verdict stands, whatever the source's context manager does on its way out.

        Whether it is *fresh* is the source's business.
        """
        verdict: BaseException | None = None
        succeeded = committed = False
        try:
            with self._source() as connection:
                try:
                    with self._alone(_checked(connection)):
                        _check_usable(connection)
                        is_ours = connection.info.transaction_status == TransactionStatus.IDLE
                        session = None
                        try:
                            session = self._session(connection, before(batch.deadline))
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
        super().__init__(self._connection, "a pool")
        self._pool = pool
        self._opened_in: int | None = None
        self._note_process()

    def _connection(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        self._note_process()
        if self._opened_in not in (None, os.getpid()):
            raise RuntimeError(
                "this connection pool was opened before the fork: parent and child would read each other's"
                " answers; open the pool in the process that uses it, or pass a connection string"
            )
        return self._pool.connection()

    def _note_process(self) -> None:
        if self._opened_in is None and not self._pool.closed:
            self._opened_in = os.getpid()


def _checked(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(
            f"the callable's context manager gave {type(connection).__qualname__}, not a psycopg.Connection;"
            " with Django pass `lambda: contextlib.nullcontext(django.db.connection.connection)`"
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
