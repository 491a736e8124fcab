"""Where connections come from: what the user passes, told apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from microbatch.protocols import Batch

from .borrowed import BorrowedConnections, PooledConnections
from .connecting import Steps, connect, failed_to_connect
from .connections import Connect, OwnConnections
from .conninfo import connection_parameters, is_url
from .misuse import instead_of_connection, instead_of_source, name_of
from .session import Session

# What a callable gives: a connection string, or one of the others that stand for one, or a context manager.
Given: TypeAlias = Any
Source: TypeAlias = Callable[[], AbstractContextManager[psycopg.Connection[Any]]] | Callable[[], str]
# Any: URLs and Engines of SQLAlchemy's, which is not there to be imported.
Conninfo: TypeAlias = str | Source | ConnectionPool[Any] | Any
Connections: TypeAlias = "OwnConnections | BorrowedConnections | CalledConnections"


def connections_from(conninfo: Conninfo) -> Connections:
    """The connections that *conninfo* stands for. Raises `TypeError` or `ValueError` if it stands for none."""
    own = _own(conninfo)
    if own is not None:
        return OwnConnections(own)
    if isinstance(conninfo, ConnectionPool):
        return PooledConnections(conninfo)
    if callable(conninfo) and not inspect.iscoroutinefunction(conninfo):
        pool = getattr(conninfo, "__self__", None)
        if isinstance(pool, ConnectionPool) and conninfo == pool.connection:
            return PooledConnections(pool)
        return CalledConnections(conninfo)
    raise TypeError(
        "conninfo must be a connection string, a callable that gives one or a context manager with a psycopg"
        " connection, a psycopg_pool.ConnectionPool or a sqlalchemy.Engine,"
        f" not {name_of(conninfo)}; {instead_of_source(conninfo)}"
    )


def _own(given: Given) -> Connect | None:
    """How connections of our own are made where *given* says so; None where it says something else."""
    if isinstance(given, str) or is_url(given):
        parameters = connection_parameters(given)
        return lambda: connect(parameters)
    if not all(hasattr(given, name) for name in ("dialect", "url", "pool")):
        return None
    if getattr(given.dialect, "driver", None) == "psycopg":
        return lambda: _by_engine(given)
    return _own(given.url)


def _by_engine(engine: Any) -> Steps[psycopg.Connection[Any]]:
    """A connection as *engine* makes them, with its `connect_args` and events, that is not its pool's."""
    yield from ()  # nothing here can be left and taken up again
    # A new pool each time: it makes connections as the engine's own, and has none that a fork could hand down.
    lent = engine.pool.recreate().connect()
    connection = lent.dbapi_connection
    lent.detach()
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(f"the engine gave {name_of(connection)}, not a psycopg.Connection")
    if connection.info.transaction_status != TransactionStatus.IDLE:
        connection.rollback()
    connection.autocommit = True
    return connection


class CalledConnections:
    """A callable's: called when a connection is made, it gives a string, or a context manager with a connection.

    Those of a string are our own, and are used again; another string counts from the next one on that is made.
    """

    def __init__(self, source: Callable[[], Given]) -> None:
        self._source = source
        self._own = OwnConnections(lambda: _by_call(source))
        self._borrowed = BorrowedConnections(source)
        self._gives_own = False

    def __str__(self) -> str:
        return "connections of a callable"

    @property
    def where(self) -> str:
        """The server of the latest connection of our own, for the log."""
        return self._own.where

    @contextmanager
    def lend(self, batch: Batch[Any], *, fresh: bool = False) -> Iterator[Session]:
        """As those of `OwnConnections` and `BorrowedConnections`."""
        with ExitStack() as stack:
            if self._own.is_ready() and not fresh:
                yield stack.enter_context(self._own.lend(batch))
                return
            given = _called(self._source)
            own = _own(given)
            self._gives_own = own is not None
            if own is not None:
                yield stack.enter_context(self._own.lend(batch, fresh=fresh, connect=own))
            else:
                yield stack.enter_context(self._borrowed.lend(batch, given=_checked(given)))

    @contextmanager
    def visit(self) -> Iterator[Session | None]:
        """None as long as nothing says that the connections are our own: others are not asked for without a batch."""
        with ExitStack() as stack:
            yield stack.enter_context(self._own.visit()) if self._gives_own else None

    def close(self, leave: Callable[[Session], None]) -> None:
        """Close those of our own."""
        self._own.close(leave)

    def abandon(self, batch: Batch[Any]) -> None:
        """Cut the connection that *batch* is using, if it is our own."""
        self._own.abandon(batch)


def _called(source: Callable[[], Given]) -> Given:
    try:
        return source()
    except Exception as error:
        failure = failed_to_connect(error)
        if failure is None or failure is error:
            raise
    # Outside any handler: as its context psycopg's own error would come along.
    raise failure


def _by_call(source: Callable[[], Given]) -> Steps[psycopg.Connection[Any]]:
    given = _called(source)
    own = _own(given)
    if own is None:
        raise TypeError(f"the callable gave connection strings, and now {name_of(given)}")
    return own()


def _checked(given: Given) -> AbstractContextManager[psycopg.Connection[Any]]:
    if inspect.iscoroutine(given):
        given.close()  # it would complain that nobody awaits it
    if isinstance(given, ConnectionPool) or not hasattr(type(given), "__enter__"):
        remedy = instead_of_source(given) if inspect.iscoroutine(given) else instead_of_connection(given)
        raise TypeError(
            f"the callable gave {name_of(given)}, not a connection string nor a context manager with a"
            f" psycopg.Connection; {remedy}"
        )
    manager: AbstractContextManager[psycopg.Connection[Any]] = given
    return manager
