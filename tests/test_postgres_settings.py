"""What is stored does not depend on a session's settings, nor on whether a job is written alone or in a batch."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg.conninfo import make_conninfo
from psycopg.types.range import Range

from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.transaction import Attempt
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

Make = Callable[..., PostgresProcessor]
WAYS = ("keys", "merge", "statement")


@pytest.fixture
def control(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    """A session with the server's own settings."""
    with psycopg.connect(shared_database, autocommit=True) as connection:
        yield connection
    empty(shared_database)


@pytest.fixture
def make(shared_database: str) -> Iterator[Make]:
    """Builds processors for column `v` of `item`, in sessions with *settings*."""
    with contextlib.ExitStack() as stack:

        def build(way: str, settings: str = "", **options: Any) -> PostgresProcessor:
            conninfo = make_conninfo(shared_database, options=settings)
            processor = PostgresProcessor.insert_into(conninfo, "item", ["v"], strategy=way, **options)  # type: ignore[arg-type]
            stack.callback(processor.close)
            return processor

        yield build


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, control: psycopg.Connection[Any]) -> str:
    if request.param == "merge" and control.info.server_version < 170000:
        pytest.skip("MERGE … RETURNING needs PostgreSQL 17")
    return str(request.param)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is taken apart fails: its rows would be written one by one, and right for another reason."""

    def isolated(self: Any, positions: Any, failed: Any) -> Any:
        raise AssertionError(f"taken apart: {positions}")

    monkeypatch.setattr(Attempt, "_isolated", isolated)


def a_batch(values: list[Any], id: str = "b1") -> Batch[Any]:
    return Batch([(value,) for value in values], id=id)


def table(control: psycopg.Connection[Any], type: str, ddl: str = "") -> None:
    control.execute(f"{ddl}; CREATE TABLE item (id bigserial PRIMARY KEY, v {type})".encode())


def stored(control: psycopg.Connection[Any]) -> list[Any]:
    return [value for (value,) in control.execute("SELECT v::text FROM item ORDER BY id").fetchall()]


def states(results: list[Any]) -> list[Any]:
    return [getattr(result, "sqlstate", None) for result in results]


# Modifiers

DOMAINS = """
    CREATE DOMAIN code AS varchar(3); CREATE DOMAIN deeper AS code; CREATE DOMAIN fixed AS char(2);
    CREATE DOMAIN flags AS bit(3); CREATE DOMAIN some_flags AS varbit(3); CREATE DOMAIN price AS numeric(4, 2);
    CREATE DOMAIN codes AS varchar(3)[]; CREATE DOMAIN required AS varchar(3) NOT NULL;
    CREATE TYPE pair AS (a int, b varchar(3)); CREATE TYPE pair_of_domains AS (a code, b price);
    CREATE DOMAIN some_pair AS pair"""
# The value that fits, the one that does not, and what the server says.
LENGTHS: dict[str, tuple[Any, Any, str]] = {
    "varchar(3)": ("abc", "abcd", "22001"),
    "char(3)": ("ab", "abcd", "22001"),
    "bit(3)": ("101", "1010", "22026"),
    "varbit(3)": ("101", "1010", "22001"),
    "numeric(4,2)": ("99.994", "99.995", "22003"),
    "varchar(3)[]": (["abc", None], ["abcd"], "22001"),
    "bit(3)[]": (["101"], ["1010"], "22026"),
    "char(3)[]": (["ab"], ["abcd"], "22001"),
    "code": ("abc", "abcd", "22001"),
    "deeper": ("abc", "abcd", "22001"),
    "fixed": ("a", "abc", "22001"),
    "flags": ("101", "1010", "22026"),
    "some_flags": ("10", "1010", "22001"),
    "price": ("1.235", "100", "22003"),
    "code[]": (["abc", None, 'a"\\'], ["abcd"], "22001"),
    "flags[]": (["101"], ["1010"], "22026"),
    "codes": (["abc", None], ["abcd"], "22001"),
    "required": ("abc", None, "23502"),
    "pair": ("(1,abc)", "(1,abcd)", "22001"),
    "pair[]": (['(1,"a b")'], ["(1,abcd)"], "22001"),
    "pair_of_domains": ("(abc,1.234)", "(abcd,1)", "22001"),
    "some_pair": ("(1,abc)", "(1,abcd)", "22001"),
}


@pytest.mark.parametrize("type", LENGTHS)
def test_P3_what_is_too_long_for_its_type_is_refused_in_a_batch_as_alone(
    make: Make, control: psycopg.Connection[Any], way: str, type: str
) -> None:
    table(control, type, DOMAINS)
    good, bad, state = LENGTHS[type]
    processor = make(way)

    assert states(processor.process(a_batch([bad], "alone"))) == [state]
    assert states(processor.process(a_batch([good, bad, good], "together"))) == [None, state, None]

    processor.process(a_batch([good], "good"))
    texts = stored(control)
    assert len(texts) == 3
    assert len(set(texts)) == 1


# The input function of the type, and nothing else

READ: dict[str, list[Any]] = {
    "hours": ["5", "1 day", None],  # with its modifier 5 is hours, without it seconds
    "interval hour": ["5", "5 hours", None],
    "regclass": ["1259", "pg_class", "item", None],  # the cast from text takes 1259 for a name
    "upper": ["a", "NULL", 'q"uote\\', "", None],
    "upper[]": [["a", None], None],
    "name": ["x" * 70, None],
    '"char"': ["a", "", None],
    "box": ["(1,2),(3,4)", None],
    "box[]": ["{(1,2),(3,4);(5,6),(7,8)}", None],
    "mood": ["ok", "NULL", None],
    "int4range": ["[1,2]", None],
    "int2vector": ["1 2", None],
}
TYPES = """
    CREATE DOMAIN hours AS interval hour; CREATE TYPE mood AS ENUM ('ok', 'NULL'); CREATE TYPE upper;
    CREATE FUNCTION upper_in(cstring) RETURNS upper LANGUAGE internal IMMUTABLE STRICT AS 'textin';
    CREATE FUNCTION upper_out(upper) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
    CREATE TYPE upper (INPUT = upper_in, OUTPUT = upper_out, LIKE = text);
    CREATE FUNCTION to_upper(text) RETURNS upper LANGUAGE internal IMMUTABLE STRICT AS 'upper';
    CREATE CAST (text AS upper) WITH FUNCTION to_upper(text)"""


@pytest.mark.parametrize("type", READ)
@pytest.mark.usefixtures("together")
def test_a_type_reads_text_by_its_input_function_in_a_batch_as_alone(
    make: Make, control: psycopg.Connection[Any], way: str, type: str
) -> None:
    table(control, type, TYPES)
    processor = make(way, returning=["id"])
    for number, value in enumerate(READ[type]):
        processor.process(a_batch([value], f"alone {number}"))
    alone = stored(control)
    control.execute("TRUNCATE item")

    assert states(processor.process(a_batch(READ[type], "together"))) == [None] * len(READ[type])
    assert stored(control) == alone


# Settings

DATA = [b"\x00\xff\\it's", bytearray(b"\\\\"), memoryview(b"'\0"), b""]


@pytest.mark.parametrize("setting", ["-cstandard_conforming_strings=off", "-cbytea_output=escape"])
@pytest.mark.parametrize("type", ["bytea", "bytea[]", "file"])
@pytest.mark.usefixtures("together")
def test_bytes_are_the_same_under_every_setting(
    make: Make, control: psycopg.Connection[Any], way: str, type: str, setting: str
) -> None:
    table(control, type, "CREATE TYPE file AS (name text, data bytea)")
    wrapped = {"bytea": lambda data: data, "bytea[]": lambda data: [data], "file": lambda data: ("x", data)}[type]
    processor = make(way, f"{setting} -cescape_string_warning=off")

    rows = processor.process(a_batch([*map(wrapped, DATA)])) + processor.process(a_batch([wrapped(DATA[0])], "alone"))

    path = {"bytea": "v", "bytea[]": "v[1]", "file": "(v).data"}[type]
    query = f"SELECT {path} FROM item ORDER BY id".encode()
    assert [value for (value,) in control.execute(query)] == [*map(bytes, DATA), DATA[0]]
    if type != "file":
        assert [row["v"] for row in rows] == [*(wrapped(bytes(data)) for data in DATA), wrapped(DATA[0])]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("type", ["text", "mood", "integer", "code", "timestamptz", "text[]", "jsonb", '"char"'])
def test_NULL_is_no_word_where_arrays_have_no_NULL(
    make: Make, control: psycopg.Connection[Any], way: str, type: str
) -> None:
    table(control, type, "CREATE TYPE mood AS ENUM ('ok', 'NULL'); CREATE DOMAIN code AS varchar(9)")
    words = ["NULL", None, "null"] if type in ("text", "code") else [None, None]

    rows = make(way, "-carray_nulls=off").process(a_batch(words))

    assert [row["v"] for row in rows] == words
    assert stored(control) == words


@pytest.mark.usefixtures("together")
def test_a_type_of_the_same_name_elsewhere_is_not_taken(make: Make, control: psycopg.Connection[Any], way: str) -> None:
    control.execute("CREATE DOMAIN int4 AS pg_catalog.int4 CHECK (VALUE > 5); CREATE DOMAIN text AS varchar(2)")
    control.execute("CREATE FUNCTION unnest(anyarray) RETURNS SETOF int LANGUAGE sql AS 'SELECT 7'")
    table(control, "pg_catalog.int4")
    processor = make(way, "-csearch_path=public,pg_catalog")

    assert [row["v"] for row in processor.process(a_batch([1, 2, 3000]))] == [1, 2, 3000]
    assert stored(control) == ["1", "2", "3000"]


@pytest.mark.parametrize(
    "settings",
    [
        "-cstandard_conforming_strings=off -cescape_string_warning=off",
        "-csearch_path=evil,public,pg_catalog",
        "-cDateStyle=German -cIntervalStyle=sql_standard -cbytea_output=escape -carray_nulls=off",
        "-cclient_encoding=latin1 -cTimeZone=Asia/Karachi -cextra_float_digits=-15",
    ],
)
def test_a_table_is_looked_at_and_written_alike_under_every_setting(
    make: Make, control: psycopg.Connection[Any], settings: str
) -> None:
    control.execute("DROP SCHEMA IF EXISTS evil CASCADE; CREATE SCHEMA evil")
    for name in ("text", "oid", "regclass", "regtype", "int4", "int8", "numeric", "uuid", "name"):
        control.execute(f"CREATE DOMAIN evil.{name} AS pg_catalog.text CHECK (VALUE = 'evil')".encode())
    table(control, "code", "CREATE DOMAIN code AS varchar(9)")
    control.execute(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM 1; RETURN NULL; END$$;"
        "CREATE TRIGGER t AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION f()"
    )
    processor = make("auto", settings)
    plain = make("auto")

    assert [row["v"] for row in processor.process(a_batch(["a", None, "c"]))] == ["a", None, "c"]
    plain.process(a_batch(["d"]))

    assert processor.plan == plain.plan
    assert stored(control) == ["a", None, "c", "d"]
    control.execute("DROP SCHEMA evil CASCADE")


def test_operators_that_an_extension_brings_do_not_disturb(
    make: Make, control: psycopg.Connection[Any], way: str
) -> None:
    """As intarray does, whose operators are for arrays of integers."""
    control.execute(
        "CREATE FUNCTION has(int[], int[]) RETURNS bool LANGUAGE sql AS 'SELECT false';"
        "CREATE OPERATOR @> (LEFTARG = int[], RIGHTARG = int[], FUNCTION = has);"
        "CREATE OPERATOR <@ (LEFTARG = int[], RIGHTARG = int[], FUNCTION = has)"
    )
    table(control, "int")

    assert states(make(way).process(a_batch([1, None]))) == [None, None]


# Instants

NOON = dt.datetime(2026, 7, 1, 12, tzinfo=dt.timezone.utc)
INSTANTS: dict[str, Any] = {
    "timestamp": NOON,
    "timestamp(0)": NOON.replace(month=12, microsecond=600_000),
    "date": NOON.replace(hour=23),
    "time": NOON,
    "timestamptz": NOON,
    "local": NOON,
    "timestamp[]": [NOON, None, NOON.replace(month=12)],
    "text": NOON.replace(tzinfo=None),
}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Karachi", "America/New_York"])
@pytest.mark.parametrize("type", INSTANTS)
@pytest.mark.usefixtures("together")
def test_an_instant_is_the_same_as_in_any_statement(
    make: Make, control: psycopg.Connection[Any], shared_database: str, way: str, type: str, zone: str
) -> None:
    table(control, type, "CREATE DOMAIN local AS timestamp(0)")
    conninfo = make_conninfo(shared_database, options=f"-cTimeZone={zone}")
    with psycopg.connect(conninfo, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO item (v) VALUES (%s)", [(INSTANTS[type],)])
    processor = make(way, f"-cTimeZone={zone}")

    processor.process(a_batch([INSTANTS[type]] * 2))
    processor.process(a_batch([INSTANTS[type]], "alone"))

    texts = stored(control)
    assert len(texts) == 4
    assert len(set(texts)) == 1


def test_P3_an_instant_that_has_no_local_time_fails_its_job_and_names_the_column(
    make: Make, control: psycopg.Connection[Any], way: str
) -> None:
    table(control, "timestamp")
    processor = make(way, "-cTimeZone=<ABC>-3:30")

    first, error, last = processor.process(a_batch([NOON.replace(tzinfo=None), NOON, "2026-07-01 12:00"]))

    assert isinstance(error, psycopg.DataError)
    assert processor.column_of(error) == "v"
    assert first["v"] == last["v"] == NOON.replace(tzinfo=None)
    control.execute("DROP TABLE item")
    table(control, "tsrange")
    (error,) = make(way).process(a_batch([Range(NOON, None)]))
    assert isinstance(error, psycopg.DataError)
    assert stored(control) == []
