"""Text in databases and sessions of every encoding: stored as it is or refused, and handed out as str."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Json

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.processors.postgres.conninfo import connection_parameters
from microbatch.processors.postgres.guard import DDL
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

FORMS = ("keys", "merge", "rows", "statement", "portable")
# Text that the encoding has, and a character that it has not.
TEXTS: dict[str, tuple[str, str]] = {
    "UTF8": ("Grüße, €, 表ソ能, 🐘", ""),
    "SQL_ASCII": ("Grüße, €, 表ソ能, 🐘", ""),
    "LATIN1": ("Grüße", "€"),
    "WIN1252": ("Grüße €", "ł"),
    "LATIN2": ("Łódź", "€"),
    "EUC_JP": ("表ソ能", "🐘"),
    "SJIS": ("表ソ能", "ü"),
    "BIG5": ("功許蓋", "ü"),
    "GBK": ("表誠", "Ł"),
    "GB18030": ("表ü€🐘", ""),
    "UHC": ("한글똠", "ü"),
}
SERVERS = ("UTF8", "SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP")


@pytest.fixture(scope="module")
def databases(dsn: str) -> Iterator[dict[str, str]]:
    """A database per encoding, by its name."""
    names = {encoding: sql.Identifier(f"encoding_{encoding.lower()}") for encoding in SERVERS}
    with psycopg.connect(dsn, autocommit=True) as control:
        for encoding, name in names.items():
            control.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            create = sql.SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
            control.execute(create.format(name, sql.Literal(encoding)))
        yield {encoding: make_conninfo(dsn, dbname=name._obj[0]) for encoding, name in names.items()}
        for name in names.values():
            control.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    with psycopg.connect(dsn) as connection:
        if request.param == "merge" and connection.info.server_version < 170000:
            pytest.skip("MERGE … RETURNING needs PostgreSQL 17")
    if request.param == "portable":
        monkeypatch.setattr(writer, "is_supported", lambda connection: False)
    return str(request.param)


def processor_of(form: str, conninfo: Any, table: str, columns: list[str]) -> PostgresProcessor:
    if form in ("statement", "portable"):
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        places = sql.SQL(", ").join([sql.SQL("%s")] * len(columns))
        text = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING *").format(sql.SQL(table), names, places)  # type: ignore[arg-type]
        return PostgresProcessor(conninfo, text.as_string(None))
    way: Any = {"rows": "statement"}.get(form, form)
    return PostgresProcessor.insert_into(conninfo, table, columns, strategy=way)


def a_batch(jobs: list[Any], id: str = "b1") -> Batch[Any]:
    return Batch(jobs, id=id)


@contextlib.contextmanager
def written(processor: PostgresProcessor, jobs: list[Any]) -> Iterator[list[Any]]:
    try:
        yield processor.process(a_batch(jobs)) + processor.process(a_batch(jobs[:1], "alone"))
    finally:
        processor.close()


def control_of(conninfo: str) -> psycopg.Connection[Any]:
    return psycopg.connect(conninfo, autocommit=True, client_encoding="UTF8")


def stored(conninfo: str, query: str) -> list[Any]:
    with control_of(conninfo) as connection:
        return [value for (value,) in connection.execute(query.encode())]


# The database's encoding


@pytest.mark.parametrize("encoding", SERVERS)
def test_a_database_of_every_encoding_gives_and_takes_str(databases: dict[str, str], form: str, encoding: str) -> None:
    conninfo, (text, _) = databases[encoding], TEXTS[encoding]
    empty(conninfo)
    with control_of(conninfo) as control:
        table = sql.Identifier(f"t {text}")
        make = sql.SQL("CREATE TABLE {} (id bigserial PRIMARY KEY, {} text, c varchar(40), j json, a text[], {} text)")
        control.execute(make.format(table, sql.Identifier(text), sql.Identifier(f"d {text}")))
        alter = sql.SQL("ALTER TABLE {} ALTER {} SET DEFAULT {}")
        control.execute(alter.format(table, sql.Identifier(f"d {text}"), sql.Literal(text)))
    jobs = [(text, text, Json({"k": text}), [text, None]), (None, "x", Json([]), [])]

    with written(processor_of(form, conninfo, f'"t {text}"', [text, "c", "j", "a"]), jobs) as rows:
        first = {text: text, "c": text, "j": {"k": text}, "a": [text, None], f"d {text}": text}
        second = {text: None, "c": "x", "j": [], "a": [], f"d {text}": text}
        assert [{name: row[name] for name in first} for row in rows] == [first, second, first]
    assert stored(conninfo, f'SELECT "{text}" FROM "t {text}" ORDER BY id') == [text, None, text]
    if encoding != "SQL_ASCII":
        size = len(text.encode({"EUC_JP": "euc_jp", "WIN1252": "cp1252"}.get(encoding, encoding)))
        assert stored(conninfo, f'SELECT octet_length("{text}") FROM "t {text}" ORDER BY id') == [size, None, size]


@pytest.mark.parametrize("encoding", [encoding for encoding in SERVERS if TEXTS[encoding][1]])
def test_P3_what_the_database_cannot_hold_fails_its_job_and_names_the_encoding(
    databases: dict[str, str], form: str, encoding: str
) -> None:
    conninfo, (text, bad) = databases[encoding], TEXTS[encoding]
    empty(conninfo)
    with control_of(conninfo) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text)")

    with written(processor_of(form, conninfo, "item", ["v"]), [(text,), (bad,), (text,)]) as rows:
        assert isinstance(rows[1], psycopg.errors.UntranslatableCharacter)
        assert encoding in str(rows[1])
        assert [row["v"] for row in (rows[0], *rows[2:])] == [text] * 3
    assert stored(conninfo, "SELECT v FROM item") == [text] * 3


def test_what_is_no_text_in_SQL_ASCII_comes_back_as_bytes(databases: dict[str, str], form: str) -> None:
    conninfo = make_conninfo(databases["SQL_ASCII"], client_encoding="SQL_ASCII")
    empty(conninfo)
    with psycopg.connect(conninfo, autocommit=True) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text, old text DEFAULT E'\\xe4', olds text[])")
        control.execute("ALTER TABLE item ALTER olds SET DEFAULT ARRAY['ü', E'\\xe4']".encode())

    with written(processor_of(form, conninfo, "item", ["v"]), [("ü",), ("€",)]) as rows:
        assert [row["v"] for row in rows] == ["ü", "€", "ü"]
        assert [(row["old"], row["olds"]) for row in rows] == [(b"\xe4", ["ü", b"\xe4"])] * 3


# The session's


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_session_of_every_encoding_gives_and_takes_str(databases: dict[str, str], form: str, encoding: str) -> None:
    own, (text, bad) = databases["UTF8"], TEXTS[encoding]
    conninfo = make_conninfo(own, client_encoding=encoding)
    empty(own)
    with control_of(own) as control:
        make = sql.SQL("CREATE TABLE {} (id bigserial PRIMARY KEY, {} text, j jsonb, a text[])")
        control.execute(make.format(sql.Identifier(f"t {text}"), sql.Identifier(text)))
    # In these a byte of a character may be a backslash, which psycopg's arrays do not know.
    listed = "x" if encoding in ("SJIS", "BIG5", "GBK") else text
    jobs = [(text, Json({"k": text}), [listed, None]), (None, None, None)]
    if bad:
        jobs.append((bad, None, None))

    with written(processor_of(form, conninfo, f'"t {text}"', [text, "j", "a"]), jobs) as rows:
        refused = [rows.pop(2)] if bad else []
        assert [(row[text], row["j"], row["a"]) for row in rows] == [
            (text, {"k": text}, [listed, None]),
            (None, None, None),
            (text, {"k": text}, [listed, None]),
        ]
        assert all(isinstance(error, UnicodeEncodeError) for error in refused)
        assert all(encoding in str(error) for error in refused)
    assert stored(own, f'SELECT "{text}" FROM "t {text}" ORDER BY id') == [text, None, text]
    assert stored(own, f'SELECT a FROM "t {text}" ORDER BY id') == [[listed, None], None, [listed, None]]


def test_what_the_table_says_of_itself_need_not_fit_into_the_session(databases: dict[str, str], form: str) -> None:
    own = databases["UTF8"]
    empty(own)
    with control_of(own) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text, \"表\" text DEFAULT '🐘')")
        control.execute("CREATE VIEW seen AS SELECT id, v FROM item")
    conninfo = make_conninfo(own, client_encoding="latin1")
    if form in ("keys", "rows"):
        way: Any = {"rows": "statement"}.get(form, form)
        processor = PostgresProcessor.insert_into(conninfo, "item", ["v"], returning=["v"], strategy=way)
    else:
        processor = processor_of(form, conninfo, "seen", ["v"])

    with written(processor, [("ä",), ("ö",)]) as rows:
        assert [row["v"] for row in rows] == ["ä", "ö", "ä"]
    assert stored(own, 'SELECT "表" FROM item') == ["🐘"] * 3


def test_a_name_that_the_session_cannot_write_is_named_with_its_encoding(databases: dict[str, str]) -> None:
    own = databases["UTF8"]
    empty(own)
    with control_of(own) as control:
        control.execute('CREATE TABLE "表" (id bigserial PRIMARY KEY, "€" text)')
        control.execute('CREATE TABLE item (id bigserial PRIMARY KEY, "€" text)')
    for table, columns in (('"表"', ["€"]), ("item", ["€"])):
        processor = PostgresProcessor.insert_into(make_conninfo(own, client_encoding="latin1"), table, columns)
        with pytest.raises(UnicodeEncodeError, match="LATIN1"):
            processor.open()
        processor.close()


def test_the_ledger_of_a_schema_outside_ASCII_is_written_in_every_encoding(databases: dict[str, str]) -> None:
    own = databases["UTF8"]
    empty(own)
    with control_of(own) as control:
        control.execute('DROP SCHEMA IF EXISTS "Bücher" CASCADE; CREATE SCHEMA "Bücher"; SET search_path = "Bücher"')
        control.execute(DDL.encode())
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text)")
    conninfo = make_conninfo(own, client_encoding="latin1", options='-csearch_path="Bücher"')
    processor = PostgresProcessor(conninfo, "INSERT INTO item (v) VALUES (%s) RETURNING v", commit_guard="ledger")
    try:
        assert processor.process(a_batch([("ü",)])) == [{"v": "ü"}]
        assert stored(own, 'SELECT batch FROM "Bücher".microbatch_ledger') == [1]
    finally:
        processor.close()
        with control_of(own) as control:
            control.execute('DROP SCHEMA "Bücher" CASCADE')


def test_an_error_of_the_server_is_readable(databases: dict[str, str], form: str) -> None:
    for conninfo in (databases["SQL_ASCII"], make_conninfo(databases["UTF8"], client_encoding="latin1")):
        empty(conninfo)
        with control_of(conninfo) as control:
            control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text CONSTRAINT \"größer\" CHECK (v > ''))")
        with written(processor_of(form, conninfo, "item", ["v"]), [("",), ("x",)]) as rows:
            assert "größer" in str(rows[0])
            assert rows[0].diag.constraint_name == "größer"


def test_a_batcher_of_our_own_connections_speaks_UTF8_unless_it_is_told_otherwise(
    databases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = databases["LATIN1"]
    assert _encoding(own) == "UTF8"
    assert _encoding(make_conninfo(own, client_encoding="latin1")) == "LATIN1"
    assert _encoding(make_conninfo(databases["UTF8"], options="-cclient_encoding=win1252")) == "WIN1252"
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN9")
    assert _encoding(databases["UTF8"]) == "LATIN9"


def _encoding(conninfo: str) -> str | None:
    with MicroBatcher(PostgresProcessor(conninfo, "SELECT current_setting('client_encoding') AS e")) as batcher:
        told: str = batcher.execute(())["e"]
    with psycopg.connect(**connection_parameters(conninfo)) as connection:
        assert connection.info.parameter_status("client_encoding") == told
    return told


# A session that changes


Change = Callable[[psycopg.Connection[Any]], Any]


@pytest.mark.parametrize(
    ("change", "type", "value"),
    [
        ("SET client_encoding = 'LATIN1'", "text", "Grüße"),
        ("SET client_encoding = 'SJIS'", "text", "表ソ能"),
        ("SET standard_conforming_strings = off", "bytea", b"\x00\\'"),
        ("SET standard_conforming_strings = off", "bytea[]", [b"\x00\\'", b"x"]),
    ],
)
def test_a_lent_session_may_change_between_two_batches(
    databases: dict[str, str], form: str, change: str, type: str, value: Any
) -> None:
    own = databases["UTF8"]
    empty(own)
    with psycopg.connect(own, autocommit=True) as lent, control_of(own) as control:
        control.execute(f"CREATE TABLE item (id bigserial PRIMARY KEY, v {type})".encode())
        processor = processor_of(form, lambda: contextlib.nullcontext(lent), "item", ["v"])
        for number, command in enumerate(("SELECT 1", change, "RESET ALL")):
            lent.execute(command.encode())
            rows = processor.process(a_batch([(value,), (value,)], f"b{number}"))
            assert [row["v"] for row in rows] == [value, value]
        assert [v for (v,) in control.execute("SELECT v FROM item")] == [value] * 6


def test_a_lent_session_may_change_how_it_writes_dates_and_intervals(databases: dict[str, str], form: str) -> None:
    own = databases["UTF8"]
    empty(own)
    day, span = dt.date(2026, 2, 1), dt.timedelta(days=-1, seconds=3600)
    styles = ("SET DateStyle = 'SQL, MDY'", "SET DateStyle = 'SQL, DMY'", "SET DateStyle = 'German'", "RESET DateStyle")
    with psycopg.connect(own, autocommit=True) as lent, control_of(own) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, d date, i interval)")
        processor = processor_of(form, lambda: contextlib.nullcontext(lent), "item", ["d", "i"])
        for number, style in enumerate(styles):
            lent.execute(style)
            rows = processor.process(a_batch([(day, None), (day, None)], f"d{number}"))
            assert [row["d"] for row in rows] == [day, day]
        for number, style in enumerate(("sql_standard", "iso_8601", "postgres_verbose", "postgres")):
            lent.execute(f"SET IntervalStyle = {style}".encode())
            processor.process(a_batch([(None, span), (None, span)], f"i{number}"))
        assert control.execute("SELECT count(*) FROM item WHERE d = %s", [day]).fetchone() == (8,)
        assert control.execute("SELECT count(*) FROM item WHERE i = %s", [span]).fetchone() == (8,)


@pytest.mark.parametrize("form", ["keys", "merge", "rows"])
def test_a_lent_session_on_another_search_path_writes_the_table_of_that_path(
    databases: dict[str, str], form: str
) -> None:
    own = databases["UTF8"]
    empty(own)
    with psycopg.connect(own, autocommit=True) as lent, control_of(own) as control:
        if control.info.server_version < 180000:
            pytest.skip("the search path is told since PostgreSQL 18")
        for tenant in ("one", "two"):
            control.execute(f"DROP SCHEMA IF EXISTS {tenant} CASCADE; CREATE SCHEMA {tenant}".encode())
            control.execute(f"CREATE TABLE {tenant}.item (id bigserial PRIMARY KEY, v text)".encode())
        processor = processor_of(form, lambda: contextlib.nullcontext(lent), "item", ["v"])
        for number, tenant in enumerate(("one", "two", "one")):
            lent.execute(f"SET search_path = {tenant}".encode())
            processor.process(a_batch([(tenant,), (tenant,)], f"b{number}"))
        for tenant, count in (("one", 4), ("two", 2)):
            assert control.execute(f"SELECT v, count(*) FROM {tenant}.item GROUP BY v".encode()).fetchall() == [
                (tenant, count)
            ]
            control.execute(f"DROP SCHEMA {tenant} CASCADE".encode())
