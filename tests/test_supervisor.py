"""Deadlines, dead workers and the end of a shutdown: `Supervisor.check` by hand, on a clock that stands still."""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

import pytest

from microbatch import (
    BatcherClosed,
    BatcherShutDown,
    DeliveryTimeout,
    JobFailed,
    JobStatus,
    OutcomeUnknown,
    RetryPolicy,
    WorkerDied,
)
from microbatch.collector import NEVER
from microbatch.core import Core
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock
from microbatch.worker import Worker, leave


class Steady(RetryPolicy):
    """Without jitter."""

    def delay(self, attempts: int, draw: object = None) -> float:
        return self.backoff


def core_of(batcher: InlineBatcher[Any, Any]) -> Core:
    return batcher._core


def check(batcher: InlineBatcher[Any, Any]) -> bool:
    return batcher._supervisor.check()


def test_with_nothing_outstanding_it_sleeps_without_end() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    batcher.submit(1)
    assert check(batcher)
    assert core_of(batcher).next_check == NEVER


def test_it_sleeps_to_the_nearest_deadline() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    with batcher.hold():
        batcher.submit(1, delivery_timeout=30)
        batcher.submit(2, delivery_timeout=10)
        batcher.submit(3, delivery_timeout=20)
        check(batcher)
        assert core_of(batcher).next_check == 1010.0


def test_only_an_earlier_deadline_wakes_it() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    core = core_of(batcher)
    with batcher.hold():
        rings = []
        for timeout in (30, 40, 10, 10, 5):
            batcher.submit(timeout, delivery_timeout=timeout)
            rings.append(core.alarm.take(0))
    assert rings == [True, False, True, False, True]


def test_a_job_without_a_deadline_never_wakes_it() -> None:
    batcher = InlineBatcher(FaultyProcessor(), delivery_timeout=None, retry=None, clock=ManualClock())
    with batcher.hold():
        batcher.submit(1)
        assert not core_of(batcher).alarm.is_put()


def test_P5_a_job_that_was_never_handed_over_fails_at_its_deadline() -> None:
    processor = FaultyProcessor[str, str]()
    batcher = InlineBatcher(processor, clock=ManualClock())
    with batcher.hold():
        short, long = batcher.submit("short", delivery_timeout=5), batcher.submit("long")
        batcher.clock.advance(4.999)
        check(batcher)
        assert short.status is JobStatus.PENDING
        batcher.clock.advance(0.001)
        check(batcher)
        error = short.exception(0)
    assert type(error) is DeliveryTimeout
    assert "was not handed to the processor within 5 s; it left no trace" in str(error)
    assert long.result() == "long"
    assert processor.batches == [("long",)]


def test_P5_a_job_that_waits_for_a_retry_fails_at_its_deadline_with_its_last_error_as_the_cause() -> None:
    lost = OSError("lost")
    retry = Steady(backoff=9.0, backoff_max=9.0, retry_on=OSError)
    batcher = InlineBatcher(FaultyProcessor([lost, lost]), retry=retry, delivery_timeout=15.0, clock=ManualClock())
    error = batcher.submit(1).exception()
    assert type(error) is DeliveryTimeout
    assert error.__cause__ is lost
    assert "failed 2 times within 15 s" in str(error)
    assert batcher.clock.now == 1015.0


def test_P5_an_undecided_batch_that_waits_is_unknown_at_its_deadline() -> None:
    lost = OutcomeUnknown("lost at commit")
    retry = Steady(backoff=30.0, backoff_max=30.0)
    processor = FaultyProcessor[int, int]([lost], retryable=(OutcomeUnknown,))
    batcher = InlineBatcher(processor, retry=retry, clock=ManualClock())
    error = batcher.submit(1).exception()
    assert type(error) is OutcomeUnknown
    assert (error.batch_id, error.__cause__) == (processor.calls[0].id, lost)


class Stuck:
    """Holds its batch past every deadline, and lets the supervisor look meanwhile."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.batcher: Any = None
        self.abandoned: list[Any] = []
        self.seen: list[JobStatus] = []

    def process(self, batch: Any) -> list[Any]:
        self.batcher.clock.advance(self.seconds)
        check(self.batcher)
        check(self.batcher)
        self.seen = [job.future.status for job in self.batcher._worker.jobs]
        if self.error is not None:
            raise self.error
        return list(batch)

    def abandon(self, batch: Any) -> None:
        self.abandoned.append(batch.id)
        raise ZeroDivisionError("abandoning failed")


def stuck(seconds: float, error: Exception | None = None, **options: Any) -> tuple[Stuck, InlineBatcher[Any, Any]]:
    processor = Stuck(seconds, error)
    processor.batcher = InlineBatcher(processor, **options, clock=ManualClock())
    return processor, processor.batcher


@pytest.mark.parametrize("error", [None, OSError("late")])
def test_P5_a_job_that_the_processor_still_holds_is_unknown_at_its_deadline_and_its_late_answer_is_dropped(
    error: Exception | None,
) -> None:
    processor, batcher = stuck(20.0, error, retry=RetryPolicy(retry_on=OSError))
    future = batcher.submit(1)
    assert processor.seen == [JobStatus.UNKNOWN]
    told = future.exception()
    assert isinstance(told, OutcomeUnknown)
    assert "the processor still held the job at its deadline, 20 s after submit" in str(told)
    assert told.batch_id is not None
    stats = batcher.stats()
    assert (stats.unknown, stats.late_results, stats.completed, stats.outstanding) == (1, 1, 0, 0)


def test_P5_the_others_of_a_batch_get_their_results_though_one_is_overdue() -> None:
    processor, batcher = stuck(10.0)
    with batcher.hold():
        late, early = batcher.submit("late", delivery_timeout=5), batcher.submit("early")
    assert late.status is JobStatus.UNKNOWN
    assert early.result() == "early"
    assert processor.abandoned == []


def test_a_processor_is_told_once_that_nobody_waits_any_more(caplog: pytest.LogCaptureFixture) -> None:
    processor, batcher = stuck(20.0)
    with caplog.at_level(logging.ERROR, "microbatch.supervisor"):
        future = batcher.submit(1)
    error = future.exception()
    assert isinstance(error, OutcomeUnknown)
    assert processor.abandoned == [error.batch_id]
    assert "abandoning failed" in caplog.text


def test_P6_past_its_timeout_a_shutdown_ends_what_is_left_and_keeps_the_jobs() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    core = core_of(batcher)
    with batcher.hold():
        queued = batcher.submit("queued")
        core.close(batcher.clock.now + 3.0)
        check(batcher)
        assert core.next_check == 1003.0
        batcher.clock.advance(3.0)
        check(batcher)
    assert isinstance(queued.exception(), BatcherClosed)
    assert core.undelivered == ["queued"]


def test_P6_a_running_job_is_unknown_past_the_timeout_of_the_shutdown() -> None:
    processor, batcher = stuck(5.0)
    with batcher.hold():
        future = batcher.submit("running")
        core_of(batcher).close(batcher.clock.now + 5.0)
    assert processor.seen == [JobStatus.UNKNOWN]
    error = future.exception()
    assert isinstance(error, OutcomeUnknown)
    assert "shutdown timed out while the processor held the job" in str(error)
    assert batcher.shutdown().undelivered == ("running",)


def test_P6_past_its_timeout_a_shutdown_rests_while_a_callback_runs() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    core = core_of(batcher)
    rung = []

    def call_back(_: object) -> None:
        batcher.shutdown(wait=False, timeout=0)
        for _ in range(2):
            core.alarm.take(0)
            assert check(batcher)
            rung.append(core.alarm.is_put())

    with batcher.hold():
        batcher.submit("job").add_done_callback(call_back)
    assert rung == [False, False]
    assert batcher.shutdown().finished


def test_the_dead_are_swept_when_they_outnumber_the_living() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    core = core_of(batcher)
    with batcher.hold():
        futures = batcher.submit_many(range(300))
        core.alarm.take(0)
        for future in futures[:150]:
            future.cancel()
        assert (core.intake.store.size(), core.alarm.is_put()) == (300, False)
        for future in futures[150:200]:
            future.cancel()
        assert core.alarm.is_put()
        check(batcher)
        assert core.intake.store.size() == 100
    assert [future.result() for future in futures[200:]] == list(range(200, 300))


@pytest.mark.parametrize(("look", "pause"), [(0.01, 0.1), (0.5, 0.25)])
def test_P5_a_look_at_many_jobs_takes_only_a_share_of_the_time_and_delays_no_deadline_for_long(
    look: float, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    spent = itertools.count(0.0, look)
    monkeypatch.setattr("microbatch.supervisor.thread_time", spent.__next__)
    with batcher.hold():
        batcher.submit(1, delivery_timeout=0.001)
        check(batcher)
        assert core_of(batcher).next_check == pytest.approx(1000.0 + pause)


def test_P1_what_a_dead_worker_held_is_unknown_what_it_only_took_is_queued_again_and_another_takes_its_place() -> None:
    processor = FaultyProcessor[str, str]()
    batcher = InlineBatcher(processor, max_batch_size=2, clock=ManualClock())
    core = core_of(batcher)
    batcher.submit("first")
    with batcher.hold():
        held = batcher.submit_many(["a", "b"])
        queued = batcher.submit("c")
        dead: Any = batcher._worker
        with core.collecting:
            dead._collect(wait=False)
        dead.gone = True
        check(batcher)
        assert batcher._worker is not dead
        assert core.workers == [batcher._worker]
    assert [type(future.exception()) for future in held] == [WorkerDied, WorkerDied]
    assert queued.result() == "c"
    assert processor.batches == [("first",), ("c",)]


def test_P1_what_a_dead_worker_had_not_handed_over_is_done_by_the_next_one() -> None:
    processor = FaultyProcessor[str, str]()
    batcher = InlineBatcher(processor, clock=ManualClock())
    core = core_of(batcher)
    with batcher.hold():
        future = batcher.submit("a")
        dead: Any = batcher._worker
        with core.collecting:
            dead._collect(wait=False)  # taken, and not handed over: the processor is not open yet
        assert future.status is JobStatus.PROCESSING
        dead.gone = True
        check(batcher)
        assert future.status is JobStatus.PENDING
    assert future.result() == "a"


def test_P4_an_undecided_batch_that_a_dead_worker_had_taken_comes_back_as_the_same_batch() -> None:
    processor = FaultyProcessor[str, str]([OutcomeUnknown("lost")], retryable=(OutcomeUnknown,))
    batcher = InlineBatcher(processor, retry=Steady(backoff=1.0), clock=ManualClock())
    core = core_of(batcher)
    with batcher.hold():
        futures = batcher.submit_many("ab")
        batcher._worker.turn(wait=False)
        batcher.clock.advance(1.0)
        dead: Any = batcher._worker
        dead.opened = False
        with core.collecting:
            dead._collect(wait=False)
        dead.gone = True
        check(batcher)
        batcher.submit("c")
    assert [future.result() for future in futures] == ["a", "b"]
    assert processor.batches == [("a", "b"), ("a", "b"), ("c",)]
    assert processor.calls[0].id == processor.calls[1].id


def test_P6_when_the_last_worker_dies_before_it_closes_the_processor_another_one_closes_it() -> None:
    processor = FaultyProcessor[str, str]()
    batcher = InlineBatcher(processor, clock=ManualClock())
    core = core_of(batcher)
    batcher.submit("job")
    core.close()
    core._start = lambda core: None  # its thread is on its way
    batcher._worker.gone = True
    assert check(batcher)
    assert not core.finished
    another = Worker(core)
    assert another.claim()
    assert not Worker(core).claim()
    leave(another)
    assert not check(batcher)
    assert core.finished
    assert (processor.opened, processor.closed) == (1, 1)
    assert not Worker(core).claim()


def test_what_expired_while_a_worker_held_it_is_told_once_though_the_worker_dies() -> None:
    told: list[Any] = []
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    batcher.on(JobFailed, lambda event: told.append((event.job, type(event.error))))
    batcher.submit("first")
    with batcher.hold():
        batcher.submit("a", delivery_timeout=1)
        batcher.submit("b")
        dead: Any = batcher._worker
        with batcher._core.collecting:
            dead._collect(wait=False)
        batcher.clock.advance(1)
        check(batcher)
        dead.gone = True
        check(batcher)
    assert told == [("a", OutcomeUnknown), ("b", WorkerDied)]


def test_P6_the_last_event_is_told_once_and_after_everything_else() -> None:
    told: list[Any] = []
    batcher = InlineBatcher(FaultyProcessor([OSError()]), retry=None, clock=ManualClock())
    batcher.on(JobFailed, told.append)
    batcher.on(BatcherShutDown, told.append)
    with batcher.hold():
        batcher.submit(1)
        core_of(batcher).close()
        assert check(batcher)
        assert told == []
    assert [type(event) for event in told] == [JobFailed, BatcherShutDown]
    assert not check(batcher)
    assert told[1] == BatcherShutDown(completed=0, failed=1, cancelled=0, unknown=0)
    batcher.shutdown()
    assert len(told) == 2


def test_a_future_that_somebody_is_entering_wait_with_is_tried_again_soon() -> None:
    batcher = InlineBatcher(FaultyProcessor(), clock=ManualClock())
    core = core_of(batcher)
    entered, leave = threading.Event(), threading.Event()

    def enter(condition: Any) -> None:
        with condition:
            entered.set()
            leave.wait(10)

    with batcher.hold():
        future = batcher.submit(1, delivery_timeout=5)
        thread = threading.Thread(target=enter, args=(future._condition,), daemon=True)
        thread.start()
        assert entered.wait(10)
        batcher.clock.advance(5)
        check(batcher)
        assert not future.done()
        assert core.next_check == pytest.approx(1005.01)
        leave.set()
        thread.join(10)
        check(batcher)
        assert isinstance(future.exception(0), DeliveryTimeout)
