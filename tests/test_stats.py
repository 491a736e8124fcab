"""The counters and the frozen snapshot."""

from __future__ import annotations

import dataclasses
import queue

import pytest

from microbatch import BatcherClosed, MicroBatcher, QueueFull, RetryPolicy, Stats
from microbatch.stats import REASONS, TRIGGERS, Counters
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock


def test_the_fields_are_the_ones_of_the_contract() -> None:
    assert " ".join(field.name for field in dataclasses.fields(Stats)) == (
        "submitted completed failed cancelled unknown rejected retries isolated late_results outstanding queued "
        "oldest_age batches batch_jobs triggers consecutive_failures last_success queue_wait_seconds process_seconds "
        "rejections blocked_submits blocked_seconds"
    )


def test_ended_is_the_sum_of_the_four_outcomes() -> None:
    counters = Counters()
    counters.completed, counters.failed, counters.cancelled, counters.unknown = 1, 20, 300, 4000
    assert counters.ended() == 4321


def test_a_snapshot_is_frozen_and_does_not_follow_the_batcher() -> None:
    batcher = InlineBatcher(FaultyProcessor())
    before = batcher.stats()
    batcher.submit(1)
    assert (before.submitted, before.triggers["idle"]) == (0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.submitted = 1  # type: ignore[misc]


def test_a_new_batcher_has_counted_nothing() -> None:
    stats = MicroBatcher(FaultyProcessor()).stats()
    zeros = dataclasses.replace(stats, triggers={}, rejections={}, last_success=None)
    assert {value for value in dataclasses.astuple(zeros) if value not in ({}, None)} == {0}
    assert stats.last_success is None
    assert stats.triggers == dict.fromkeys(TRIGGERS, 0)
    assert stats.rejections == dict.fromkeys(REASONS, 0)


def test_each_outcome_is_counted_as_what_it_is() -> None:
    processor = FaultyProcessor[str, str]([lambda batch: [1, ValueError("bad"), 2]])
    batcher = InlineBatcher(processor, max_batch_size=3)
    with batcher.hold():
        batcher.submit("cancelled").cancel()
        batcher.submit_many("abc")
    stats = batcher.stats()
    assert (stats.submitted, stats.completed, stats.failed, stats.cancelled) == (4, 2, 1, 1)
    assert (stats.isolated, stats.batches, stats.batch_jobs, stats.outstanding) == (1, 1, 3, 0)


def test_times_are_counted_in_seconds() -> None:
    clock = ManualClock()

    def slow(batch: object) -> None:
        clock.advance(3.0)

    batcher = InlineBatcher(slow, clock=clock)
    with batcher.hold():
        batcher.submit("a")
        clock.advance(1.0)
        batcher.submit("b")
        clock.advance(0.5)
        waiting = batcher.stats()
    stats = batcher.stats()
    assert (waiting.queued, waiting.outstanding, waiting.oldest_age) == (2, 2, 1.5)
    assert (stats.queue_wait_seconds, stats.process_seconds) == (2.0, 3.0)
    clock.advance(7.0)
    assert batcher.stats().last_success == 7.0


def test_failures_in_a_row_are_counted_until_a_batch_goes_through() -> None:
    batcher = InlineBatcher(FaultyProcessor([OSError(), OSError(), None, OSError()]), retry=None)
    seen = []
    for job in range(4):
        batcher.submit(job)
        seen.append(batcher.stats().consecutive_failures)
    assert seen == [1, 2, 0, 1]


def test_attempts_after_the_first_are_counted_for_each_job() -> None:
    batcher = InlineBatcher(FaultyProcessor([OSError()] * 2), retry=RetryPolicy(retry_on=OSError))
    batcher.submit_many([1, 2, 3])
    stats = batcher.stats()
    assert (stats.retries, stats.completed, stats.batches, stats.batch_jobs) == (6, 3, 3, 9)
    assert stats.triggers["retry"] == 2


def test_each_refusal_is_counted_by_its_reason() -> None:
    batcher = InlineBatcher(FaultyProcessor(), max_outstanding=3, queue=queue.Queue(2))
    with batcher.hold():
        batcher.submit_many([1, 2])
        refuse(QueueFull, batcher, [3])
    with batcher.hold():
        batcher.submit_many([1, 2])
        refuse(QueueFull, batcher, [3, 4])
    refuse(ValueError, batcher, [1, 2, 3, 4])
    batcher.shutdown()
    refuse(BatcherClosed, batcher, [1, 2, 3])
    with pytest.raises(BatcherClosed):
        batcher.submit(4)
    stats = batcher.stats()
    assert stats.rejections == {"queue": 1, "full": 2, "too_many": 4, "threads": 0, "closed": 4}
    assert stats.rejected == 7


def test_what_comes_after_the_shutdown_of_an_unused_batcher_is_counted() -> None:
    batcher = MicroBatcher[int, int](FaultyProcessor())
    batcher.shutdown()
    refuse(BatcherClosed, batcher, [1, 2])
    assert batcher.stats().rejections["closed"] == 2


def refuse(error: type[Exception], batcher: MicroBatcher[int, int], jobs: list[int]) -> None:
    with pytest.raises(error):
        batcher.submit_many(jobs)
