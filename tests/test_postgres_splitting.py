"""P3, P4: a job that breaks its link fails alone, and what breaks links from outside fails no job."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Message, Once, Proxy, at_nth, is_committed, mentions
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from microbatch import JobFuture, MicroBatcher, RetryPolicy
from microbatch.embedded import EmbeddedPostgres
from microbatch.processors.postgres import PostgresProcessor, splitting
from microbatch.protocols import Batch

pytestmark = [pytest.mark.database, pytest.mark.timeout(120)]

BOUND = 60.0
# Ends its own server process for some rows, takes its time for others.
TABLES = """
    CREATE FUNCTION harm() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.n < 0 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
        IF NEW.n >= 1000000 THEN PERFORM pg_sleep((NEW.n - 1000000) / 1000.0); END IF;
        RETURN NULL;
    END $$;
    CREATE TABLE item (id bigserial PRIMARY KEY, n int UNIQUE);
    CREATE TRIGGER harm AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION harm();
    CREATE TABLE keyless (n int UNIQUE);
    CREATE TRIGGER harm AFTER INSERT ON keyless FOR EACH ROW EXECUTE FUNCTION harm();
"""
INSERT = "INSERT INTO item (n) VALUES (%s) RETURNING n"


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(TABLES)
    yield shared_database
    empty(shared_database)


def connected(conninfo: str) -> Any:
    return lambda: psycopg.connect(conninfo, autocommit=True)


WAYS: dict[str, Callable[[Any], PostgresProcessor]] = {
    "keys": lambda to: PostgresProcessor.insert_into(to, "item", ["n"]),
    "merge": lambda to: PostgresProcessor.insert_into(to, "keyless", ["n"]),
    "one by one": lambda to: PostgresProcessor.insert_into(to, "item", ["n"], strategy="statement"),
    "statement": lambda to: PostgresProcessor(to, INSERT),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[[Any], PostgresProcessor]:
    return WAYS[request.param]


def rows(conninfo: str) -> Counter[int]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        found = connection.execute("SELECT n FROM item UNION ALL SELECT n FROM keyless").fetchall()
    return Counter(n for (n,) in found)


def words(futures: list[JobFuture[Any]]) -> list[str]:
    """One for each outcome; the SQLSTATE of a job that failed with its server's error."""
    assert not wait(futures, BOUND).not_done
    errors = [future.exception(0) for future in futures]
    return [
        "completed" if error is None else str(getattr(error, "sqlstate", None) or type(error).__name__)
        for error in errors
    ]


def submitted(batcher: MicroBatcher[Any, Any], numbers: list[int]) -> list[JobFuture[Any]]:
    return batcher.submit_many([(n,) for n in numbers])


@pytest.mark.parametrize("link", ["own", "a callable", "a pool"])
def test_P3_a_job_that_breaks_its_link_fails_alone(
    database: str, link: str, way: Callable[[Any], PostgresProcessor]
) -> None:
    with contextlib.ExitStack() as stack:
        to: Any = {"own": database, "a callable": connected(database)}.get(link)
        if to is None:
            to = stack.enter_context(ConnectionPool(database, min_size=1, open=True))
        batcher = stack.enter_context(MicroBatcher(way(to)))
        futures = submitted(batcher, [1, 2, -3, 4, 5, 6, 7])
        found = words(futures)

    assert found == ["completed"] * 2 + ["57P01"] + ["completed"] * 4
    assert [futures[i].result(0)["n"] for i in (0, 1, 3)] == [1, 2, 4]
    assert rows(database) == Counter([1, 2, 4, 5, 6, 7])


def test_P3_several_of_them_fail_alone_beside_a_bad_job(database: str, way: Callable[[Any], PostgresProcessor]) -> None:
    numbers = [*range(1, 41), 7, -1, *range(41, 60), -2]
    with MicroBatcher(way(database)) as batcher:
        found = words(submitted(batcher, numbers))

    assert Counter(found) == {"completed": 59, "23505": 1, "57P01": 2}
    assert [found[i] for i in (40, 41, 61)] == ["23505", "57P01", "57P01"]
    assert rows(database) == Counter(range(1, 60))


def test_P3_what_comes_meanwhile_shares_no_batch_with_it(
    database: str, way: Callable[[Any], PostgresProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: set[str] = set()
    judge = splitting.Suspects.judge

    def noted(self: Any, batch: Any, watch: Any, error: BaseException) -> None:
        broken.add(batch.id.split(".")[0])
        judge(self, batch, watch, error)

    monkeypatch.setattr(splitting.Suspects, "judge", noted)
    with MicroBatcher(way(database)) as batcher:
        futures = submitted(batcher, [1, -1, 2])
        others = []
        while not futures[1].done():
            others.append(batcher.submit((100 + len(others),)))
            time.sleep(0.01)
        assert words(futures) == ["completed", "57P01", "completed"]
        assert set(words(others)) == {"completed"}
    assert len(others) > 5
    assert len(broken) == 1


def test_P3_fail_batch_keeps_a_batch_whole_that_breaks_its_link(database: str) -> None:
    processor = PostgresProcessor(database, INSERT, on_job_error="fail_batch")
    with MicroBatcher(processor) as batcher:
        assert words(submitted(batcher, [1, -1, 2])) == ["57P01"] * 3
        assert words(submitted(batcher, [3, 4])) == ["completed"] * 2
    assert rows(database) == Counter([3, 4])


def test_P3_a_split_is_no_attempt_too_many(database: str) -> None:
    with MicroBatcher(PostgresProcessor(database, INSERT), retry=RetryPolicy(max_attempts=2)) as batcher:
        assert words(submitted(batcher, [1, 2, -3, 4])) == ["completed", "completed", "57P01", "completed"]


def test_P3_a_batch_that_takes_longer_than_a_transaction_may_is_written_in_parts(
    database: str, way: Callable[[Any], PostgresProcessor]
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        if connection.info.server_version < 170000:
            pytest.skip("transaction_timeout needs PostgreSQL 17")
        for table in ("item", "keyless"):
            connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_n_key")
    limited = make_conninfo(database, options="-c transaction_timeout=300ms")
    with MicroBatcher(way(limited)) as batcher:
        found = words(submitted(batcher, [1_000_020] * 40 + [1_001_000]))

    assert found == ["completed"] * 40 + ["25P04"]
    assert rows(database) == {1_000_020: 40}


# What is nobody's fault.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first break that counts is the last one."""
    monkeypatch.setattr(splitting, "_ALONE", 1)


@pytest.mark.usefixtures("impatient")
def test_P4_a_link_that_was_dead_before_is_held_against_no_job(database: str) -> None:
    with Proxy(database) as proxy, MicroBatcher(PostgresProcessor(proxy.conninfo, INSERT)) as batcher:
        batcher.execute((1,))
        for number in range(3):
            proxy.plan = Once(mentions("BEGIN"), Harm.CUT)
            assert batcher.execute((10 + number,)) == {"n": 10 + number}
        # The second link breaks before the job is on its way.
        proxy.plan = at_each(mentions("BEGIN"), mentions("pg_postmaster_start_time"), mentions("pg_postmaster"))
        assert batcher.execute((20,)) == {"n": 20}


def at_each(*moments: Callable[[Message], bool]) -> Callable[[Message], Harm | None]:
    """A cut at each of *moments*, one after the other."""
    left = list(moments)

    def plan(message: Message) -> Harm | None:
        if left and left[0](message):
            del left[0]
            return Harm.CUT
        return None

    return plan


@pytest.fixture(scope="module")
def own_server(binaries: None) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(shared_buffers="32MB", fsync="off") as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(TABLES)
        yield server


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["keys", "statement"])
@pytest.mark.parametrize("mode", ["fast", "immediate", "crash"])
def test_P4_a_job_alone_is_not_blamed_for_a_server_that_goes_down_under_it(
    own_server: EmbeddedPostgres, mode: str, name: str
) -> None:
    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE item, keyless")
    with MicroBatcher(WAYS[name](own_server.dsn), delivery_timeout=60) as batcher:
        future = batcher.submit((1_001_000,))
        for _ in range(3):
            until_asleep(own_server.dsn)
            if mode == "crash":
                crash_another(own_server.dsn)
            else:
                own_server.restart(mode)
        assert future.result(BOUND)["n"] == 1_001_000
    assert rows(own_server.dsn) == {1_001_000: 1}


def until_asleep(conninfo: str) -> None:
    """Until the job is being written."""
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(conninfo, autocommit=True) as connection:
            if connection.execute(query).fetchone():
                return
        time.sleep(0.02)
    raise AssertionError("the job is not written")


def crash_another(conninfo: str) -> None:
    """End another session's process in a way that the server takes for a crash."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        with contextlib.suppress(psycopg.OperationalError):
            connection.execute("SELECT pg_sleep(10)")


@pytest.mark.parametrize("name", ["merge", "one by one", "statement"])
def test_P4_a_job_that_is_alone_since_the_others_ended_is_as_patient_as_any(database: str, name: str) -> None:
    with Proxy(database) as proxy:
        processor = WAYS[name](proxy.conninfo)
        for attempt, jobs in enumerate(([(1,), (2,)], [(1,)], [(1,)]), 1):
            proxy.plan = Once(mentions("SET CONSTRAINTS"), Harm.CUT)
            with pytest.raises(psycopg.OperationalError) as caught:
                processor.process(Batch(jobs, id="b1", attempt=attempt))
            assert processor.is_retryable(caught.value)
        proxy.plan = None
        assert processor.process(Batch([(1,)], id="b1", attempt=4))[0]["n"] == 1
        processor.close()
    assert rows(database) == Counter([1])


# At every moment of a batch that is split.


@pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the client"])
@pytest.mark.parametrize("name", WAYS)
def test_P4_a_cut_before_any_message_of_a_split_loses_doubles_and_blames_nothing(
    database: str, name: str, to_server: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`MICROBATCH_GUARD_TRIALS` cuts at every message."""
    monkeypatch.setattr(splitting, "_ALONE", 2)  # an innocent job meets one cut at most
    expected: Counter[int] = Counter()
    harms = itertools.cycle([Harm.CUT, Harm.CUT_INSIDE, Harm.CUT_BEHIND])
    step = 1 if os.environ.get("MICROBATCH_GUARD_TRIALS") else 61
    with Proxy(database) as proxy, MicroBatcher(WAYS[name](proxy.conninfo)) as batcher:
        for number in itertools.count(3, step):
            proxy.plan = plan = at_nth(number, to_server, next(harms))
            good = [10 * number + 1, 10 * number + 2, 10 * number + 3]
            futures = submitted(batcher, [good[0], -number, *good[1:]])
            assert words(futures)[0] == words(futures)[2] == words(futures)[3] == "completed"
            assert isinstance(futures[1].exception(0), psycopg.OperationalError)
            expected.update(good)
            if not plan.fired.is_set():
                break
        assert number > 40
    assert rows(database) == expected


@pytest.mark.parametrize("name", WAYS)
def test_P4_a_part_whose_commit_is_not_answered_is_written_once(database: str, name: str) -> None:
    with Proxy(database) as proxy, MicroBatcher(WAYS[name](proxy.conninfo)) as batcher:
        answers = Counter[str]()

        def plan(message: Message) -> Harm | None:
            if not is_committed(message):
                return None
            answers["COMMIT"] += 1
            return Harm.CUT if answers["COMMIT"] % 2 else None

        proxy.plan = plan
        found = words(submitted(batcher, [1, 2, -3, 4, 5, 6, 7, 8]))

    assert found == ["completed"] * 2 + ["57P01"] + ["completed"] * 5
    assert rows(database) == Counter([1, 2, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("name", WAYS)
def test_P4_P5_deadlines_that_fall_into_a_split(database: str, name: str) -> None:
    """Each is true: completed and there, failed and not there, unknown only in flight."""
    with MicroBatcher(WAYS[name](database)) as batcher:
        numbers = [n if n % 9 else -n for n in range(1, 60)]
        futures = {n: batcher.submit((n,), delivery_timeout=(0.1, 0.4, 1.5, 30)[i % 4]) for i, n in enumerate(numbers)}
        found = dict(zip(futures, words(list(futures.values())), strict=True))
    there = rows(database)

    assert max(there.values()) == 1
    for n, word in found.items():
        assert word == "OutcomeUnknown" or there[n] == (word == "completed"), (n, word)
    assert "completed" in found.values()


def test_P6_a_shutdown_waits_for_every_part(database: str) -> None:
    batcher = MicroBatcher(PostgresProcessor(database, INSERT))
    futures = submitted(batcher, [1, 2, -3, 4])
    report = batcher.shutdown()

    assert (report.completed, report.failed) == (3, 1)
    assert words(futures) == ["completed", "completed", "57P01", "completed"]
