"""Primary keys, drawn before the rows they are for.

A sequence's value is not durable when it is drawn: after a crash the same number may be handed out again, to somebody
else, and a retry would take their row for ours. Hence the message in the draw: it makes the draw write WAL of its own,
and its commit flushes everything before it, whoever wrote that.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence

from .catalogue import Column, Table
from .session import Session

_LEAST = 32  # a quiet site draws once in so many jobs
_MOST = 8192  # and a busy one, which doubles its blocks, in so many
_BUSY = 1.0  # seconds in which a block is used up
_SHARE = 8  # no more than this part of what the sequence still has is drawn in advance

_DURABLY = (
    "WITH d AS MATERIALIZED (SELECT set_config('synchronous_commit', 'on', true),"
    " pg_logical_emit_message(true, 'microbatch', ''))"
)


class Keys:
    """Of one connection, and thrown away with it. A key is one text per drawn column."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._block: deque[tuple[bytes, ...]] = deque()
        self._is_random = all(column.is_random_uuid for column in columns)
        self._query = _query(columns).encode()
        self._size = _LEAST
        self._drawn_at = -_BUSY

    def draw(self, session: Session, count: int) -> list[tuple[bytes, ...]]:
        """*count* keys that nobody else has; committed before this returns.

        Raises:
            psycopg.Error: the server refuses; nothing was written for any job.
        """
        if self._is_random:
            return [tuple([str(uuid.uuid4()).encode() for _ in self._columns]) for _ in range(count)]
        if len(self._block) < count:
            self._refill(session, count)
        return [self._block.popleft() for _ in range(count)]

    def forget(self) -> None:
        """Somebody else has one of them: none of this block is to be trusted."""
        self._block.clear()

    def _refill(self, session: Session, count: int) -> None:
        now = time.monotonic()
        self._size = min(2 * self._size, _MOST) if now - self._drawn_at < _BUSY else _LEAST
        self._drawn_at = now
        missing = count - len(self._block)
        answer = session.ask(self._query, str(missing), str(max(missing, self._size)))
        self._block += [
            tuple([answer.get_value(row, column) or b"" for column in range(answer.nfields)])
            for row in range(answer.ntuples)
        ]


def keys_of(table: Table, drawn: Sequence[str]) -> Keys:
    """Keys for the *drawn* columns of *table*."""
    return Keys([table.column(name) for name in drawn])


def _query(columns: Sequence[Column]) -> str:
    """Takes how many keys are missing, and how many are wanted."""
    values = ", ".join(f"({_expression(column)})::text" for column in columns)
    rooms = [_room(column.sequences[0]) for column in columns if column.sequences]
    wanted = f"least({', '.join(['$2::bigint', *rooms])})"
    return f"{_DURABLY} SELECT {values} FROM d, generate_series(1, greatest($1::bigint, {wanted}))"


def _expression(column: Column) -> str:
    # An identity has no default that could be asked.
    return f"nextval({column.sequences[0]}::oid::regclass)" if column.identity else str(column.default)


def _room(sequence: int) -> str:
    """A part of the values that *sequence* still has; it may be read by whoever may draw from it."""
    return (
        "(SELECT CASE WHEN seqcycle THEN 0"
        " WHEN seqincrement > 0 THEN (seqmax::numeric - coalesce(pg_sequence_last_value(seqrelid), seqmin))"
        f" / seqincrement / {_SHARE}"
        " ELSE (coalesce(pg_sequence_last_value(seqrelid), seqmax) - seqmin::numeric)"
        f" / -seqincrement / {_SHARE} END FROM pg_sequence WHERE seqrelid = {sequence})::bigint"
    )
