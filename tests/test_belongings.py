from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from microbatch import (
    BatcherShutDown,
    JobCancelled,
    JobCompleted,
    JobFailed,
    MemoryQueue,
    MicroBatcher,
    RetryPolicy,
)
from microbatch.processors.postgres import PostgresProcessor

NAME = "forgotten"
PATIENCE = 20.0


class Refused(Exception):
    pass


class Owner:
    """Whatever it gives away leads back to it, and to its batcher. `ended` is told by those who outlive it."""

    def __init__(self, ended: list[str], **options: Any) -> None:
        self.ended = ended
        self.batcher: MicroBatcher[Any, Any] = MicroBatcher(self, name=NAME, **options)

    def process(self, batch: Any) -> list[Any]:
        mine = self
        results: list[Any] = []
        for job in batch:
            error = Refused(job, mine)
            if job == "raise":
                raise error
            results.append(error if job == "fail" else mine)
        return results

    def close(self) -> None:
        self.ended.append("closed")

    def told(self, event: Any) -> None:
        if isinstance(event, BatcherShutDown):
            self.ended.append("told")

    def make_queue(self) -> Any:
        return MemoryQueue()

    def is_worth_it(self, error: BaseException) -> bool:
        return error.args[0] == "never"


def plain(ended: list[str]) -> Owner:
    owner = Owner(ended)
    owner.batcher.execute(1)
    return owner


def listening(ended: list[str]) -> Owner:
    owner = Owner(ended)
    for event in (JobCompleted, JobFailed, JobCancelled, BatcherShutDown):
        owner.batcher.on(event, owner.told)
    owner.batcher.execute(1)
    return owner


def with_a_queue(ended: list[str]) -> Owner:
    owner = plain(ended)
    made = Owner(ended, queue=owner.make_queue)
    made.batcher.execute(1)
    made.other = owner  # type: ignore[attr-defined]
    return made


def with_a_policy(ended: list[str]) -> Owner:
    first = plain(ended)
    owner = Owner(ended, retry=RetryPolicy(retry_on=first.is_worth_it))
    owner.batcher.submit("fail").exception(PATIENCE)
    return owner


def failing(ended: list[str]) -> Owner:
    owner = Owner(ended)
    owner.batcher.submit("fail").exception(PATIENCE)
    owner.batcher.submit("raise").exception(PATIENCE)
    return owner


def with_a_history(ended: list[str]) -> Owner:
    owner = Owner(ended)
    owner.batcher.submit("raise", job_id="mine").exception(PATIENCE)
    assert isinstance(owner.batcher.submit(owner).job_id, str)
    owner.batcher.flush()
    return owner


def with_workers(ended: list[str]) -> Owner:
    owner = Owner(ended, max_concurrent_batches=3, max_batch_size=1)
    for future in [owner.batcher.submit(n) for n in range(20)]:
        future.result(PATIENCE)
    return owner


def with_callbacks(ended: list[str]) -> Owner:
    owner = Owner(ended)
    owner.batcher.submit(1).add_done_callback(lambda future: owner.ended)
    owner.batcher.flush()
    return owner


def cancelling(ended: list[str]) -> Owner:
    owner = Owner(ended, linger=15)
    owner.batcher.on(JobCancelled, owner.told)
    assert owner.batcher.submit(1).cancel()
    return owner


def expiring(ended: list[str]) -> Owner:
    owner = Owner(ended, delivery_timeout=0.2, linger=0.19)
    owner.batcher.on(JobFailed, owner.told)
    gate = threading.Event()
    owner.batcher._core.processor.process = lambda batch: gate.wait(0.5) and None
    owner.batcher.submit(owner).exception(PATIENCE)
    return owner


OWNERS = [
    plain,
    listening,
    with_a_queue,
    with_a_policy,
    failing,
    with_a_history,
    with_workers,
    with_callbacks,
    cancelling,
    expiring,
]


def collected(condition: Callable[[], bool]) -> bool:
    """Whether *condition* comes true while garbage is collected; another thread's frames may hold some for a moment."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            return False
        gc.collect()
        time.sleep(0.01)
    return True


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


@pytest.mark.parametrize("make", OWNERS)
def test_P6_a_forgotten_batcher_ends_although_what_it_was_given_leads_back_to_it(
    make: Callable[[list[str]], Owner],
) -> None:
    ended: list[str] = []
    owners = [weakref.ref(make(ended)) for _ in range(3)]

    assert collected(lambda: not threads() and not any(owner() for owner in owners)), threads()
    assert ended.count("closed") >= (0 if make is cancelling else 3)
    assert ended.count("told") == (3 if make is listening else 0)


def test_P6_a_forgotten_batcher_with_jobs_ends_when_they_have(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []
    owner = Owner(ended, linger=0.5)
    futures = [owner.batcher.submit(n) for n in range(50)]
    seen = weakref.ref(owner)
    del owner
    gc.collect()

    assert [type(future.result(PATIENCE)) for future in futures] == [Owner] * 50
    futures.clear()
    assert collected(lambda: not threads() and seen() is None)
    assert ended == ["closed"]
    assert not caplog.records


def test_P6_what_is_at_rest_works_again() -> None:
    ended: list[str] = []
    owner = Owner(ended, max_concurrent_batches=2)
    for _ in range(200):
        assert owner.batcher.execute(1) is owner
        gc.collect(0)
    assert owner.batcher.submit("raise", job_id="mine").exception(PATIENCE) is not None
    gc.collect()
    assert owner.batcher.status("mine") == "failed"
    assert owner.batcher.shutdown().finished
    assert ended == ["closed"]


def test_P6_a_batcher_whose_owner_it_is_reaches_its_listeners_after_a_rest() -> None:
    ended: list[str] = []
    owner = listening(ended)
    gc.collect()

    owner.batcher.shutdown()

    assert ended == ["closed", "told"]


@pytest.mark.database
def test_P6_forgotten_batchers_leave_no_connection(database: str) -> None:
    class Payments:
        def __init__(self) -> None:
            self.batcher = MicroBatcher(PostgresProcessor(database, "SELECT %s::int AS n"), name=NAME)
            self.batcher.on(JobFailed, self.failed)

        def failed(self, event: JobFailed) -> None:
            raise AssertionError

    for _ in range(5):
        assert Payments().batcher.execute((1,)) == {"n": 1}

    def connections() -> int:
        with psycopg.connect(database) as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'microbatch'"
            row = connection.execute(query).fetchone()
            assert row is not None
            return int(row[0])

    assert collected(lambda: not threads() and connections() == 0)
