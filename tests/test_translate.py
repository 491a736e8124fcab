"""The private pieces of psycopg, and the way without them."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Once, Proxy, is_committed
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from microbatch.processors.postgres import BatchRolledBack, CommitUnknown, PostgresProcessor, translate, writer
from microbatch.processors.postgres.translate import Reader, bind_jobs, is_supported
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

INSERT = "INSERT INTO item (n, label) VALUES (%(n)s, %(label)s) RETURNING *"
VALUES = [
    None,
    True,
    7,
    2**40,
    2**80,
    1.5,
    decimal.Decimal("1.10"),
    "text",
    b"bytes\0",
    datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
    datetime.timedelta(days=1),
    uuid.UUID(int=5),
    Jsonb({"a": [1, None]}),
    [1, 2, None],
    ["a", "b"],
]


@pytest.fixture
def connection(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE item (id serial, n integer UNIQUE NOT NULL, label text)")
        yield connection
    empty(shared_database)


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "is_supported", lambda connection: False)


def a_batch(jobs: list[Any], id: str = "b1", attempt: int = 1) -> Batch[Any]:
    return Batch(jobs, id=id, attempt=attempt)


def items(*numbers: int) -> list[dict[str, Any]]:
    return [{"n": number, "label": f"item {number}"} for number in numbers]


def stored(connection: psycopg.Connection[Any]) -> list[int]:
    return [n for (n,) in connection.execute("SELECT n FROM item ORDER BY n").fetchall()]


# The pieces


def test_this_psycopg_has_the_private_pieces_where_they_are_looked_for(connection: psycopg.Connection[Any]) -> None:
    """If this fails, psycopg has moved them, and everybody is on the slower, portable way: see translate.py."""
    assert is_supported(connection)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_goes_and_comes_as_through_a_cursor(connection: psycopg.Connection[Any], value: Any) -> None:
    statement = "SELECT %(value)s AS value, 'x' AS \"Ö\""
    (bound,) = bind_jobs(connection, statement, [{"value": value}])
    assert not isinstance(bound, Exception)
    result = connection.pgconn.exec_params(
        bound.command, bound.parameters, param_types=bound.types, param_formats=bound.formats
    )

    with connection.cursor(row_factory=dict_row) as cursor:
        expected = cursor.execute(statement, {"value": value}).fetchall()

    assert Reader(connection).rows(result) == expected


def test_jobs_of_different_types_keep_their_own(connection: psycopg.Connection[Any]) -> None:
    jobs = [{"v": 1}, {"v": "a"}, {"v": object()}, {"v": 2**80}, {}, {"v": 2}]

    first, text, refused, numeric, missing, last = bind_jobs(connection, "SELECT %(v)s", jobs)

    assert isinstance(refused, psycopg.ProgrammingError)
    assert isinstance(missing, psycopg.ProgrammingError)
    assert [(bound.command, *bound.parameters) for bound in (first, text, numeric, last)] == [  # type: ignore[union-attr]
        (b"SELECT $1", first.parameters[0]),  # type: ignore[union-attr]
        (b"SELECT $1", b"a"),
        (b"SELECT $1", numeric.parameters[0]),  # type: ignore[union-attr]
        (b"SELECT $1", last.parameters[0]),  # type: ignore[union-attr]
    ]
    assert first.types == last.types != numeric.types  # type: ignore[union-attr]


@pytest.mark.parametrize("name", translate._QUERY_NEEDS)
def test_a_query_class_without_a_piece_is_noticed(
    connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    others = {other: None for other in translate._QUERY_NEEDS if other != name}
    monkeypatch.setattr(translate, "PostgresQuery", type("PostgresQuery", (), others))

    assert not is_supported(connection)


def test_a_missing_query_class_and_a_changed_transformer_are_noticed(
    connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(translate, "PostgresQuery", None)
        assert not is_supported(connection)
    monkeypatch.setattr(translate, "Transformer", object)
    assert not is_supported(connection)


@pytest.mark.parametrize("factory", [psycopg.ClientCursor, psycopg.RawCursor])
def test_a_connection_whose_cursors_bind_otherwise_takes_the_portable_way(
    shared_database: str, connection: psycopg.Connection[Any], factory: Any
) -> None:
    with psycopg.connect(shared_database, cursor_factory=factory) as other:
        assert not is_supported(other)

        statement = INSERT if factory is psycopg.ClientCursor else "INSERT INTO item (n) VALUES ($1) RETURNING n"
        jobs: list[Any] = items(1, 2) if factory is psycopg.ClientCursor else [(1,), (2,)]
        results = PostgresProcessor(lambda: contextlib.nullcontext(other), statement).process(a_batch(jobs))

    assert [row["n"] for row in results] == stored(connection) == [1, 2]


# The way without them


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("autocommit", [False, True])
def test_P3_the_portable_way_fails_bad_jobs_alone(
    shared_database: str, connection: psycopg.Connection[Any], autocommit: bool
) -> None:
    connection.execute("ALTER TABLE item ADD UNIQUE (label) DEFERRABLE INITIALLY DEFERRED")
    jobs = [
        *items(1, 2),
        {"n": None, "label": "not null"},
        {"n": 1, "label": "unique"},
        {"n": 3, "label": "item 2"},
        {"n": 4, "label": "\0"},
        {"n": 5, "label": "\ud800"},
        {"n": 6, "label": object()},
        {"n": 7},
        "text",
        *items(8),
    ]
    with psycopg.connect(shared_database, autocommit=autocommit) as other:
        results = PostgresProcessor(lambda: contextlib.nullcontext(other), INSERT).process(a_batch(jobs))

    codes = [getattr(result, "sqlstate", type(result)) for result in results[2:-1]]
    assert [results[0]["n"], results[1]["n"], results[-1]["n"]] == stored(connection) == [1, 2, 8]
    assert codes == ["23502", "23505", "23505", None, UnicodeEncodeError, None, None, TypeError]


@pytest.mark.usefixtures("portable")
def test_P3_the_portable_way_fails_a_whole_batch_where_that_is_wanted(
    shared_database: str, connection: psycopg.Connection[Any]
) -> None:
    processor = PostgresProcessor(shared_database, INSERT, on_job_error="fail_batch")

    first, culprit, last = processor.process(a_batch([*items(1), {"n": None, "label": ""}, *items(2)]))
    processor.close()

    assert isinstance(culprit, psycopg.errors.NotNullViolation)
    assert isinstance(first, BatchRolledBack)
    assert isinstance(last, BatchRolledBack)
    assert stored(connection) == []


@pytest.mark.usefixtures("portable")
def test_P4_the_portable_way_does_not_pretend_to_know(
    shared_database: str, connection: psycopg.Connection[Any]
) -> None:
    with Proxy(shared_database, Once(is_committed, Harm.CUT)) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT)

        with pytest.raises(CommitUnknown) as caught:
            processor.process(a_batch(items(1)))

        assert not processor.is_retryable(caught.value)
        processor.close()
    assert stored(connection) == [1]


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_P4_an_interruption_of_the_portable_commit_is_no_proof(
    shared_database: str, connection: psycopg.Connection[Any], error: BaseException
) -> None:
    class InterruptedConnection(psycopg.Connection[Any]):
        @contextlib.contextmanager
        def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
            raise error

    with InterruptedConnection.connect(shared_database) as other, pytest.raises(CommitUnknown) as caught:
        PostgresProcessor(lambda: contextlib.nullcontext(other), INSERT).process(a_batch(items(1)))

    assert caught.value.__cause__ is error
    assert stored(connection) == [1]


@pytest.mark.usefixtures("portable")
def test_P4_a_connection_that_closes_itself_before_the_portable_commit_is_no_success(
    shared_database: str, connection: psycopg.Connection[Any]
) -> None:
    """psycopg's own transaction block ends in silence then."""

    class ClosingConnection(psycopg.Connection[Any]):
        @contextlib.contextmanager
        def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
                self.close()

    with ClosingConnection.connect(shared_database) as other, pytest.raises(CommitUnknown):
        PostgresProcessor(lambda: contextlib.nullcontext(other), INSERT).process(a_batch(items(1)))

    assert stored(connection) == []
