"""Whether a table is still the one that a batch's commands were put together for.

A prepared statement keeps the types of its parameters from the day it was parsed, a cast names the type of the day it
was written down, and a trigger that is added raises no error at all. So each flight that writes looks behind its rows:
their locks are held by then, and nothing changes any more before the transaction ends. What has moved is an error of
the look's own, which undoes the flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import psycopg
from psycopg.pq.abc import PGresult

from .flight import Flight, is_error
from .session import Session
from .sqlstate import Kind, kind_of

# A change writes a row of the catalogue anew, and so with a transaction id that none of its rows had. A first trigger
# changes the table's own row, later ones only their own.
_STAMP = b"""
SELECT format('SELECT 1 / (EXISTS (SELECT FROM pg_class WHERE oid = %1$s AND xmin = %2$L)'
    ' AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = %1$s AND xmin <> ALL (%3$L))', c.oid, c.xmin::text,
    ARRAY(SELECT DISTINCT a.xmin::text FROM pg_attribute a WHERE a.attrelid = c.oid ORDER BY 1))
  || CASE WHEN c.relhastriggers OR c.relkind = 'p' THEN format(
    ' AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = ANY (%L) AND xmin <> ALL (%L))', tree.oids,
    ARRAY(SELECT DISTINCT t.xmin::text FROM pg_trigger t WHERE t.tgrelid = ANY (tree.oids) ORDER BY 1)) ELSE '' END
  || CASE WHEN types.oids <> '{}' THEN format(
    ' AND NOT EXISTS (SELECT FROM pg_type WHERE oid = ANY (%L) AND xmin <> ALL (%L))', types.oids,
    ARRAY(SELECT DISTINCT y.xmin::text FROM pg_type y WHERE y.oid = ANY (types.oids) ORDER BY 1)) ELSE '' END
  || ')::int'
FROM pg_class c,
  LATERAL (SELECT ARRAY(SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid) ORDER BY 1) AS oids) AS tree,
  LATERAL (SELECT ARRAY(SELECT DISTINCT a.atttypid FROM pg_attribute a
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.atttypid >= 16384 ORDER BY 1) AS oids) AS types
WHERE c.oid = to_regclass($1)"""

# What a statement that has just been parsed holds locks on.
_RELATIONS = b"""
SELECT DISTINCT format('SELECT * FROM %I.%I', n.nspname, c.relname)
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND n.nspname <> 'pg_catalog'"""


_ALL_OF = b"SELECT * FROM "
# Of psycopg's names for encodings, those in which every name of a column can be said.
_ANY_NAME = ("utf-8", "ascii")


class Lookout(Protocol):
    """Looks, in flights that write."""

    def prepare(self, flight: Flight) -> None:
        """Queue what has to come before the rows; no command that is answered."""

    def look(self, flight: Flight) -> int:
        """Queue the look, which fails where something has moved; returns how many commands that is."""


class NoLookout:
    """Nothing that could move: every command is parsed when it is sent."""

    def prepare(self, flight: Flight) -> None:
        pass

    def look(self, flight: Flight) -> int:
        return 0


class Stamp:
    """Of one table: its row in the catalogue, and those of its columns, their types and its triggers."""

    def __init__(self, command: bytes) -> None:
        self.command = command

    def prepare(self, flight: Flight) -> None:
        pass

    def look(self, flight: Flight) -> int:
        flight.run(self.command)
        return 1


class Columns:
    """Those of the tables in a user's statement, from which the types of its parameters follow.

    Each command of *tables* selects all columns of one, and is prepared before the statement is. To describe it runs
    nothing and needs no privilege; the server refuses it where a column has another name or type by now.
    """

    def __init__(self, tables: Sequence[bytes]) -> None:
        self._tables = tuple(tables)

    def prepare(self, flight: Flight) -> None:
        for table in self._tables:
            flight.prepare(table)

    def look(self, flight: Flight) -> int:
        return sum(flight.describe_prepared(table) for table in self._tables)


class Stamps:
    """Of the tables in a user's statement, where names of columns need not fit into the session's encoding."""

    def __init__(self, stamps: Sequence[Stamp]) -> None:
        self._stamps = tuple(stamps)

    def prepare(self, flight: Flight) -> None:
        pass

    def look(self, flight: Flight) -> int:
        return sum(stamp.look(flight) for stamp in self._stamps)


def stamp_of(session: Session, table: str) -> Stamp:
    """The stamp of *table* today; asked before anything else about it, so that it is never newer."""
    answer = session.ask(_STAMP, table)
    # A table that is not there is the catalogue's to explain.
    return Stamp((answer.get_value(0, 0) or b"") if answer.ntuples else b"SELECT 1")


def columns_behind(session: Session, command: bytes, types: tuple[int, ...]) -> Columns | Stamps | None:
    """A look at those that *command* depends on, asked in one round trip; None if the server does not parse it now."""
    flight = session.flight(keep=False)
    left = session.milliseconds_left()
    if left is not None:
        flight.run(b"SELECT set_config('lock_timeout', $1, true)", [b"%d" % max(1, left // 4)])
    flight.parse(command, types)
    flight.run(_RELATIONS, once=True)
    flight.sync()
    answer = flight.land()[0][-1]
    if is_error(answer):
        return None
    tables = _texts(answer)
    encoding = session.connection.info.encoding
    if encoding in _ANY_NAME:
        return Columns(tables)
    return Stamps([stamp_of(session, table.removeprefix(_ALL_OF).decode(encoding)) for table in tables])


def has_moved(error: psycopg.Error) -> bool:
    """Whether a look that fails so has seen something, and was not merely in the way of others."""
    return kind_of(error) in (Kind.PERMANENT, Kind.STALE)


def _texts(answer: PGresult) -> list[bytes]:
    return [answer.get_value(row, 0) or b"" for row in range(answer.ntuples)]
