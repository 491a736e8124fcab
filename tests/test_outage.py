from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from microbatch import MicroBatcher, OutcomeUnknown, RetryPolicy
from microbatch.outage import Complaints, Outage
from microbatch.processors.postgres import PostgresProcessor
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock

PATIENCE = 30.0


class Away(Exception):
    pass


class Conflict(Exception):
    pass


class Telling(FaultyProcessor[Any, Any]):
    def is_unavailable(self, error: BaseException) -> bool:
        return isinstance(error, Away)

    def describe(self, error: BaseException) -> str:
        return f"{type(error).__name__} told"


class Mute(FaultyProcessor[Any, Any]):
    """Says nothing about its errors."""


class Hostile(FaultyProcessor[Any, Any]):
    def is_unavailable(self, error: BaseException) -> bool:
        raise KeyboardInterrupt

    def describe(self, error: BaseException) -> str:
        raise SystemExit


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def inline(processor: Any) -> InlineBatcher[Any, Any]:
    clock = ManualClock(1000.0)
    return InlineBatcher(processor, name="payments", clock=clock, retry=RetryPolicy(backoff=1.0, backoff_max=1.0))


def test_an_outage_is_one_line_when_it_begins_and_one_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([Away("secret")] * 5, retryable=(Away,)))
    with batcher.hold():
        batcher.submit_many([1, 2, 3])

    began, over = lines(caplog)
    assert began == "payments: the processor does not answer (Away told); jobs are tried again until their deadlines"
    assert over.startswith("payments: the processor answers again, after ")
    assert over.endswith(" s; 3 jobs waited")
    assert batcher.stats().completed == 3


def test_a_second_outage_has_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([Away(), None, Away(), None], retryable=(Away,)))
    batcher.submit(1)
    batcher.submit(2)

    assert len(lines(caplog)) == 4


@pytest.mark.parametrize("answer", [Conflict("row"), lambda batch: [ValueError("row")], ValueError("row")])
def test_any_answer_ends_an_outage(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([Away(), answer], retryable=(Away, Conflict)))
    batcher.submit(1)

    assert [line for line in lines(caplog) if "answers again" in line]
    assert "row" not in caplog.text.replace("rows", "")


def test_a_conflict_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([Conflict()] * 3, retryable=(Conflict,)))
    batcher.submit(1)

    assert lines(caplog) == []


@pytest.mark.parametrize("kind", [Mute, Hostile])
def test_where_the_processor_says_nothing_a_failed_batch_is_an_outage_and_named_by_its_type(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = inline(kind([Away("secret")], retryable=(Away,)))
    batcher.submit(1)

    assert [line.partition(";")[0] for line in lines(caplog)] == [
        "payments: the processor does not answer (Away)",
        lines(caplog)[1].partition(";")[0],
    ]
    assert "secret" not in caplog.text


def test_a_batch_that_fails_for_good_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([ValueError("secret")] * 10 + [TypeError("secret")] * 2))
    for n in range(12):
        batcher.submit(n).exception(0)
        batcher.clock.advance(10.0)

    assert [line.partition("failed: ")[2] for line in lines(caplog, logging.ERROR)] == [
        "ValueError told (said once a minute)",
        "ValueError told (said once a minute)",
        "TypeError told (said once a minute)",
    ]


def test_an_unknown_outcome_is_an_error_each_time(caplog: pytest.LogCaptureFixture) -> None:
    batcher = inline(Telling([OutcomeUnknown()] * 2))
    for n in range(2):
        batcher.submit(n).exception(0)

    assert len(lines(caplog, logging.ERROR)) == 2


def test_an_outage_that_outlasts_its_jobs_is_no_failure_for_good(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock(1000.0)

    def slow(batch: Any) -> Any:
        clock.now += 100.0
        raise Away

    batcher = InlineBatcher(Telling([slow], retryable=(Away,)), name="payments", clock=clock)
    assert batcher.submit(1).exception(0) is not None

    (line,) = lines(caplog)
    assert line.startswith("payments: the processor does not answer")


def test_complaints_are_bounded() -> None:
    complaints = Complaints()
    assert all(complaints.is_due(str(n), 0.0) for n in range(10_000))
    assert len(complaints._next) <= 100


def test_an_outage_lasts_from_the_begin_of_its_first_attempt() -> None:
    outage = Outage()
    assert outage.end(1.0) is None
    assert (outage.begin(10.0), outage.begin(20.0)) == (True, False)
    assert outage.end(25.0) == 15.0
    assert outage.end(26.0) is None


# PostgreSQL.


@pytest.fixture
def role(database: str) -> Iterator[tuple[str, str]]:
    """A role's name, and a connection string with its password; the table `item` is its own."""
    name, password = f"limited_{uuid.uuid4().hex[:8]}", "hidden_secret"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))
        )
        connection.execute(
            sql.SQL("CREATE TABLE item (id bigserial PRIMARY KEY, n int); ALTER TABLE item OWNER TO {}").format(
                sql.Identifier(name)
            )
        )
    yield name, make_conninfo(database, user=name, password=password)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP TABLE IF EXISTS item; DROP ROLE {}").format(sql.Identifier(name)))


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.database
def test_an_outage_of_the_server_is_two_lines_with_reason_and_without_secrets(
    database: str, role: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    name, conninfo = role
    caplog.set_level(logging.INFO, "microbatch")
    with (
        psycopg.connect(database, autocommit=True) as control,
        MicroBatcher(PostgresProcessor.insert_into(conninfo, "item", ["n"]), name="payments") as batcher,
    ):
        batcher.execute((1,))
        control.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT 0").format(sql.Identifier(name)))
        control.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [name])
        futures = [batcher.submit((n,)) for n in range(5)]
        wait_until(lambda: batcher.stats().retries > 10)
        control.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT -1").format(sql.Identifier(name)))
        for future in futures:
            future.result(PATIENCE)

    began, over = lines(caplog)
    assert began.startswith("payments: the processor does not answer (")
    assert "answers again" in over
    assert all(line.startswith("payments: ") for line in lines(caplog, logging.INFO))
    assert "hidden_secret" not in caplog.text


@pytest.mark.database
def test_what_only_configuration_cures_is_an_error_with_the_servers_words(
    database: str, role: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    _, conninfo = role
    insert = "INSERT INTO {} (n) VALUES (%s)"
    wrong = {
        "28P01: connection failed": (make_conninfo(conninfo, password="wrong_secret"), insert.format("item")),
        "3D000": (make_conninfo(conninfo, dbname="not_there"), insert.format("item")),
        '42P01: relation "absent" does not exist': (conninfo, insert.format("absent")),
        '42703: column "n" of relation "other" does not exist': (conninfo, insert.format("other")),
        "42501: permission denied for table theirs": (conninfo, insert.format("theirs")),
    }
    with psycopg.connect(database, autocommit=True) as control:
        control.execute("CREATE TABLE theirs (n int); CREATE TABLE other (m int); GRANT ALL ON other TO PUBLIC")
    for said, (dsn, statement) in wrong.items():
        caplog.clear()
        with MicroBatcher(PostgresProcessor(dsn, statement), name="payments") as batcher:
            futures = batcher.submit_many([(1,), (2,), (3,)])
            assert all(future.exception(PATIENCE) for future in futures)
            assert batcher.submit((4,)).exception(PATIENCE)
        (line,) = lines(caplog)
        assert said.partition(":")[0] in line, line
        assert said.partition(": ")[2] in line, line
        assert "secret" not in caplog.text


@pytest.mark.database
def test_an_ordinary_bad_row_is_no_line(database: str, caplog: pytest.LogCaptureFixture) -> None:
    with psycopg.connect(database, autocommit=True) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, n int CHECK (n > 0))")
    with MicroBatcher(PostgresProcessor.insert_into(database, "item", ["n"])) as batcher:
        futures = batcher.submit_many([(1,), (-1,), (None,), ("x",)])
        assert [future.exception(PATIENCE) is None for future in futures] == [True, False, True, False]

    assert lines(caplog) == []
