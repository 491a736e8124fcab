"""An error says which column it is about: to `column_of`, in a note, and in its text."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg import sql

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.processors.postgres.columns import at, column_of, said
from microbatch.protocols import Batch

TABLE = """
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE DOMAIN word AS varchar(4);
    CREATE DOMAIN even AS int CHECK (VALUE % 2 = 0);
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE item (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        name text NOT NULL, code varchar(3), "Other" varchar(3), fixed char(2), bits bit(3), amount numeric(5, 2),
        price numeric(5, 2), n int CONSTRAINT not_seven CHECK (n <> 7), at timestamptz, mood mood, data jsonb,
        tags int[], codes varchar(3)[], u text UNIQUE, parent int REFERENCES parent, word word, even even, far int,
        CONSTRAINT two_columns CHECK (n < far)
    )"""
COLUMNS = ["far", "even", "word", "parent", "u", "codes", "tags", "data", "mood", "at", "n"]
COLUMNS += ["price", "amount", "bits", "fixed", "Other", "code", "name"]
GOOD: dict[str, Any] = dict.fromkeys(COLUMNS) | {"name": "good"}


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(TABLE)
    yield shared_database
    empty(shared_database)


def statement() -> sql.Composed:
    return sql.SQL("INSERT INTO item ({}) VALUES ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, COLUMNS)), sql.SQL(", ").join(map(sql.Placeholder, COLUMNS))
    )


@pytest.fixture(params=["keys", "merge", "statement", "placeholders"])
def processor(request: pytest.FixtureRequest, database: str) -> Iterator[PostgresProcessor]:
    if request.param == "placeholders":
        built = PostgresProcessor(database, statement())
    else:
        with psycopg.connect(database) as connection:
            if request.param == "merge" and connection.info.server_version < 170000:
                pytest.skip("MERGE … RETURNING came with PostgreSQL 17")
        built = PostgresProcessor.insert_into(database, "item", COLUMNS, strategy=request.param)
    with contextlib.closing(built):
        yield built


# Column, value, whether a statement's error tells it too: it knows no table.
REFUSED: list[tuple[str, Any, bool]] = [
    ("amount", "1,5", True),
    ("price", "much", True),
    ("n", "seven", True),
    ("n", 2**40, False),
    ("at", "yesterday afternoon", True),
    ("mood", "so-so", True),
    ("data", "{oops", True),
    ("data", '{"a":\n oops', True),
    ("tags", "{1,x}", True),
    ("name", None, True),
    ("code", "abcd", False),
    ("Other", "äöüß", False),
    ("fixed", "abc", False),
    ("bits", "1111", False),
    ("codes", ["abc", "abcd"], False),
    ("amount", 1000, False),
    ("price", "-999.996", False),
    ("n", 7, False),
    ("parent", 99, True),
    ("u", "taken", True),
    ("word", "abcde", False),
    ("even", 3, False),
    # What cannot be sent at all.
    ("name", "a\0b", True),
    ("amount", object(), True),
    ("u", "\ud800", True),
    ("tags", [1, {}], True),
]


@pytest.mark.database
@pytest.mark.parametrize(("column", "value", "by_statement"), REFUSED, ids=lambda value: repr(value)[:12])
def test_an_error_names_its_column(
    database: str, processor: PostgresProcessor, column: str, value: Any, by_statement: bool
) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("INSERT INTO item (name, u) VALUES ('first', 'taken')")
    bad = GOOD | {column: value}

    alone = processor.process(Batch([bad], id="1"))[0]
    first, among, last = processor.process(Batch([GOOD, bad, GOOD], id="2"))

    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)
    is_table = processor.plan is not None
    for error in (alone, among):
        assert isinstance(error, Exception)
        if not is_table and not by_statement:
            assert processor.column_of(error) in (None, column)
            continue
        assert processor.column_of(error) == column
        assert f"column: {column}" in error.__notes__  # type: ignore[attr-defined]
        assert column in str(error)


@pytest.mark.database
def test_a_job_without_a_column_names_it(processor: PostgresProcessor) -> None:
    job = {name: value for name, value in GOOD.items() if name != "amount"}

    (error,) = processor.process(Batch([job], id="1"))

    assert processor.column_of(error) == "amount"


@pytest.mark.database
def test_what_a_job_raises_itself_keeps_its_words(database: str) -> None:
    class Lazy(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name == "amount":
                raise ValueError("its own words")
            return super().__getitem__(name)

    with contextlib.closing(PostgresProcessor(database, statement())) as processor:
        (error,) = processor.process(Batch([Lazy(GOOD)], id="1"))

    assert str(error) == "its own words"
    assert processor.column_of(error) == "amount"


@pytest.mark.database
def test_where_nothing_tells_it_no_column_is_named(processor: PostgresProcessor) -> None:
    """A constraint on two columns, and what is no column's fault."""
    (error,) = processor.process(Batch([GOOD | {"n": 5, "far": 4}], id="1"))

    assert isinstance(error, psycopg.errors.CheckViolation)
    assert processor.column_of(error) is None
    assert not hasattr(error, "__notes__")
    assert processor.column_of(ValueError("x")) is None


@pytest.mark.database
def test_a_batch_that_fails_as_a_whole_names_the_column_of_its_bad_job(database: str) -> None:
    processor = PostgresProcessor.insert_into(database, "item", COLUMNS, on_job_error="fail_batch")

    with contextlib.closing(processor):
        good, bad = processor.process(Batch([GOOD, GOOD | {"code": "abcd"}], id="1"))

    assert processor.column_of(bad) == "code"
    assert processor.column_of(good) is None


@pytest.mark.database
def test_an_id_that_is_always_generated_names_the_option(database: str) -> None:
    for strategy in ("auto", "statement"):
        processor = PostgresProcessor.insert_into(database, "item", ["id", "name"], strategy=strategy)  # type: ignore[arg-type]
        with contextlib.closing(processor):
            for jobs in ([(1, "a")], [(1, "a"), (2, "b")]):
                for error in processor.process(Batch(jobs, id="1")):
                    assert isinstance(error, psycopg.errors.GeneratedAlways)
                    assert processor.column_of(error) == "id"
                    assert "overriding='system'" in str(error)


@pytest.mark.database
def test_the_value_behind_a_parameter_s_number_is_no_part_of_the_name(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        name = connection.info.dbname
        change = sql.SQL("ALTER DATABASE {} SET log_parameter_max_length_on_error = -1")
        connection.execute(change.format(sql.Identifier(name)))
    try:
        processor = PostgresProcessor.insert_into(database, "item", COLUMNS)
        with contextlib.closing(processor):
            errors = processor.process(Batch([GOOD | {"amount": "x\n$1 = 'y'"}, GOOD | {"code": "it's $2"}], id="1"))
        assert [processor.column_of(error) for error in errors] == ["amount", "code"]
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(name)))


@pytest.mark.database
def test_the_portable_way_names_what_the_server_names(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "is_supported", lambda connection: False)

    with contextlib.closing(PostgresProcessor(database, statement())) as processor:
        good, null, short = processor.process(Batch([GOOD, GOOD | {"name": None}, GOOD | {"amount": "1,5"}], id="1"))

    assert good is None
    assert processor.column_of(null) == "name"
    assert processor.column_of(short) == "amount"


@pytest.mark.database
def test_the_future_s_own_error_has_it(database: str) -> None:
    processor = PostgresProcessor.insert_into(database, "item", COLUMNS)

    with MicroBatcher(processor, delivery_timeout=10) as batcher:
        error = batcher.submit(GOOD | {"amount": "1,5"}).exception()

    assert error is not None
    assert processor.column_of(error) == processor.column_of(copy.copy(error)) == "amount"


# What the server's words tell


def failure(sqlstate: str, **fields: Any) -> Any:
    names = ("column_name", "context", "message_detail", "constraint_name")
    return SimpleNamespace(sqlstate=sqlstate, diag=SimpleNamespace(**(dict.fromkeys(names) | fields)))


@pytest.mark.parametrize(
    ("context", "column"),
    [
        ("unnamed portal parameter $2", "b"),
        ("unnamed portal parameter $2 = '...'", "b"),
        ("unnamed portal parameter $2 = 'it''s $1\nlonger'", "b"),
        ('portal "c" parameter $2', None),
        ("JSON data, line 1: {oops...\nunnamed portal parameter $2", "b"),
        ("параметр неименованного портала $2", "b"),
        ("paramètre du portail non nommé $2 = « x »", None),
        ("unnamed portal parameter $9", None),
        ("unnamed portal with parameters: $1 = '1', $2 = '2'", None),
        ('SQL statement "UPDATE t SET a = $1"\nPL/pgSQL function f() line 1 at SQL statement', None),
        ('PL/pgSQL assignment "x := $1"', None),
        ("", None),
        (None, None),
    ],
)
def test_a_parameter_is_known_by_its_number_in_the_last_line(context: str | None, column: str | None) -> None:
    assert said(failure("22P02", context=context), ["a", "b"]) == column


@pytest.mark.parametrize(
    ("sqlstate", "detail", "column"),
    [
        ("23505", "Key (n)=(5) already exists.", "n"),
        ("23505", "Schlüssel »(n)=(5)« existiert bereits.", "n"),
        ("23505", 'Key ("Odd ""one""")=(x) already exists.', 'Odd "one"'),
        ("23505", "Key (a, b)=(1, 2) already exists.", None),
        ("23505", "Key (lower(n))=(x) already exists.", None),
        ("23514", "Partition key of the failing row contains (n) = (999).", "n"),
        ("22P02", "Key (n)=(5)", None),
        ("23505", None, None),
    ],
)
def test_a_key_is_known_by_its_detail(sqlstate: str, detail: str | None, column: str | None) -> None:
    assert said(failure(sqlstate, message_detail=detail), []) == column


def test_the_row_in_a_check_s_detail_is_not_taken_for_a_name() -> None:
    error = failure("23514", message_detail="Failing row contains (secret)=(x).", constraint_name="c")

    assert said(error, []) is None


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(name)


class Rude(Exception):
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


@pytest.mark.parametrize("kind", [Frozen, Rude])
def test_an_exception_that_takes_no_note_stays_as_it_is(kind: type[Exception]) -> None:
    error = kind("x")

    assert at(error, "n") is error
    assert column_of(error) is None
    assert str(error) == "x"


def test_a_note_is_made_once() -> None:
    error = at(at(ValueError("x"), "n"), "m")

    assert (error.__notes__, str(error), column_of(error)) == (["column: n"], "x (column n)", "n")  # type: ignore[attr-defined]
