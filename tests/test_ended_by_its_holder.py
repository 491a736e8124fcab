"""Who calls `set_result` on the future of an outstanding job ends the future, and not the job (P1)."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, as_completed, wait
from typing import Any

import pytest

from microbatch import Batch, JobCompleted, JobFailed, JobFuture, JobStatus, MicroBatcher, RetryPolicy

pytestmark = pytest.mark.timeout(60)

BOUND = 10.0

ENDS: dict[str, Callable[[Future[Any]], None]] = {
    "result": lambda future: future.set_result("its holder's"),
    "None": lambda future: future.set_result(None),
    "exception": lambda future: future.set_exception(LookupError("its holder's")),
}


class Gated:
    """Says what it is inside of, and goes on when it is let."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.done: list[str] = []

    def process(self, batch: Batch[str]) -> list[str]:
        self.inside.set()
        assert self.go.wait(BOUND)
        self.done += batch
        return [job.upper() for job in batch]


@pytest.fixture
def gated() -> Iterator[Gated]:
    processor = Gated()
    yield processor
    processor.go.set()


def said(future: Future[Any]) -> object:
    """What it says, in every way it can be asked."""
    assert future.done()
    assert not wait([future], 0).not_done
    assert next(as_completed([future], 0)) is future
    if future.cancelled():
        return "cancelled"
    error = future.exception(0)
    return future.result(0) if error is None else error


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", ["queued", "running"])
@pytest.mark.parametrize("waited_for", [False, True])
def test_P1_a_future_that_its_holder_has_ended_says_nothing_else_later(
    gated: Gated, end: str, place: str, waited_for: bool
) -> None:
    batcher = MicroBatcher[str, str](gated, max_batch_size=3, delivery_timeout=BOUND)
    told: list[Any] = []
    batcher.on(JobCompleted, told.append)
    batcher.on(JobFailed, told.append)
    if place == "queued":
        batcher.submit("before")
        assert gated.inside.wait(BOUND)
    futures = batcher.submit_many(["a", "b", "c"])
    assert gated.inside.wait(BOUND)
    called: list[Future[Any]] = []
    futures[1].add_done_callback(called.append)
    if waited_for:
        assert not wait([futures[1]], 0).done

    ENDS[end](futures[1])

    first = said(futures[1])
    assert called == [futures[1]]
    assert not futures[1].cancel()
    with pytest.raises(InvalidStateError):
        futures[1].set_result("again")
    assert batcher.stats().outstanding == (4 if place == "queued" else 3), "the job goes on"
    gated.go.set()
    assert batcher.flush(BOUND)
    stats = batcher.stats()
    assert (stats.outstanding, stats.failed, stats.unknown) == (0, 0, 0)
    assert (stats.completed, stats.late_results) == (4 if place == "queued" else 3, 1)
    report = batcher.shutdown(timeout=BOUND)
    assert (report.finished, report.undelivered) == (True, ())
    assert said(futures[1]) is first
    assert called == [futures[1]]
    assert futures[1].status is (JobStatus.FAILED if end == "exception" else JobStatus.COMPLETED)
    assert [futures[0].result(0), futures[2].result(0)] == ["A", "C"]
    assert gated.done[-3:] == ["a", "b", "c"]
    assert Counter(event.job for event in told if event.job != "before") == {"a": 1, "b": 1, "c": 1}


def test_P1_a_running_mark_of_its_holder_changes_nothing(gated: Gated) -> None:
    batcher = MicroBatcher[str, str](gated, max_batch_size=1)
    batcher.submit("before")
    assert gated.inside.wait(BOUND)
    marked, cancelled = batcher.submit("marked"), batcher.submit("cancelled")
    assert marked.set_running_or_notify_cancel()
    assert cancelled.set_running_or_notify_cancel()
    assert cancelled.cancel()
    gated.go.set()

    assert marked.result(BOUND) == "MARKED"
    assert batcher.shutdown(timeout=BOUND).finished
    assert said(cancelled) == "cancelled"


def test_flush_waits_for_the_job_and_not_for_its_future_alone(gated: Gated) -> None:
    with MicroBatcher[str, str](gated) as batcher:
        future = batcher.submit("job")
        assert gated.inside.wait(BOUND)
        future.set_result("its holder's")

        assert not batcher.flush(0.05)

        gated.go.set()
        assert batcher.flush(BOUND)
        assert batcher.stats().outstanding == 0


def test_a_future_that_its_holder_has_ended_is_not_ended_again_by_a_deadline(gated: Gated) -> None:
    batcher = MicroBatcher[str, str](gated, max_batch_size=1)
    running, queued = batcher.submit("running", delivery_timeout=0.2), batcher.submit("queued", delivery_timeout=0.2)
    assert gated.inside.wait(BOUND)
    running.set_result(1)
    queued.set_exception(None)
    give_up = time.monotonic() + BOUND
    while batcher.stats().outstanding:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    gated.go.set()

    assert batcher.shutdown(timeout=BOUND).finished
    assert (said(running), said(queued)) == (1, None)
    while not batcher.stats().late_results:  # no shutdown waits for what no job waits for
        assert time.monotonic() < give_up
        time.sleep(0.001)
    stats = batcher.stats()
    assert (stats.unknown, stats.failed, stats.late_results) == (1, 1, 1)


def test_a_retry_and_a_shutdown_that_cancels_leave_it_as_it_is() -> None:
    inside = threading.Event()

    def process(batch: Batch[str]) -> list[str]:
        inside.set()
        raise ConnectionError

    retry = RetryPolicy(backoff=BOUND, backoff_max=BOUND, retry_on=ConnectionError)
    batcher = MicroBatcher[str, str](process, retry=retry)
    future = batcher.submit("job")
    assert inside.wait(BOUND)
    future.set_result("its holder's")

    assert batcher.shutdown(cancel_futures=True, timeout=BOUND).finished
    assert said(future) == "its holder's"


def test_an_id_is_free_once_the_future_says_failed_and_stays_with_the_new_job() -> None:
    inside: dict[str, threading.Event] = {"first": threading.Event(), "second": threading.Event()}
    go = {"first": threading.Event(), "second": threading.Event()}

    def process(batch: Batch[str]) -> list[str]:
        inside[batch[0]].set()
        assert go[batch[0]].wait(BOUND)
        return list(batch)

    with MicroBatcher[str, str](process, max_batch_size=1) as batcher:
        first = batcher.submit("first", job_id="mine")
        assert inside["first"].wait(BOUND)
        first.set_exception(LookupError())
        second = batcher.submit("second", job_id="mine")
        assert second is not first

        go["first"].set()
        assert inside["second"].wait(BOUND)
        assert batcher.future("mine") is second

        go["second"].set()
        assert second.result(BOUND) == "second"
        assert batcher.future("mine") is second


def test_P1_holders_that_race_with_the_batcher_get_one_outcome() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    draw = random.Random(1).random
    try:
        batcher = MicroBatcher[int, Any](lambda batch: list(batch), max_batch_size=7, max_concurrent_batches=2)
        calls: Counter[int] = Counter()
        seen: list[tuple[JobFuture[Any], object]] = []
        # Looked at again and again while the batcher goes on.
        stop = threading.Event()
        changed: list[object] = []

        def look() -> None:
            while not stop.is_set():
                for future, first in seen[-200:]:
                    if said(future) is not first:
                        changed.append(future)

        looker = threading.Thread(target=look)
        looker.start()
        for number in range(5000):
            future = batcher.submit(number)
            future.add_done_callback(lambda future, number=number: calls.update([number]))  # type: ignore[misc]
            if draw() < 0.5:
                wait([future], 0)
            try:
                if draw() < 0.3:
                    future.cancel()
                future.set_result("its holder's")
            except InvalidStateError:
                pass
            if future.done():
                seen.append((future, said(future)))
        assert batcher.flush(BOUND)
        stop.set()
        looker.join(BOUND)
        stats = batcher.stats()
        assert changed == []
        assert [future for future, first in seen if said(future) is not first] == []
        assert stats.completed + stats.cancelled == 5000
        assert batcher.shutdown(timeout=BOUND).finished
        assert set(calls.values()) == {1}
        assert len(calls) == 5000
    finally:
        sys.setswitchinterval(interval)
