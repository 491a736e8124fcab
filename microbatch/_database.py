"""The commands' own look at the server: connecting, what a table takes, and the ledger of the commit guard."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from microbatch._terminal import CommandError
from microbatch.processors.postgres.conninfo import connection_parameters
from microbatch.processors.postgres.guard import DDL
from microbatch.processors.postgres.session import LEDGER

_LEDGER_LOCK = 0x6D6272636864  # of every `init-db`: two that create the table at once would fail one of them
_LEDGER_COLUMNS = {"lane": "uuid", "batch": "bigint", "at": "timestamp with time zone"}


def conninfo_of(dsn: str | None) -> str:
    """The server that --dsn names, or the environment."""
    return os.environ.get("MICROBATCH_DSN", "") if dsn is None else dsn


def connect(conninfo: str) -> psycopg.Connection[Any]:
    """A connection in autocommit mode, or a `CommandError` that does not show the connection string."""
    try:
        parameters = connection_parameters(conninfo)
        return psycopg.connect(autocommit=True, **parameters)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except psycopg.Error as error:
        raise CommandError(f"cannot connect to the server: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What *error* says, without line breaks."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


@dataclass(frozen=True, slots=True)
class Target:
    """The table as the load sees it; its name as in SQL."""

    table: str
    columns: tuple[str, ...]
    json_columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    is_json: bool
    is_required: bool
    is_generated: bool
    may_insert: bool


def find_table(conninfo: str, name: str, columns: tuple[str, ...]) -> Target:
    """Look the table up and check *columns* against it; `CommandError` says what does not fit."""
    with connect(conninfo) as connection:
        try:
            oid, table = _resolve(connection, name)
            known = {column.name: column for column in _columns_of(connection, oid)}
            _check_columns(name, columns, known)
        except psycopg.Error as error:
            raise CommandError(f"cannot look up table {name}: {one_line(error)}") from None
    return Target(table, columns, frozenset(column.name for column in known.values() if column.is_json))


def _resolve(connection: psycopg.Connection[Any], name: str) -> tuple[int, str]:
    row = connection.execute(
        "SELECT c.oid, n.nspname, c.relname, c.relkind::text FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
        [name],
    ).fetchone()
    if row is None:
        hint = "" if name == name.lower() else "; a name with capitals is quoted, as in --table '\"Orders\"'"
        raise CommandError(f"there is no table {name} in this database, or not on the search path{hint}")
    oid, schema, relation, kind = row
    if kind not in "rpvf":
        raise CommandError(f"{name} is no table")
    return oid, sql.Identifier(schema, relation).as_string(None)


def _columns_of(connection: psycopg.Connection[Any], oid: int) -> list[_Column]:
    # A BEFORE trigger may fill in a column that must not be null, so behind one nothing is required.
    rows = connection.execute(
        """
        SELECT a.attname,
               coalesce(nullif(t.typbasetype, 0), t.oid) IN ('json'::regtype, 'jsonb'::regtype),
               (a.attnotnull OR t.typnotnull)
                   AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL
                   AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = a.attrelid AND tgtype & 7 = 7),
               a.attgenerated <> '' OR a.attidentity = 'a',
               has_column_privilege(a.attrelid, a.attnum, 'INSERT')
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY a.attnum
        """,
        [oid],
    )
    return [_Column(*row) for row in rows]


def _check_columns(name: str, columns: tuple[str, ...], known: dict[str, _Column]) -> None:
    if unknown := [column for column in columns if column not in known]:
        there = ", ".join(known)
        raise CommandError(f"table {name} has no {_listed(unknown)}; its columns are {there}")
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise CommandError(f"{_listed(twice)} named more than once")
    if generated := [column for column in columns if known[column].is_generated]:
        raise CommandError(f"table {name} generates {_listed(generated)} itself and takes no values for it")
    if denied := [column for column in columns if not known[column].may_insert]:
        raise CommandError(f"no permission to insert into {_listed(denied)} of table {name}")
    missing = [column.name for column in known.values() if column.is_required and column.name not in columns]
    if columns and missing:
        raise CommandError(f"the input lacks {_listed(missing)} of table {name}: not null and without a default")


def _listed(columns: list[str]) -> str:
    return ("column " if len(columns) == 1 else "columns ") + ", ".join(map(repr, columns))


def ledger_ddl() -> str:
    """What creates the ledger, as a script."""
    grant = f"-- For each role that runs batches: GRANT SELECT, INSERT, UPDATE, DELETE ON {LEDGER} TO ...;"
    return f"{DDL};\n{grant}"


def make_ledger(conninfo: str) -> str:
    """Create the ledger where it is missing, and say what was done; `CommandError` says why not."""
    with connect(conninfo) as connection:
        try:
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LEDGER_LOCK])
                if (there := _ledger(connection)) is not None:
                    return f"{there} is there already; nothing was changed"
                connection.execute(DDL.encode())
                return f"created {_ledger(connection)}; roles other than its owner need SELECT, INSERT, UPDATE, DELETE"
        except psycopg.Error as error:
            raise CommandError(f"cannot create {LEDGER}: {one_line(error)}") from None


def _ledger(connection: psycopg.Connection[Any]) -> str | None:
    """The ledger's qualified name, None if there is none on the search path."""
    found = connection.execute(
        "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), c.oid FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
        [LEDGER],
    ).fetchone()
    if found is None:
        return None
    name, oid = found
    columns = connection.execute(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped",
        [oid],
    ).fetchall()
    if not _LEDGER_COLUMNS.items() <= dict(columns).items():
        wanted = ", ".join(f"{column} {kind}" for column, kind in _LEDGER_COLUMNS.items())
        raise CommandError(f"{name} is not microbatch's table: that one has {wanted}")
    return str(name)
