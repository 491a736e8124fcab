"""Primary keys, drawn before the rows they are for.

A sequence's value is not durable when it is drawn: after a crash the same number may be handed out again, to somebody
else, and a retry would take their row for ours. Hence the message in the draw: it makes the draw write WAL of its own,
and its commit flushes everything before it, whoever wrote that.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from .catalogue import Column, Table
from .session import Session

_LEAST = 32  # a quiet site draws once in so many jobs
_INTEGER_END = 2_000_000_000  # near the end of an integer key nothing is drawn in advance

_DURABLY = (
    "WITH d AS MATERIALIZED (SELECT set_config('synchronous_commit', 'on', true),"
    " pg_logical_emit_message(true, 'microbatch', ''))"
)


class Keys:
    """Of one connection, and thrown away with it. A key is one text per drawn column."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._block: list[tuple[bytes, ...]] = []
        self._is_random = all(column.is_random_uuid for column in columns)
        self._query = _query(columns).encode()
        self._in_advance = True

    def draw(self, session: Session, count: int) -> list[tuple[bytes, ...]]:
        """*count* keys that nobody else has; committed before this returns.

        Raises:
            psycopg.Error: the server refuses; nothing was written for any job.
        """
        if self._is_random:
            return [tuple([str(uuid.uuid4()).encode() for _ in self._columns]) for _ in range(count)]
        if len(self._block) < count:
            self._refill(session, count)
        taken, self._block = self._block[:count], self._block[count:]
        return taken

    def forget(self) -> None:
        """Somebody else has one of them: none of this block is to be trusted."""
        self._block.clear()

    def _refill(self, session: Session, count: int) -> None:
        wanted = max(count, _LEAST) if self._in_advance else count - len(self._block)
        answer = session.ask(self._query, str(wanted))
        drawn = [
            tuple([answer.get_value(row, column) or b"" for column in range(answer.nfields)])
            for row in range(answer.ntuples)
        ]
        self._block += drawn
        self._in_advance = not any(
            column.type == "integer" and int(value) > _INTEGER_END
            for column, value in zip(self._columns, drawn[-1], strict=True)
        )


def keys_of(table: Table, drawn: Sequence[str]) -> Keys:
    """Keys for the *drawn* columns of *table*."""
    return Keys([table.column(name) for name in drawn])


def _query(columns: Sequence[Column]) -> str:
    values = ", ".join(f"({_expression(column)})::text" for column in columns)
    return f"{_DURABLY} SELECT {values} FROM d, generate_series(1, $1::int)"


def _expression(column: Column) -> str:
    # An identity has no default that could be asked.
    return f"nextval({column.sequences[0]}::oid::regclass)" if column.identity else str(column.default)
