"""Batches that are more than a message, of which the server takes 1 GB: several commands in one transaction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Message, Once, Proxy, is_committed

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor, transaction, values
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

LARGEST = 1000
MESSAGE = 3000
# A server that hangs up on a message of more than that, where a real one does at 1 GB.
TABLES = f"""
    CREATE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF length(NEW.t) > {MESSAGE} THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
        RETURN NULL;
    END $$;
    CREATE TABLE item (id bigserial PRIMARY KEY, n int UNIQUE DEFERRABLE, t text, b bytea);
    CREATE TRIGGER hang_up AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION hang_up();
"""


@pytest.fixture
def database(shared_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(values, "_LARGEST", LARGEST)
    monkeypatch.setattr(transaction, "_MESSAGE", MESSAGE)
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(TABLES)
    yield shared_database
    empty(shared_database)


@pytest.fixture(params=["keys", "merge", "statement"])
def make(request: pytest.FixtureRequest, database: str) -> Callable[..., PostgresProcessor]:
    with psycopg.connect(database) as connection:
        if request.param == "merge" and connection.info.server_version < 170000:
            pytest.skip("MERGE … RETURNING needs PostgreSQL 17")

    def build(conninfo: str = database, **options: Any) -> PostgresProcessor:
        return PostgresProcessor.insert_into(conninfo, "item", ["n", "t", "b"], strategy=request.param, **options)

    return build


def jobs_of(sizes: list[int]) -> list[Any]:
    return [{"n": n, "t": "x" * size, "b": b"y" * (size // 3) if n % 5 else None} for n, size in enumerate(sizes)]


def stored(conninfo: str) -> list[tuple[int, int]]:
    with psycopg.connect(conninfo) as connection:
        return connection.execute("SELECT n, length(t) FROM item ORDER BY n").fetchall()


@pytest.mark.parametrize(
    "sizes",
    [[900] * 3, [300] * 40, [10] * 17 + [2000] + [10] * 17, [1], [2500], [2500, 2500], [500, 500], [0] * 70 + [999]],
    ids=str,
)
def test_P2_each_job_has_its_own_row(make: Callable[..., PostgresProcessor], database: str, sizes: list[int]) -> None:
    processor = make()
    results = processor.process(Batch(jobs_of(sizes), id="b1"))
    processor.close()

    assert [(row["n"], len(row["t"])) for row in results] == list(enumerate(sizes))
    assert stored(database) == list(enumerate(sizes))


def test_P2_rows_of_any_sizes(make: Callable[..., PostgresProcessor], database: str) -> None:
    draw = random.Random(7)
    processor = make()
    count = 0
    for number in range(20):
        sizes = [draw.choice([0, 5, 50, 400, 1500]) for _ in range(draw.randrange(1, 90))]
        jobs = [{**job, "n": count + i} for i, job in enumerate(jobs_of(sizes))]
        results = processor.process(Batch(jobs, id=f"b{number}"))
        assert [row["n"] for row in results] == [job["n"] for job in jobs]
        assert [row["t"] for row in results] == [job["t"] for job in jobs]
        count += len(jobs)
    processor.close()
    assert len(stored(database)) == count


def test_no_command_is_larger_than_it_may_be(make: Callable[..., PostgresProcessor], database: str) -> None:
    sizes: list[int] = []

    def plan(message: Message) -> None:
        if message.to_server and message.kind == "B":
            sizes.append(len(message.body))

    with Proxy(database, plan) as proxy:
        processor = make(proxy.conninfo)
        processor.process(Batch(jobs_of([300] * 40), id="b1"))
        processor.close()
    assert max(sizes) < 1.5 * LARGEST
    assert sum(sizes) > 12 * LARGEST


def test_P3_a_bad_job_among_large_ones_fails_alone(make: Callable[..., PostgresProcessor], database: str) -> None:
    jobs = jobs_of([900, 900, 900, 900])
    jobs[2]["n"] = "none"
    processor = make()
    results = processor.process(Batch(jobs, id="b1"))
    processor.close()

    assert isinstance(results[2], psycopg.errors.InvalidTextRepresentation)
    assert stored(database) == [(0, 900), (1, 900), (3, 900)]


@pytest.mark.parametrize("on_job_error", ["isolate", "fail_batch"])
def test_P4_the_commands_of_a_batch_are_one_transaction(
    make: Callable[..., PostgresProcessor], database: str, on_job_error: str
) -> None:
    sizes = [900] * 6
    with (
        Proxy(database, Once(nth_row(4), Harm.CUT)) as proxy,
        MicroBatcher(make(proxy.conninfo, on_job_error=on_job_error)) as batcher,
    ):
        futures = batcher.submit_many(jobs_of(sizes))
        assert [future.exception(30) for future in futures] == [None] * 6
        proxy.plan = Once(is_committed, Harm.CUT)
        futures = batcher.submit_many([{**job, "n": 10 + job["n"]} for job in jobs_of(sizes)])
        assert [future.exception(30) for future in futures] == [None] * 6
        assert [future.result(0)["n"] for future in futures] == [10, 11, 12, 13, 14, 15]
    assert [n for n, _ in stored(database)] == [*range(6), *range(10, 16)]


def nth_row(number: int) -> Callable[[Message], bool]:
    left = [number]

    def is_it(message: Message) -> bool:
        left[0] -= not message.to_server and message.kind == "D"
        return left[0] == 0

    return is_it


def test_P3_a_job_that_no_message_carries_says_so_and_fails_alone(
    make: Callable[..., PostgresProcessor], database: str
) -> None:
    with MicroBatcher(make()) as batcher:
        futures = batcher.submit_many(jobs_of([100, 4000, 100]))
        errors = [future.exception(30) for future in futures]

    assert errors[0] is errors[2] is None
    assert isinstance(errors[1], psycopg.DataError)
    assert "no message of 1 GB" in str(errors[1])
    assert stored(database) == [(0, 100), (2, 100)]
