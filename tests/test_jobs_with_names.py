"""A job that has names is read by name, whatever it is and whatever it is written with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import psycopg
import pytest
from databases import empty
from psycopg.rows import class_row, dict_row, namedtuple_row

from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

INSERT = "INSERT INTO item (n, label) VALUES (%(n)s, %(label)s) RETURNING n, label"
BY_POSITION = "INSERT INTO item (n, label) VALUES (%s, %s) RETURNING n, label"


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE item (id bigserial PRIMARY KEY, n text, label text)")
    yield shared_database
    empty(shared_database)


FORMS: dict[str, Callable[[str], PostgresProcessor]] = {
    "keys": lambda dsn: PostgresProcessor.insert_into(
        dsn, "item", ["n", "label"], returning=["n", "label"], strategy="keys"
    ),
    "merge": lambda dsn: PostgresProcessor.insert_into(
        dsn, "item", ["n", "label"], returning=["n", "label"], strategy="merge"
    ),
    "rows": lambda dsn: PostgresProcessor.insert_into(
        dsn, "item", ["n", "label"], returning=["n", "label"], strategy="statement"
    ),
    "statement": lambda dsn: PostgresProcessor(dsn, INSERT),
    "portable": lambda dsn: PostgresProcessor(dsn, INSERT),
}


@pytest.fixture(params=FORMS)
def processor(request: pytest.FixtureRequest, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "portable":
        monkeypatch.setattr(writer, "is_supported", lambda connection: False)
    if request.param == "merge":
        with psycopg.connect(database) as connection:
            if connection.info.server_version < 170000:
                pytest.skip("MERGE … RETURNING came with PostgreSQL 17")
    with contextlib.closing(FORMS[request.param](database)) as processor:
        yield processor


def written(processor: PostgresProcessor, jobs: list[Any]) -> list[Any]:
    return processor.process(Batch(jobs, id="b"))


class Swapped(NamedTuple):
    """Its fields are not in the order of the columns."""

    label: str
    n: str


@dataclasses.dataclass
class SwappedClass:
    label: str
    n: str


class SwappedMapping(Mapping[str, str]):
    def __init__(self, label: str, n: str) -> None:
        self._fields = {"label": label, "n": n}

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class Keyed:
    """What `dict` takes: `keys` and items."""

    def __init__(self, label: str, n: str) -> None:
        self._fields = {"label": label, "n": n}

    def keys(self) -> Any:
        return self._fields.keys()

    def __getitem__(self, name: str) -> str:
        return self._fields[name]


def sqlite_row(label: str, n: str) -> sqlite3.Row:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        row: sqlite3.Row = connection.execute("SELECT ? AS label, ? AS n", (label, n)).fetchone()
        return row


def sqlalchemy_row(label: str, n: str) -> Any:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection:
        row = connection.execute(sqlalchemy.text("SELECT :label AS label, :n AS n"), {"label": label, "n": n}).one()
    engine.dispose()
    return row


def sqlalchemy_mapping(label: str, n: str) -> Any:
    return sqlalchemy_row(label, n)._mapping


def attrs_instance(label: str, n: str) -> Any:
    attrs = pytest.importorskip("attrs")
    return attrs.make_class("Swapped", ["label", "n"])(label, n)


KINDS: dict[str, Callable[[str, str], Any]] = {
    "typed named tuple": Swapped,
    "named tuple": namedtuple("Plain", ["label", "n"]),
    "dataclass": SwappedClass,
    "mapping": SwappedMapping,
    "keys and items": Keyed,
    "sqlite3.Row": sqlite_row,
    "SQLAlchemy Row": sqlalchemy_row,
    "SQLAlchemy RowMapping": sqlalchemy_mapping,
    "attrs": attrs_instance,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_with_names_is_read_by_name_in_every_form(processor: PostgresProcessor, kind: str) -> None:
    make = KINDS[kind]

    results = written(processor, [make("seven", "7"), {"label": "eight", "n": "8"}, make("nine", "9")])

    assert results == [
        {"n": "7", "label": "seven"},
        {"n": "8", "label": "eight"},
        {"n": "9", "label": "nine"},
    ]


@pytest.mark.parametrize("factory", [dict_row, namedtuple_row, class_row(SwappedClass)], ids=["dict", "tuple", "class"])
def test_a_row_of_psycopg_can_be_submitted_again(database: str, processor: PostgresProcessor, factory: Any) -> None:
    with psycopg.connect(database) as connection, connection.cursor(row_factory=factory) as cursor:
        row = cursor.execute("SELECT 'seven' AS label, '7' AS n").fetchone()

    assert written(processor, [row]) == [{"n": "7", "label": "seven"}]


def test_what_a_job_holds_besides_the_columns_is_left_alone(processor: PostgresProcessor) -> None:
    wide = namedtuple("wide", ["extra", "label", "n"])

    results = written(processor, [wide("x", "seven", "7"), {"n": "8", "extra": None, "label": "eight"}])

    assert results == [{"n": "7", "label": "seven"}, {"n": "8", "label": "eight"}]


@pytest.mark.parametrize("job", [namedtuple("narrow", ["n", "name"])("1", "x"), {"n": "1"}], ids=["tuple", "dict"])
def test_a_field_that_is_missing_is_named_and_fails_its_job_alone(processor: PostgresProcessor, job: Any) -> None:
    good, bad = written(processor, [Swapped("seven", "7"), job])

    assert good == {"n": "7", "label": "seven"}
    assert isinstance(bad, psycopg.ProgrammingError)
    assert "label" in str(bad)


def test_two_fields_of_one_name_are_refused(processor: PostgresProcessor) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        row = connection.execute("SELECT 'a' AS label, '1' AS n, '2' AS n").fetchone()

    good, bad = written(processor, [{"n": "7", "label": "seven"}, row])

    assert good == {"n": "7", "label": "seven"}
    assert isinstance(bad, ValueError)
    assert "two fields named 'n'" in str(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_without_names_take_no_job_with_names(database: str, kind: str) -> None:
    """They would take its fields by position, and no name would say whether that is the wanted order."""
    with contextlib.closing(PostgresProcessor(database, BY_POSITION)) as processor:
        good, bad = written(processor, [("7", "seven"), KINDS[kind]("8", "eight")])

    assert good == {"n": "7", "label": "seven"}
    assert isinstance(bad, TypeError)
    assert "write %(name)s in the statement" in str(bad)


@pytest.mark.parametrize("nothing", [{}, namedtuple("Nothing", [])(), dataclasses.make_dataclass("Empty", [])()])
@pytest.mark.parametrize("statement", [INSERT, BY_POSITION])
@pytest.mark.parametrize("way", ["flights", "portable"])
def test_a_job_with_no_names_at_all_fails_alone(
    database: str, nothing: Any, statement: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "portable":
        monkeypatch.setattr(writer, "is_supported", lambda connection: False)
    job = {"n": "7", "label": "seven"} if statement == INSERT else ("7", "seven")

    with contextlib.closing(PostgresProcessor(database, statement)) as processor:
        good, bad, last = written(processor, [job, nothing, job])

    assert good == last == {"n": "7", "label": "seven"}
    assert isinstance(bad, psycopg.ProgrammingError if statement == INSERT else TypeError)


def test_a_job_without_values_suits_a_statement_without_placeholders(database: str) -> None:
    with contextlib.closing(PostgresProcessor(database, "SELECT 1 AS one")) as processor:
        assert written(processor, [{}, (), []]) == [{"one": 1}] * 3


def test_a_tuple_and_a_list_go_by_position(database: str) -> None:
    with contextlib.closing(PostgresProcessor(database, BY_POSITION)) as processor:
        assert written(processor, [("7", "seven"), ["8", "eight"]]) == [
            {"n": "7", "label": "seven"},
            {"n": "8", "label": "eight"},
        ]
    with contextlib.closing(FORMS["keys"](database)) as processor:
        good, long = written(processor, [("7", "seven"), ("8", "eight", "more")])

    assert good == {"n": "7", "label": "seven"}
    assert "the job has 3 values for 2 columns: n, label" in str(long)


# A job's own code


class Lazy(SwappedMapping):
    """Its values are made when they are read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("lazy", "0")
        self._error = error

    def __getitem__(self, name: str) -> str:
        raise self._error


class Unreadable:
    def keys(self) -> Any:
        raise asyncio.CancelledError

    def __getitem__(self, name: str) -> str:
        raise LookupError(name)


class OfItsOwn(BaseException):
    """Like the timeouts of gevent and of others."""


ERRORS = [ValueError("x"), asyncio.CancelledError(), SystemExit(1), GeneratorExit(), KeyboardInterrupt(), OfItsOwn()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_P3_a_payload_that_raises_anything_when_it_is_read_fails_alone(
    processor: PostgresProcessor, error: BaseException
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    jobs = [Swapped("seven", "7"), Lazy(error), Unreadable(), Swapped("eight", "8")]
    # As in a batcher: on a thread to which no Ctrl-C goes.
    with ThreadPoolExecutor(1) as pool:
        first, bad, unreadable, last = pool.submit(written, processor, jobs).result()

    assert (first["n"], last["n"]) == ("7", "8")
    assert bad is error
    assert isinstance(unreadable, asyncio.CancelledError)


def test_a_ctrl_c_while_a_payload_is_read_is_no_jobs_error(processor: PostgresProcessor) -> None:
    with pytest.raises(KeyboardInterrupt):
        written(processor, [Swapped("seven", "7"), Lazy(KeyboardInterrupt())])


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("x")], ids=lambda error: type(error).__name__)
def test_P3_a_sort_key_that_raises_or_does_not_compare_fails_no_neighbour(database: str, error: BaseException) -> None:
    class Incomparable:
        def __lt__(self, other: object) -> bool:
            raise error

        def __repr__(self) -> str:
            raise error

    def raising(job: Any) -> Any:
        raise error

    for sort_key in (raising, lambda job: Incomparable()):
        processor = PostgresProcessor.insert_into(database, "item", ["n", "label"], sort_key=sort_key)
        with contextlib.closing(processor):
            results = written(processor, [Swapped("seven", "7"), Swapped("eight", "8")])
        assert [row["n"] for row in results] == ["7", "8"]
