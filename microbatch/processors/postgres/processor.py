"""The processor: one statement, one transaction per batch, one result per job."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias, cast

from psycopg import sql
from psycopg.abc import Query
from psycopg_pool import ConnectionPool

from microbatch.protocols import Batch

from . import sqlstate
from .borrowed import BorrowedConnections, PooledConnections, Source
from .connections import OwnConnections
from .parameters import Job, parameters_of
from .statement import run_for_each
from .transaction import commit

Statement: TypeAlias = str | bytes | sql.Composable
Connections: TypeAlias = OwnConnections | BorrowedConnections


class PostgresProcessor:
    """Runs one statement per job, a batch in one transaction; safe to call from several threads at once.

    A job's result is its statement's row as a dict: None where it returned no row (no RETURNING, ON CONFLICT
    DO NOTHING, an UPDATE that met nothing), a list of dicts where it returned several.

    A batch that fails is rolled back whole and raises psycopg's own error: nothing was written. When the
    answer to COMMIT is missing, it raises `OutcomeUnknown`.

    Args:
        conninfo: a connection string: the processor makes its own connections, one per batch in flight,
            anew in each process. Unless it names them, `connect_timeout`, the keep-alives,
            `tcp_user_timeout` and `application_name` are set. It reaches no log, no repr and no error.

            Or a callable that gives a context manager with a psycopg connection, such as
            `pool.connection`. The batch is committed before the context manager is left. Inside a
            transaction (one that has run a statement) it gets a savepoint instead, and a completed job is
            as true as the commit of that transaction. Nobody else may use the connection meanwhile. A
            bare connection would close itself on leaving: lend it with `contextlib.nullcontext`.

            Or an open `psycopg_pool.ConnectionPool` with connections to spare. Request threads that hold
            all of them while they wait for a future are a deadlock: their batch waits for a connection.
        statement: any single command, with psycopg's placeholders: `%(name)s` for jobs that are mappings or
            dataclasses, `%s` for sequences.

    Raises:
        ValueError: *conninfo* cannot be read or *statement* is empty.
        TypeError: one of them is of another type.
    """

    def __init__(self, conninfo: str | Source | ConnectionPool[Any], statement: Statement) -> None:
        self._statement = _checked(statement)
        self._connections = _connections(conninfo)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with {self._connections}>"

    # Any: the statement decides between a row, several and none.
    def process(self, batch: Batch[Job], /) -> list[Any]:
        """Write *batch* and return its results in its order. Blocks until COMMIT is answered.

        Raises:
            TypeError: a job is neither a mapping nor a sequence nor a dataclass instance.
            psycopg.Error: the database or the way to it failed; nothing was written.
            OutcomeUnknown: the answer to COMMIT is missing.
        """
        parameters = [parameters_of(job) for job in batch]
        if not parameters:
            return []
        with self._connections.lend(batch) as connection:
            work = partial(run_for_each, connection, self._statement, parameters)
            return commit(connection, work, batch.id)

    def open(self) -> None:
        """Connect, so that an unreachable server shows at once. Blocks up to `connect_timeout` seconds."""
        self._connections.open()

    def close(self) -> None:
        """Close the idle ones of the connections made in this process; a later batch makes new ones."""
        self._connections.close()

    def is_retryable(self, error: BaseException) -> bool:
        """Whether the link was lost before COMMIT, or the batch met a deadlock or a serialization failure."""
        return sqlstate.is_retryable(error)

    def abandon(self, batch: Batch[Job]) -> None:
        """Free the thread in `process(batch)` by cutting its connection; from any thread, without blocking.

        Borrowed connections are left alone. The server notices when the running statement ends.
        """
        self._connections.abandon(batch)


def _checked(statement: Statement) -> Query:
    if not isinstance(statement, (str, bytes, sql.Composable)):
        raise TypeError(f"statement must be str, bytes or made by psycopg.sql, not {type(statement).__qualname__}")
    if _is_empty(statement):
        raise ValueError("statement is empty; pass an INSERT, UPDATE, DELETE or any other single command")
    return cast(Query, statement)


def _is_empty(statement: Statement) -> bool:
    # Part by part: rendering the whole would need a connection for the literals of some types.
    if isinstance(statement, sql.Composed):
        return all(_is_empty(part) for part in statement)
    if isinstance(statement, sql.SQL):
        return not statement.as_string(None).strip()
    return isinstance(statement, (str, bytes)) and not statement.strip()


def _connections(conninfo: str | Source | ConnectionPool[Any]) -> Connections:
    if isinstance(conninfo, str):
        return OwnConnections(conninfo)
    if isinstance(conninfo, ConnectionPool):
        return PooledConnections(conninfo)
    if callable(conninfo):
        return BorrowedConnections(conninfo)
    raise TypeError(
        "conninfo must be a connection string, a callable that gives a context manager with a psycopg"
        f" connection, or a psycopg_pool.ConnectionPool, not {type(conninfo).__qualname__}"
    )
