"""Primary keys, drawn before the rows they are for.

A sequence's value is not durable when it is drawn: after a crash the same number may be handed out again, to somebody
else, and a retry would take their row for ours. Hence the message in the draw: it makes the draw write WAL of its own,
and its commit flushes everything before it, whoever wrote that. Which servers it waits for is the session's own choice,
as long as this one is among them.

A sequence that is about to end gives what it still has, number by number: a command that asked for more would lose all
of it.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import psycopg
from psycopg.pq.abc import PGresult

from .catalogue import Column, Table
from .flight import is_error
from .session import Session

Key: TypeAlias = tuple[bytes, ...]

_LEAST = 32  # a quiet site draws once in so many jobs
_MOST = 8192  # and a busy one, which doubles its blocks, in so many
_BUSY = 1.0  # seconds in which a block is used up
_SHARE = 8  # no more than this part of what the sequence still has is drawn by one command

_END_OF_SEQUENCE = "2200H"

_DURABLE = (
    "set_config('synchronous_commit', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'local'), true),"
    " pg_logical_emit_message(true, 'microbatch', '')"
)


class Keys:
    """Of one connection, and thrown away with it. A key is one text per drawn column."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = tuple(columns)
        self._block: deque[Key] = deque()
        self._is_random = all(column.is_random_uuid for column in columns)
        self._values = ", ".join(f"({_expression(column)})::pg_catalog.text" for column in columns)
        self._query = _query(self._values, columns)
        self._size = _LEAST
        self._drawn_at = -_BUSY

    def draw(self, session: Session, count: int) -> tuple[list[Key], psycopg.Error | None]:
        """*count* keys that nobody else has, committed before this returns; fewer with the error that a sequence ends.

        Raises:
            psycopg.Error: the server refuses; nothing was written for any job.
        """
        if self._is_random:
            return [tuple([str(uuid.uuid4()).encode() for _ in self._columns]) for _ in range(count)], None
        if len(self._block) < count:
            self._refill(session, count)
        end = self._draw_singly(session, count - len(self._block)) if len(self._block) < count else None
        return [self._block.popleft() for _ in range(min(count, len(self._block)))], end

    def forget(self) -> None:
        """Somebody else has one of them: none of this block is to be trusted."""
        self._block.clear()

    def _refill(self, session: Session, count: int) -> None:
        now = time.monotonic()
        self._size = min(2 * self._size, _MOST) if now - self._drawn_at < _BUSY else _LEAST
        self._drawn_at = now
        self._take(session.ask(self._query, str(count - len(self._block)), str(self._size)))

    def _draw_singly(self, session: Session, count: int) -> psycopg.Error | None:
        """The last values of a sequence, and the first ones, before it can be known how many there are."""
        flight = session.flight(keep=False)
        for _ in range(count):
            flight.run(f"SELECT {self._values}".encode())
            flight.sync()
        flight.run(f"SELECT {_DURABLE}".encode())
        flight.sync()
        *numbers, durable = [answers[-1] for answers in flight.land()]
        errors = [session.error(answer) for answer in (*numbers, durable) if is_error(answer)]
        if foreign := [error for error in errors if error.sqlstate != _END_OF_SEQUENCE]:
            raise foreign[0]
        for answer in numbers:
            if not is_error(answer):
                self._take(answer)
        return errors[0] if errors else None

    def _take(self, answer: PGresult) -> None:
        self._block += [
            tuple([answer.get_value(row, column) or b"" for column in range(answer.nfields)])
            for row in range(answer.ntuples)
        ]


def keys_of(table: Table, drawn: Sequence[str]) -> Keys:
    """Keys for the *drawn* columns of *table*."""
    return Keys([table.column(name) for name in drawn])


def _query(values: str, columns: Sequence[Column]) -> bytes:
    """Takes how many keys are missing, and how many are wanted; gives what can be given for sure."""
    sequences = [column.sequences[0] for column in columns if column.sequences]
    cycles = f"EXISTS (SELECT FROM pg_sequence WHERE seqcycle AND seqrelid IN ({', '.join(map(str, sequences))}))"
    wanted = f"CASE WHEN {cycles} THEN $1::bigint ELSE greatest($1::bigint, $2::bigint) END"
    count = f"least({', '.join([wanted, *map(_room, sequences)])})"
    return f"WITH d AS MATERIALIZED (SELECT {_DURABLE}) SELECT {values} FROM d, generate_series(1, {count})".encode()


def _expression(column: Column) -> str:
    # By number: an identity has no default, and a name may be another's by now.
    return (
        f"nextval({column.sequences[0]}::pg_catalog.oid::pg_catalog.regclass)"
        if column.sequences
        else str(column.default)
    )


def _room(sequence: int) -> str:
    """A part of the values that *sequence* still has, 0 where nobody knows; anybody who may draw from it may ask."""
    last = "pg_sequence_last_value(seqrelid)"
    return (
        "(SELECT CASE WHEN seqcycle THEN NULL"
        f" WHEN seqincrement > 0 THEN floor(coalesce((seqmax::numeric - {last}) / seqincrement / {_SHARE}, 0))"
        f" ELSE floor(coalesce(({last} - seqmin::numeric) / -seqincrement / {_SHARE}, 0))"
        f" END::bigint FROM pg_sequence WHERE seqrelid = {sequence})"
    )
