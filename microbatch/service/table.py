"""The table that the service writes: found once at start, its names quoted from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from .columns import Column
from .settings import DEFAULT_COLUMNS, DEFAULT_TABLE, ServiceError

_CREATE = """
    CREATE TABLE IF NOT EXISTS payment_transactions (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL,
        amount numeric(10, 2) NOT NULL,
        status varchar(50) NOT NULL,
        transaction_date timestamptz NOT NULL DEFAULT now()
    )"""
# Two services that create a table at once would fail one of them.
_CREATE_LOCK = 0x6D6273727665
_COLUMNS = """
    SELECT a.attname, format_type(a.atttypid, NULL), b.typname,
           NOT (a.attnotnull OR t.typnotnull), a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL,
           a.attgenerated <> '' OR a.attidentity = 'a', has_column_privilege(a.attrelid, a.attnum, 'INSERT'),
           CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END
    FROM pg_attribute a
    JOIN pg_type t ON t.oid = a.atttypid
    JOIN pg_type b ON b.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
    WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum"""
_MAX_NAME = 63  # bytes; the server cuts longer ones off without a word
_HEADER = 4  # bytes that count in the modifier of numeric, varchar and char


@dataclass(frozen=True, slots=True)
class Table:
    """Where rows go: its *name* in SQL, the columns that jobs give, and all that it has."""

    name: sql.Identifier
    given: dict[str, Column]
    all: tuple[Column, ...]


def create_default_table(connection: psycopg.Connection[Any]) -> None:
    """Create `payment_transactions` where it is missing."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_CREATE_LOCK])
        if connection.execute("SELECT to_regclass(%s)", [DEFAULT_TABLE]).fetchone() == (None,):
            connection.execute(_CREATE)


def find_table(connection: psycopg.Connection[Any], name: str | None, columns: Sequence[str] | None) -> Table:
    """Look the table up; *columns* None takes the default table's, or every one without a default.

    Raises:
        ServiceError: a name that cannot be, no such table, or columns that do not fit.
    """
    if columns is None and name is None:
        columns = DEFAULT_COLUMNS
    name = name or DEFAULT_TABLE
    for each in (name, *(columns or ())):
        _check_name(each)
    oid, identifier = _resolve(connection, name)
    found = tuple(_column(*row) for row in connection.execute(_COLUMNS, [oid]).fetchall())
    for column in found:
        _check_name(column.name)
    if columns is None:
        columns = [column.name for column in found if not column.has_default and not column.is_generated]
    known = {column.name: column for column in found}
    _check_columns(name, columns, known)
    return Table(identifier, {column: known[column] for column in columns}, found)


def _check_name(name: str) -> None:
    parts = name.split(".")
    if not name or "\0" in name or "%" in name or any(len(part.strip('"').encode()) > _MAX_NAME for part in parts):
        raise ServiceError(
            f"{name!r} cannot be a table or a column here: a name has 1 to {_MAX_NAME} bytes, without NUL and %"
        )


def _resolve(connection: psycopg.Connection[Any], name: str) -> tuple[int, sql.Identifier]:
    try:
        row = connection.execute(
            "SELECT c.oid, n.nspname, c.relname, c.relkind::text FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
            [name],
        ).fetchone()
    except psycopg.errors.Error as error:
        if error.sqlstate is None:
            raise
        row = None
    if row is None:
        raise ServiceError(f"there is no table {name} in this database, or not on the search path: name one with table")
    oid, schema, relation, kind = row
    if kind not in "rpvf":
        raise ServiceError(f"{name} is no table")
    if "%" in schema + relation:
        raise ServiceError(f"{name}: a name with % cannot be written to")
    return oid, sql.Identifier(schema, relation)


def _column(
    name: str,
    type: str,
    base: str,
    is_nullable: bool,
    has_default: bool,
    is_generated: bool,
    may_insert: bool,
    modifier: int,
) -> Column:
    modifier -= _HEADER
    has_length = base in ("varchar", "bpchar") and modifier > 0
    precision, scale = (modifier >> 16, modifier & 0x7FF) if base == "numeric" and modifier >= 0 else (None, None)
    if scale is not None and scale > 1000:  # negative, in eleven bits
        scale -= 0x800
    length = modifier if has_length else None
    return Column(name, type, base, is_nullable, has_default, is_generated, may_insert, precision, scale, length)


def _check_columns(name: str, columns: Sequence[str], known: dict[str, Column]) -> None:
    if not columns:
        raise ServiceError(f"table {name}: no column to write; name some with columns")
    if unknown := [column for column in columns if column not in known]:
        raise ServiceError(f"table {name} has no column {', '.join(unknown)}; it has {', '.join(known)}")
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise ServiceError(f"columns names {', '.join(twice)} more than once")
    if generated := [column for column in columns if known[column].is_generated]:
        raise ServiceError(f"table {name} generates {', '.join(generated)} itself: take it out of columns")
    if denied := [column for column in columns if not known[column].may_insert]:
        raise ServiceError(
            f"no permission to insert into {', '.join(denied)} of table {name}: GRANT INSERT to this role"
        )
    required = [column.name for column in known.values() if not (column.is_nullable or column.has_default)]
    if missing := [column for column in required if column not in columns]:
        raise ServiceError(f"columns lacks {', '.join(missing)} of table {name}: not null and without a default")
