"""The commands that write rows into one table, put together once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from .catalogue import Column, Table, quoted
from .conversions import recoded

_ALIAS = b"microbatch_t"
_JSON = ("pg_catalog.jsonb", "pg_catalog.json", 'pg_catalog."json"')  # a word of SQL since PostgreSQL 16
_WITHOUT_TIME_ZONE = frozenset(f"pg_catalog.{name}" for name in ("date", "time", "timestamp", "daterange", "tsrange"))


@dataclass(frozen=True, slots=True)
class Target:
    """What `insert_into` was called with, and the table it found.

    *on_conflict* is SQL or empty. *overriding*: a value for an identity that is always generated is taken.
    """

    table: Table
    columns: tuple[str, ...]
    returning: Literal["*"] | tuple[str, ...] | None
    on_conflict: bytes = b""
    overriding: bool = False

    def json(self) -> dict[str, bool]:
        """The columns of JSON, and whether they are arrays of it."""
        return {
            column.name: not column.is_json
            for column in self.table.columns
            if column.is_json or column.element in _JSON
        }

    def local(self) -> frozenset[str]:
        """The columns of dates and times without a time zone, alone and in arrays and ranges."""
        types = {column.name: (column.element or column.base).replace('"', "") for column in self.table.columns}
        return frozenset(name for name, type_name in types.items() if type_name in _WITHOUT_TIME_ZONE)

    def back(self, alias: bytes = b"") -> list[bytes]:
        """What comes back of a row, as SQL."""
        if self.returning is None:
            return []
        prefix = alias and alias + b"."
        return [prefix + b"*"] if self.returning == "*" else [prefix + quoted(name) for name in self.returning]

    def overrides(self, drawn: Sequence[str] = ()) -> bytes:
        """What an INSERT says to give an identity, which may be one of the *drawn* columns, itself."""
        needed = self.overriding or any(self.table.column(name).identity == "a" for name in drawn)
        return b" OVERRIDING SYSTEM VALUE" if needed else b""

    def only(self) -> bytes:
        """The table without its children, which may hold strangers' rows with the same key."""
        return (b"" if self.table.kind == "p" else b"ONLY ") + self.table.identifier()


def insert_row(target: Target) -> bytes:
    """INSERT of one row; its parameters are of unknown type."""
    command = b"INSERT INTO %s (%s)%s VALUES (%s)" % (
        *(target.table.identifier(), _listed(target.columns), target.overrides()),
        _parameters(len(target.columns)),
    )
    return command + target.on_conflict + _returning(target.back())


def merge(target: Target) -> bytes:
    """MERGE of an array per column; the first column that comes back is the row's number."""
    casts, arrays, aliases = _sources(target.table, target.columns)
    command = (
        b"MERGE INTO %s AS microbatch_t USING (SELECT %s, microbatch_n FROM ROWS FROM (%s)"
        b" WITH ORDINALITY microbatch_u(%s, microbatch_n)) AS microbatch_s(%s, microbatch_n)"
        b" ON false WHEN NOT MATCHED THEN INSERT (%s)%s VALUES (%s)"
    ) % (
        *(target.table.identifier(), casts, arrays, aliases, aliases, _listed(target.columns), target.overrides()),
        b", ".join(b"microbatch_s.c%d" % i for i in range(len(target.columns))),
    )
    back = target.back(_ALIAS)
    return command + _returning([b"microbatch_s.microbatch_n", *back] if back else [])


class KeyedCommands:
    """INSERTs with the *drawn* columns of the key in front, whose texts come back in front, too.

    `one` and `all` insert; `careful_one` and `careful_all` leave a key alone that is there already. `compare` takes
    whole rows, `look_up` the columns *key* of them, which is the whole key: its drawn part alone may be a stranger's,
    too. An array per column, both.
    """

    def __init__(self, target: Target, drawn: tuple[str, ...]) -> None:
        table, names = target.table, (*drawn, *target.columns)
        casts, arrays, aliases = _sources(table, names)
        self.count = len(names)
        self.beginning = b"INSERT INTO %s AS microbatch_t (" % table.identifier()
        into = b"%s%s)%s" % (self.beginning, _listed(names), target.overrides(drawn))
        one = b"%s VALUES (%s)" % (into, _parameters(len(names)))
        all_ = b"%s SELECT %s FROM ROWS FROM (%s) AS microbatch_s(%s)" % (into, casts, arrays, aliases)
        careful = b" ON CONFLICT (%s) DO NOTHING" % _listed([column.name for column in table.key])
        back = [*(b"%s.%s::pg_catalog.text" % (_ALIAS, quoted(name)) for name in drawn), *target.back(_ALIAS)]
        self.one, self.all = one + _returning(back), all_ + _returning(back)
        self.careful_one, self.careful_all = one + careful + _returning(back), all_ + careful + _returning(back)
        self.key = [i for i, name in enumerate(names) if table.column(name).in_key]
        whole = [table.column(names[i]) for i in self.key]
        self.look_up = b"SELECT %s FROM %s AS microbatch_t WHERE (%s) IN (%s)" % (
            *(b", ".join(back), target.only(), _listed([column.name for column in whole])),
            _keys(whole),
        )
        # As text, because not every type can be compared; with the modifier, which rounds and pads.
        same = [
            b"t.%s::pg_catalog.text IS NOT DISTINCT FROM s.c%d::%s::pg_catalog.text"
            % (quoted(name), i, table.column(name).full_type.encode())
            for i, name in enumerate(names)
        ]
        indexed = [
            b"t.%s = s.c%d::%s" % (quoted(names[i]), i, column.full_type.encode())
            for i, column in zip(self.key, whole, strict=True)
        ]
        self.compare = b"SELECT count(*) FROM %s AS t, ROWS FROM (%s) AS s(%s) WHERE %s" % (
            *(target.only(), arrays, aliases),
            b" AND ".join([*indexed, *same]),
        )

    def recoded(self, connection: psycopg.Connection[Any]) -> KeyedCommands:
        """The same, in the connection's encoding."""
        for name, command in vars(self).items():
            if isinstance(command, bytes):
                setattr(self, name, recoded(command, connection))
        return self


def _keys(columns: Sequence[Column]) -> bytes:
    """A query for the keys that are sent, an array per column: with the modifier, as they are stored, none cut."""
    texts = [b"c%d" % i for i in range(len(columns))]
    values = [_cast(text, column) for text, column in zip(texts, columns, strict=True)]
    stored = [b"(%s)::%s" % (value, column.full_type.encode()) for value, column in zip(values, columns, strict=True)]
    uncut = [
        b" AND pg_catalog.rtrim((%s)::pg_catalog.text) = pg_catalog.rtrim((%s)::pg_catalog.text)" % (value, cut)
        for value, cut, column in zip(values, stored, columns, strict=True)
        if column.is_cut
    ]
    return b"SELECT %s FROM ROWS FROM (%s) AS s(%s) WHERE true%s" % (
        *(b", ".join(stored), _arrays(len(columns)), b", ".join(texts), b"".join(uncut)),
    )


def _sources(table: Table, names: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """For a command that takes an array per column: the casts, the arrays, the aliases."""
    aliases = [b"c%d" % i for i in range(len(names))]
    casts = [_cast(alias, table.column(name)) for alias, name in zip(aliases, names, strict=True)]
    return b", ".join(casts), _arrays(len(names)), b", ".join(aliases)


def _arrays(count: int) -> bytes:
    return b", ".join(b"pg_catalog.unnest($%d::pg_catalog.text[])" % (i + 1) for i in range(count))


def _cast(text: bytes, column: Column) -> bytes:
    """*text* as INSERT would read it from a literal.

    A cast cuts what is too long for a modifier, the assignment to the column or its domain refuses it. So the cast is
    to the type behind, without a modifier. Where that is not how the column's own type reads text, an array of one item
    brings its input function into play.
    """
    if column.array is None:
        return b"%s::%s" % (text, column.base.encode())
    item = b"(ARRAY[%s]::pg_catalog.text::%s)[1]" % (text, column.array.encode())
    return b"CASE WHEN %s IS NOT NULL THEN %s END" % (text, item)


def _parameters(count: int) -> bytes:
    return b", ".join(b"$%d" % (i + 1) for i in range(count))


def _returning(columns: Sequence[bytes]) -> bytes:
    return b" RETURNING " + b", ".join(columns) if columns else b""


def _listed(names: Sequence[str]) -> bytes:
    return b", ".join(map(quoted, names))
