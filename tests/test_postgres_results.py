"""What a job's result is where no row is; ids that the jobs bring; a table that only has the ledger's name."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.processors.postgres.guard import DDL
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

Make = Callable[..., PostgresProcessor]


@pytest.fixture
def control(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, label text);"
            " INSERT INTO item (n, label) SELECT g / 10, 'old' FROM generate_series(10, 39) g"
        )
        yield connection
    empty(shared_database)


@pytest.fixture(params=["own", "lent"])
def conninfo(request: pytest.FixtureRequest, shared_database: str) -> Any:
    return shared_database if request.param == "own" else lambda: psycopg.connect(shared_database)


@pytest.fixture(params=["flights", "portable"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "portable":
        monkeypatch.setattr(writer, "is_supported", lambda connection: False)
    return str(request.param)


def written(processor: PostgresProcessor, *jobs: Any) -> list[Any]:
    with contextlib.closing(processor):
        return processor.process(Batch(list(jobs), id="b"))


# Numbers of rows


@pytest.mark.usefixtures("control", "either_way")
@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE item SET label = 'new' WHERE n = %(n)s", [10, 10, 0]),
        ("DELETE FROM item WHERE n = %(n)s", [10, 10, 0]),
        ("MERGE INTO item t USING (VALUES (1)) v ON t.n = %(n)s WHEN MATCHED THEN UPDATE SET n = t.n", [10, 10, 0]),
        ("WITH old AS (SELECT %(n)s::int AS n) UPDATE item SET label = 'x' FROM old WHERE item.n = old.n", [10, 10, 0]),
        ("INSERT INTO item (n) VALUES (%(n)s)", [None, None, None]),
        ("UPDATE item SET label = 'new' WHERE id = 30 - %(n)s RETURNING label", [{"label": "new"}] * 2 + [None]),
    ],
    ids=["update", "delete", "merge", "with", "insert", "update returning"],
)
def test_a_command_without_returning_gives_the_number_of_its_rows(
    conninfo: Any, statement: str, expected: list[Any]
) -> None:
    assert written(PostgresProcessor(conninfo, statement), *({"n": n} for n in (1, 3, 99))) == expected


@pytest.mark.usefixtures("control")
def test_the_number_of_rows_is_each_jobs_own_in_isolation(shared_database: str) -> None:
    processor = PostgresProcessor(shared_database, "UPDATE item SET n = %(new)s WHERE n = %(n)s")

    jobs = [{"n": 1, "new": 1}, {"n": 2, "new": "two"}, {"n": 98, "new": 1}, {"n": 3, "new": 3}]
    first, bad, nothing, last = written(processor, *jobs)

    assert (first, nothing, last) == (10, 0, 10)
    assert isinstance(bad, psycopg.errors.InvalidTextRepresentation)


# Two columns of one name

TWINS = "WITH w AS (INSERT INTO item (n) VALUES (%(n)s) RETURNING id) SELECT a.id, b.id FROM w a, w b"


@pytest.mark.usefixtures("control")
def test_two_result_columns_of_one_name_are_an_error_at_open(shared_database: str) -> None:
    processor = PostgresProcessor(shared_database, TWINS)

    with contextlib.closing(processor), pytest.raises(ValueError, match="two result columns are named 'id'"):
        processor.open()


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("strategy", ["auto", "keys", "statement"])
def test_a_column_that_is_returned_twice_is_an_error_at_open(shared_database: str, strategy: Any) -> None:
    processor = PostgresProcessor.insert_into(
        shared_database, "item", ["n"], returning=["id", "n", "id"], strategy=strategy
    )

    with contextlib.closing(processor), pytest.raises(ValueError, match="two result columns are named 'id'"):
        processor.open()


@pytest.mark.usefixtures("either_way")
def test_where_nothing_is_opened_two_columns_of_one_name_fail_the_jobs_and_nothing_is_written(
    conninfo: Any, control: psycopg.Connection[Any]
) -> None:
    results = written(PostgresProcessor(conninfo, TWINS), {"n": 77}, {"n": 77})

    assert all(isinstance(result, ValueError) and "'id'" in str(result) for result in results)
    assert control.execute("SELECT count(*) FROM item WHERE n = 77").fetchone() == (0,)


def test_a_lent_connection_fails_the_batch_that_would_return_a_column_twice(
    shared_database: str, control: psycopg.Connection[Any]
) -> None:
    processor = PostgresProcessor.insert_into(
        lambda: psycopg.connect(shared_database), "item", ["n"], returning=["id", "id"]
    )

    with pytest.raises(ValueError, match="'id'"):
        written(processor, {"n": 77})
    assert control.execute("SELECT count(*) FROM item WHERE n = 77").fetchone() == (0,)


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT jsonb_build_object('n', %(n)s) AS n",  # the type of its parameter is only known with a value
        "INSERT INTO missing VALUES (%(n)s)",
        "INSERT INTO item (n, label) VALUES (%s, %s) RETURNING *",
        "UPDATE item SET label = '100 %%'",
    ],
)
def test_what_open_cannot_tell_is_left_to_the_jobs(shared_database: str, statement: str) -> None:
    with contextlib.closing(PostgresProcessor(shared_database, statement)) as processor:
        processor.open()
        processor.open()


def test_a_table_that_is_locked_does_not_hold_open_up(shared_database: str, control: psycopg.Connection[Any]) -> None:
    with psycopg.connect(shared_database) as other:
        other.execute("LOCK TABLE item")
        with contextlib.closing(PostgresProcessor(shared_database, TWINS)) as processor:
            processor.open()


# Ids that the jobs give


@pytest.mark.parametrize("strategy", ["auto", "statement"])
@pytest.mark.parametrize("count", [1, 3])
def test_ids_of_an_identity_that_is_always_generated_go_in(
    control: psycopg.Connection[Any], conninfo: Any, strategy: Any, count: int
) -> None:
    # As a whole: tried alone, each job would be an INSERT.
    whole: dict[str, Any] = {"strategy": strategy, "returning": ["id", "n"], "on_job_error": "fail_batch"}
    processor = PostgresProcessor.insert_into(conninfo, "item", ["id", "n"], overriding="system", **whole)
    jobs = [{"id": 1000 + i, "n": i} for i in range(count)]

    assert written(processor, *jobs) == jobs
    assert control.execute("SELECT id, n FROM item WHERE id >= 1000 ORDER BY id").fetchall() == [
        (job["id"], job["n"]) for job in jobs
    ]


@pytest.mark.usefixtures("control")
def test_an_identity_that_is_drawn_takes_the_option_too(shared_database: str) -> None:
    processor = PostgresProcessor.insert_into(shared_database, "item", ["n"], overriding="system", returning=["n"])

    assert written(processor, {"n": 1}, {"n": 2}) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("overriding", ["user", "SYSTEM", "", True])
def test_another_kind_of_overriding_is_refused(overriding: Any) -> None:
    with pytest.raises(ValueError, match="overriding must be 'system' or None, not"):
        PostgresProcessor.insert_into("", "item", ["id"], overriding=overriding)


# What is not the ledger

OTHERS = {
    "a user's": "CREATE TABLE microbatch_ledger (id serial PRIMARY KEY, amount numeric)",
    "another type": "CREATE TABLE microbatch_ledger (lane text PRIMARY KEY, batch bigint, at timestamptz)",
    "no key": "CREATE TABLE microbatch_ledger (lane uuid, batch bigint, at timestamptz)",
    "another key": "CREATE TABLE microbatch_ledger"
    " (lane uuid, batch bigint, at timestamptz, PRIMARY KEY (lane, batch))",
    "deferrable key": "CREATE TABLE microbatch_ledger (lane uuid UNIQUE DEFERRABLE, batch bigint, at timestamptz)",
    "partial key": "CREATE TABLE microbatch_ledger (lane uuid, batch bigint, at timestamptz);"
    " CREATE UNIQUE INDEX ON microbatch_ledger (lane) WHERE batch > 0",
    "a column missing": "CREATE TABLE microbatch_ledger (lane uuid PRIMARY KEY, batch bigint)",
    "a column more": "CREATE TABLE microbatch_ledger"
    " (lane uuid PRIMARY KEY, batch bigint, at timestamptz, host text NOT NULL)",
    "a view": "CREATE VIEW microbatch_ledger AS SELECT NULL::uuid AS lane, 1::bigint AS batch, now() AS at",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_table_that_is_not_the_ledger_is_left_alone_with_one_warning(
    shared_database: str, control: psycopg.Connection[Any], other: str, caplog: pytest.LogCaptureFixture
) -> None:
    control.execute(OTHERS[other])

    with caplog.at_level(logging.WARNING, "microbatch"):
        processor = PostgresProcessor(shared_database, "INSERT INTO item (n) VALUES (%(n)s) RETURNING n")
        with MicroBatcher(processor, delivery_timeout=10) as batcher:
            assert [batcher.execute({"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 2}]

    said = [record.getMessage() for record in caplog.records if "is not the ledger" in record.getMessage()]
    assert len(said) == 1
    assert "public.microbatch_ledger" in said[0]


@pytest.mark.parametrize("other", OTHERS)
def test_a_pinned_ledger_that_is_another_table_is_refused(
    shared_database: str, control: psycopg.Connection[Any], other: str
) -> None:
    control.execute(OTHERS[other])
    processor = PostgresProcessor(shared_database, "SELECT 1", commit_guard="ledger")

    with contextlib.closing(processor), pytest.raises(ValueError, match="is not the ledger of microbatch"):
        processor.open()


@pytest.mark.parametrize(
    "change",
    [
        "",
        "ALTER TABLE microbatch_ledger ADD note text",
        "ALTER TABLE microbatch_ledger ADD host text NOT NULL DEFAULT ''",
    ],
)
def test_the_ledger_is_known_by_its_columns_and_its_key(
    shared_database: str, control: psycopg.Connection[Any], change: str
) -> None:
    control.execute(f"{DDL};{change}")
    processor = PostgresProcessor(
        shared_database, "INSERT INTO item (n) VALUES (%(n)s) RETURNING n", commit_guard="ledger"
    )

    assert written(processor, {"n": 1}) == [{"n": 1}]
