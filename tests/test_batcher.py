"""The public API, method by method. Without threads where none matter; with them every wait is bounded."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, as_completed, wait
from typing import Any

import pytest
from interrupts import interrupted_everywhere
from naming import named

from microbatch import (
    BatchCompleted,
    BatcherClosed,
    BatcherShutDown,
    BatchFailed,
    BatchStarted,
    DeliveryTimeout,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobNotFound,
    JobRetrying,
    JobStatus,
    JobSubmitted,
    MicroBatcher,
    OutcomeUnknown,
    QueueFull,
    RetryPolicy,
    ShutdownReport,
    life,
)
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock

Inline = InlineBatcher[Any, Any]
PATIENCE = 20.0


class Steady(RetryPolicy):
    """Without jitter."""

    def delay(self, attempts: int, draw: object = None) -> float:
        return self.backoff


AGAIN = Steady(backoff=1.0, retry_on=OSError)


class Gate:
    """A processor that says when it has begun and goes on when it is let."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.open = threading.Event()
        self.batches: list[tuple[Any, ...]] = []

    def process(self, batch: Any) -> list[Any]:
        self.batches.append(batch[:])
        self.began.set()
        if not self.open.wait(PATIENCE):
            raise AssertionError("nobody let the processor go on")
        return list(batch)


class Gated:
    """`open` is a method of the contract, so the gate is behind a plain function."""

    def __init__(self, **options: Any) -> None:
        self.gate = Gate()
        self.batcher: MicroBatcher[Any, Any] = MicroBatcher(self.gate.process, **options)

    def __enter__(self) -> Gated:
        return self

    def __exit__(self, *exc: object) -> None:
        self.let_go()
        self.batcher.shutdown(timeout=PATIENCE)

    def busy(self) -> JobFuture[Any]:
        """The future of a job that the processor holds."""
        future = self.batcher.submit("busy")
        assert self.gate.began.wait(PATIENCE)
        return future

    def let_go(self) -> None:
        self.gate.open.set()


def in_thread(function: Callable[[], object]) -> Callable[[], Any]:
    """Start *function*; what is returned joins it and gives its answer or its exception."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append(function())
        except BaseException as exc:
            answer.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the thread hangs"
        return answer[0]

    return join


def wait_for_blocked(batcher: MicroBatcher[Any, Any], n: int = 1) -> None:
    pause = threading.Event()
    for _ in range(2000):
        if len(batcher._core.blocked) >= n:
            return
        pause.wait(0.005)
    raise AssertionError("no submit is blocked")


# submit: its arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"job_id": 5}, TypeError, "job_id must be a string, not 5"),
        ({"job_id": b"x"}, TypeError, "job_id must be a string, not b'x'"),
        ({"job_id": ""}, ValueError, "job_id must not be empty; leave it out"),
        ({"priority": 1.5}, TypeError, "priority must be a whole number, not 1.5"),
        ({"priority": "high"}, TypeError, "priority must be a whole number, not 'high'"),
        ({"priority": True}, TypeError, "priority must be a whole number, not True"),
        ({"submit_timeout": -1}, ValueError, "submit_timeout must be 0 or more seconds"),
        ({"submit_timeout": None}, TypeError, "submit_timeout must be a number of seconds, not None"),
        ({"delivery_timeout": 0}, ValueError, "delivery_timeout must be more than 0 seconds"),
        ({"delivery_timeout": "5"}, TypeError, "delivery_timeout must be a number of seconds, not '5'"),
    ],
    ids=named,
)
def test_a_wrong_argument_is_refused_and_the_job_is_not_accepted(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    batcher = Inline(FaultyProcessor())
    with pytest.raises(error, match=message):
        batcher.submit("job", **arguments)
    assert batcher.stats().submitted == 0


def test_P5_a_job_without_a_deadline_is_tried_until_it_succeeds() -> None:
    batcher = Inline(FaultyProcessor([OSError()] * 200), delivery_timeout=None, retry=RetryPolicy(retry_on=OSError))
    assert batcher.execute("job") == "job"
    assert batcher.stats().retries == 200


def test_P5_a_shutdown_gives_up_jobs_without_a_deadline_after_10_seconds() -> None:
    batcher = Inline(FaultyProcessor(itertools.repeat(OSError())), retry=RetryPolicy(retry_on=OSError))
    forever, bounded = batcher.submit("for ever", delivery_timeout=None), None
    with batcher.hold():
        bounded = batcher.submit("bounded", delivery_timeout=15)
        began = batcher.clock.now
        report = batcher.shutdown()
    assert (report.finished, report.undelivered) == (True, ("for ever",))
    assert isinstance(forever.exception(0), BatcherClosed)
    assert isinstance(bounded.exception(0), DeliveryTimeout)
    assert 15 <= batcher.clock.now - began < 16


@pytest.mark.parametrize("retry", [None, RetryPolicy(max_attempts=2, retry_on=OSError)])
def test_P6_a_shutdown_waits_for_a_slow_job_without_a_deadline(retry: RetryPolicy | None) -> None:
    clock = ManualClock()

    def slow(batch: Any) -> None:
        clock.now += 1000

    batcher = Inline(slow, delivery_timeout=None, retry=retry, clock=clock)
    with batcher.hold():
        future = batcher.submit("slow")
        assert batcher.shutdown().undelivered == ()
    assert future.status == "completed"


def test_P5_a_stuck_processor_does_not_hold_a_shutdown_without_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "CLOSE_SECONDS", 0.3)
    gate = threading.Event()
    batcher = MicroBatcher[str, Any](lambda batch: gate.wait(PATIENCE) and None, delivery_timeout=None)
    future = batcher.submit("stuck")
    try:
        assert batcher.shutdown().undelivered == ("stuck",)
        assert isinstance(future.exception(PATIENCE), OutcomeUnknown)
    finally:
        gate.set()


def test_a_job_may_live_for_ever_where_its_attempts_are_bounded() -> None:
    batcher = Inline(FaultyProcessor([OSError()] * 2), retry=RetryPolicy(max_attempts=3, retry_on=OSError))
    future = batcher.submit("job", delivery_timeout=None)
    assert future.result() == "job"


@pytest.mark.parametrize("job", [None, {}, [], 0, object(), JobFuture(), ValueError("a payload")], ids=named)
def test_any_object_is_a_job(job: Any) -> None:
    seen: list[Any] = []
    Inline(lambda batch: seen.extend(batch)).submit(job)
    assert seen == [job]


def test_options_of_submit_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Inline(FaultyProcessor()).submit("job", "id")  # type: ignore[misc]


def test_a_plain_function_is_handed_the_batch_as_a_processor_is() -> None:
    seen: list[Any] = []

    def work(batch: Any) -> list[Any]:
        seen.append((batch[:], batch.attempt, batch.trigger, batch.deadline))
        return [job.upper() for job in batch]

    assert Inline(work, clock=ManualClock()).submit("a").result() == "A"
    assert seen == [(("a",), 1, "idle", 1020.0)]


# submit: ids.


def test_an_id_is_made_only_when_it_is_asked_for_and_cannot_be_guessed() -> None:
    batcher = Inline(FaultyProcessor())
    futures = [batcher.submit(n) for n in range(100)]
    assert all(future._job_id is None for future in futures)
    ids = {future.job_id for future in futures}
    assert len(ids) == 100
    assert all(len(job_id) == 32 for job_id in ids)
    assert futures[0].job_id == futures[0].job_id


def test_a_job_is_found_by_an_id_that_was_made_after_its_end() -> None:
    batcher = Inline(FaultyProcessor())
    future = batcher.submit(1)
    assert batcher.future(future.job_id) is future
    assert batcher.status(future.job_id) is JobStatus.COMPLETED


def test_a_pending_a_processing_and_a_completed_job_share_their_future() -> None:
    processor = FaultyProcessor[Any, Any]([OSError()])
    batcher = Inline(processor, retry=AGAIN)
    with batcher.hold():
        first = batcher.submit("a", job_id="x")
        pending = batcher.submit("b", job_id="x")
        batcher._worker.turn(wait=False)
        assert first.status is JobStatus.PROCESSING
        processing = batcher.submit("c", job_id="x")
    completed = batcher.submit("d", job_id="x")
    assert {id(first)} == {id(pending), id(processing), id(completed)}
    assert processor.batches == [("a",), ("a",)]
    assert batcher.stats().submitted == 1


def test_an_unknown_job_keeps_its_id() -> None:
    batcher = Inline(FaultyProcessor([OutcomeUnknown()]))
    first = batcher.submit("a", job_id="x")
    assert first.status is JobStatus.UNKNOWN
    assert batcher.submit("a", job_id="x") is first


def test_after_failed_or_cancelled_the_id_is_free_again() -> None:
    processor = FaultyProcessor[Any, Any]([ValueError()])
    batcher = Inline(processor)
    failed = batcher.submit("a", job_id="x")
    with batcher.hold():
        cancelled = batcher.submit("b", job_id="x")
        assert cancelled is not failed
        cancelled.cancel()
        done = batcher.submit("c", job_id="x")
    assert done.result() == "c"
    assert batcher.future("x") is done
    assert processor.batches == [("a",), ("c",)]


def test_a_job_that_shares_takes_no_place_and_is_not_told() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor(), max_outstanding=1)
    batcher.on(JobSubmitted, told.append)
    with batcher.hold():
        first = batcher.submit("a", job_id="x", priority=3)
        assert batcher.submit("b", job_id="x") is first
    assert told == [JobSubmitted("a", "x", 3)]
    assert (batcher.stats().submitted, batcher.stats().rejected) == (1, 0)


def test_ids_are_of_one_batcher() -> None:
    first, second = Inline(FaultyProcessor()), Inline(FaultyProcessor())
    assert first.submit("a", job_id="x") is not second.submit("a", job_id="x")


def test_P6_an_id_opens_no_door_after_shutdown() -> None:
    batcher = Inline(FaultyProcessor())
    batcher.submit("a", job_id="x")
    batcher.shutdown()
    with pytest.raises(BatcherClosed):
        batcher.submit("a", job_id="x")
    assert batcher.status("x") is JobStatus.COMPLETED


# submit: priority.


def test_larger_priorities_go_first_and_equal_ones_in_their_order() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor, max_batch_size=2)
    with batcher.hold():
        for job, priority in (("a", 0), ("b", -1), ("c", 7), ("d", 0), ("e", 7)):
            batcher.submit(job, priority=priority)
        batcher.submit_many(["f", "g"], priority=3)
    assert processor.batches == [("c", "e"), ("f", "g"), ("a", "d"), ("b",)]


@pytest.mark.parametrize("kind", [queue.Queue, queue.LifoQueue, queue.SimpleQueue])
def test_a_priority_needs_a_queue_that_keeps_one(kind: Callable[[], Any]) -> None:
    batcher = Inline(FaultyProcessor(), queue=kind())
    with pytest.raises(ValueError, match=r"priority=5 needs a queue that keeps an order.*Use MemoryQueue"):
        batcher.submit(1, priority=5)
    with pytest.raises(ValueError, match="priority=5"):
        batcher.submit_many([1], priority=5)
    assert batcher.submit(1, priority=0).result() == 1


def test_payloads_are_never_compared() -> None:
    batcher = Inline(FaultyProcessor(), queue=queue.PriorityQueue(), max_batch_size=1)
    jobs: list[Any] = [{"n": 1}, {"n": 2}, {"n": 3}]
    with batcher.hold():
        futures = [batcher.submit(job, priority=1) for job in jobs]
    assert [future.result() for future in futures] == jobs


# submit: the bound.


def test_P5_a_full_batcher_that_raises_says_so_and_accepts_nothing() -> None:
    batcher = Inline(FaultyProcessor(), max_outstanding=2)
    with batcher.hold():
        batcher.submit_many([1, 2])
        with pytest.raises(QueueFull, match="no room for 1 more job: 2 outstanding of max_outstanding=2") as caught:
            batcher.submit(3)
        assert isinstance(caught.value, queue.Full)
    stats = batcher.stats()
    assert (stats.submitted, stats.rejected) == (2, 1)


def test_P5_queued_running_and_waiting_jobs_all_count() -> None:
    batcher = Inline(FaultyProcessor([OSError()]), max_outstanding=2, max_batch_size=1, retry=AGAIN)
    with batcher.hold():
        batcher.submit("waits for its retry")
        batcher._worker.turn(wait=False)
        batcher.submit("queued")
        with pytest.raises(QueueFull):
            batcher.submit("no room")


def test_a_cancelled_job_gives_its_place_back_at_once() -> None:
    batcher = Inline(FaultyProcessor(), max_outstanding=1)
    with batcher.hold():
        batcher.submit(1).cancel()
        assert batcher.submit(2).status is JobStatus.PENDING


def test_P5_a_full_submit_waits_its_own_time_and_no_longer() -> None:
    with Gated(max_outstanding=1, submit_timeout=60.0) as gated:
        gated.busy()
        with pytest.raises(QueueFull, match=r"for 0\.05 s: 1 outstanding"):
            gated.batcher.submit("late", submit_timeout=0.05)
        with pytest.raises(QueueFull):
            gated.batcher.submit("later", submit_timeout=0)
        stats = gated.batcher.stats()
    assert (stats.rejections["full"], stats.blocked_submits) == (2, 1)
    assert stats.blocked_seconds >= 0.05


def test_a_blocked_submit_goes_on_when_there_is_room() -> None:
    with Gated(max_outstanding=1, submit_timeout=PATIENCE) as gated:
        gated.busy()
        blocked = in_thread(lambda: gated.batcher.execute("second"))
        wait_for_blocked(gated.batcher)
        gated.let_go()
        assert blocked() == "second"
        stats = gated.batcher.stats()
    assert (stats.rejected, stats.blocked_submits) == (0, 1)
    assert 0 < stats.blocked_seconds < PATIENCE


def test_P6_a_blocked_submit_is_refused_when_shutdown_begins() -> None:
    with Gated(max_outstanding=1, submit_timeout=PATIENCE) as gated:
        running = gated.busy()
        blocked = in_thread(lambda: gated.batcher.submit("blocked"))
        wait_for_blocked(gated.batcher)
        gated.batcher.shutdown(wait=False)
        assert isinstance(blocked(), BatcherClosed)
        gated.let_go()
        assert running.result(PATIENCE) == "busy"
        assert gated.gate.batches == [("busy",)]


def test_a_submit_on_a_worker_never_waits_for_it() -> None:
    told: list[Any] = []

    def from_callback(future: Any) -> None:
        try:
            for n in range(3):
                gated.batcher.submit(n)
        except QueueFull as exc:
            told.append(str(exc))
        called.set()

    called = threading.Event()
    with Gated(max_outstanding=2, submit_timeout=10 * PATIENCE) as gated:
        gated.busy().add_done_callback(from_callback)
        gated.let_go()
        assert called.wait(PATIENCE)
        assert gated.batcher.shutdown(timeout=PATIENCE).completed == 3
    assert len(told) == 1
    assert "no room for 1 more job: 2 outstanding" in told[0]


# submit_many.


def test_submit_many_keeps_the_order_and_takes_any_iterable() -> None:
    processor = FaultyProcessor[Any, Any](work=lambda job: job * 2)
    batcher = Inline(processor, max_batch_size=4)
    futures = batcher.submit_many(n for n in range(10))
    assert [future.result() for future in futures] == [n * 2 for n in range(10)]
    assert [len(batch) for batch in processor.batches] == [4, 4, 2]


def test_submit_many_of_nothing_starts_nothing() -> None:
    batcher: MicroBatcher[Any, Any] = MicroBatcher(FaultyProcessor())
    assert batcher.submit_many([]) == []
    assert batcher._core.workers == []


def test_P1_submit_many_accepts_all_or_none() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor, max_outstanding=3)
    with batcher.hold():
        batcher.submit("first")
        with pytest.raises(QueueFull, match="no room for 3 more jobs: 1 outstanding of max_outstanding=3"):
            batcher.submit_many("abc")
        batcher.submit_many("de")
    assert processor.batches == [("first", "d", "e")]
    assert (batcher.stats().submitted, batcher.stats().rejected) == (3, 3)


def test_submit_many_of_more_than_will_ever_fit_is_refused_at_once() -> None:
    batcher: MicroBatcher[Any, Any] = MicroBatcher(FaultyProcessor(), max_outstanding=3, submit_timeout=3600)
    with pytest.raises(ValueError, match=r"4 jobs can never fit at once into max_outstanding=3: use map\(\)"):
        batcher.submit_many(range(4))
    assert batcher.stats().rejected == 4


def test_an_iterable_that_raises_leaves_nothing_behind() -> None:
    def jobs() -> Any:
        yield 1
        raise ZeroDivisionError

    batcher = Inline(FaultyProcessor())
    with pytest.raises(ZeroDivisionError):
        batcher.submit_many(jobs())
    assert batcher.stats().submitted == 0


def test_submit_many_tells_one_event_per_job() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor())
    batcher.on(JobSubmitted, told.append)
    batcher.submit_many("ab", priority=2)
    assert told == [JobSubmitted("a", None, 2), JobSubmitted("b", None, 2)]


class Nesting(queue.SimpleQueue):  # type: ignore[type-arg]
    """Submits while something is put, as a finaliser does that happens to run under the lock."""

    batcher: Any = None

    def put_nowait(self, item: Any) -> None:
        batcher, self.batcher = self.batcher, None
        if batcher is not None:
            batcher.submit("nested")
        super().put_nowait(item)


def test_P1_a_submit_in_the_middle_of_a_submit_is_accepted() -> None:
    nesting = Nesting()
    batcher = Inline(FaultyProcessor(), queue=lambda: nesting)
    nesting.batcher = batcher
    assert in_thread(lambda: batcher.submit("outer").result(PATIENCE))() == "outer"
    assert batcher.stats().completed == 2


def test_P1_a_submit_that_is_interrupted_anywhere_leaves_no_accepted_job_asleep_and_no_other_one_to_be_done() -> None:
    def prepare() -> Inline:
        batcher = Inline(FaultyProcessor())
        batcher.submit("first")
        batcher._held = 1
        batcher._core.wake_at = 0  # the worker is asleep
        batcher._core.alarm.take()
        return batcher

    accepted = refused = 0
    for where, batcher in interrupted_everywhere(prepare, lambda batcher: batcher.submit("job", job_id="x")):
        core = batcher._core
        asked_for = len(core.outstanding)
        if asked_for:
            assert core.bell.is_put(), where
            assert core.alarm.is_put(), where
        batcher._held = 0
        batcher.run()
        assert batcher.stats().completed == 1 + asked_for, where
        assert batcher.submit("after").result() == "after", where
        accepted += asked_for
        refused += not asked_for
    assert refused > 10
    assert accepted > 0


# execute.


def test_execute_returns_the_result_or_raises_the_error() -> None:
    bad = ValueError("bad")
    batcher = Inline(FaultyProcessor([None, bad]))
    assert batcher.execute("job", job_id="x", priority=1) == "job"
    with pytest.raises(ValueError, match="bad") as caught:
        batcher.execute("job")
    assert caught.value is bad


def test_P5_execute_is_bounded_by_its_delivery_timeout() -> None:
    batcher = Inline(FaultyProcessor([OSError()] * 99), retry=AGAIN)
    with pytest.raises(DeliveryTimeout, match="within 5 s"):
        batcher.execute("job", delivery_timeout=5)


def test_P5_a_retry_does_not_hold_up_its_neighbours() -> None:
    retry = Steady(backoff=PATIENCE / 2, backoff_max=PATIENCE / 2, retry_on=OSError)
    with MicroBatcher[Any, Any](FaultyProcessor([OSError()]), retry=retry, delivery_timeout=PATIENCE) as batcher:
        retrying = threading.Event()
        batcher.on(JobRetrying, lambda event: retrying.set())
        again = batcher.submit("again")
        assert retrying.wait(PATIENCE)
        assert batcher.submit("neighbour").result(PATIENCE / 4) == "neighbour"
        assert not again.done()
        batcher.shutdown(wait=False, timeout=0)


def test_what_would_wait_for_itself_is_refused_on_the_worker() -> None:
    told: dict[str, Any] = {}

    def attempt(name: str, function: Callable[[], object]) -> None:
        try:
            told[name] = function()
        except BaseException as exc:
            told[name] = exc

    def from_callback(future: Any) -> None:
        attempt("execute", lambda: gated.batcher.execute("job"))
        attempt("flush", lambda: gated.batcher.flush())
        attempt("result", lambda: gated.batcher.submit("job").result())
        attempt("shutdown", lambda: gated.batcher.shutdown())
        called.set()

    called = threading.Event()
    with Gated() as gated:
        gated.busy().add_done_callback(from_callback)
        gated.let_go()
        assert called.wait(PATIENCE)
        assert gated.batcher.shutdown(timeout=PATIENCE).finished
    refused = [told[name] for name in ("execute", "flush", "result")]
    assert [type(error) for error in refused] == [RuntimeError] * 3
    assert all("wait for itself" in str(error) for error in refused)
    assert told["shutdown"].finished is False


# status and future.


def test_a_job_that_nobody_knows_is_not_found() -> None:
    batcher = Inline(FaultyProcessor())
    for question in (batcher.status, batcher.future):
        with pytest.raises(JobNotFound, match="no job 'x' is outstanding or in the history"):
            question("x")
        with pytest.raises(TypeError, match="job_id must be a string, not 5"):
            question(5)  # type: ignore[arg-type]


def test_the_status_follows_the_future_through_every_word() -> None:
    seen: list[JobStatus] = []
    batcher = Inline(lambda batch: seen.append(batcher.status("x")))
    with batcher.hold():
        batcher.submit("a", job_id="x")
        seen.append(batcher.status("x"))
    seen.append(batcher.status("x"))
    assert [status.value for status in seen] == ["pending", "processing", "completed"]
    assert [status == status.value for status in seen] == [True] * 3


@pytest.mark.parametrize(
    ("fault", "status"), [(ValueError(), JobStatus.FAILED), (OutcomeUnknown(), JobStatus.UNKNOWN)], ids=named
)
def test_the_status_of_what_went_wrong(fault: Exception, status: JobStatus) -> None:
    batcher = Inline(FaultyProcessor([fault]))
    assert batcher.submit("a", job_id="x").status is status
    assert batcher.status("x") is status


def test_P5_the_history_is_bounded_by_number_and_by_time() -> None:
    batcher = Inline(FaultyProcessor(), history=2, history_ttl=10.0)
    for job_id in "abc":
        batcher.submit(1, job_id=job_id)
    with pytest.raises(JobNotFound):
        batcher.status("a")
    assert batcher.status("b") is JobStatus.COMPLETED
    batcher.clock.advance(10.0)
    with pytest.raises(JobNotFound):
        batcher.status("c")


def test_without_history_only_outstanding_jobs_are_known() -> None:
    batcher = Inline(FaultyProcessor(), history=0)
    with batcher.hold():
        batcher.submit(1, job_id="x")
        assert batcher.status("x") is JobStatus.PENDING
    with pytest.raises(JobNotFound):
        batcher.status("x")


def test_a_job_that_waits_for_a_retry_is_processing_and_cannot_be_cancelled() -> None:
    batcher = Inline(FaultyProcessor([OSError()]), retry=AGAIN)
    with batcher.hold():
        future = batcher.submit(1, job_id="x")
        batcher._worker.turn(wait=False)
        assert future.status is JobStatus.PROCESSING
        assert not future.cancel()
        batcher.clock.advance(1.0)
    assert future.result() == 1


# cancel.


def test_a_cancelled_job_is_never_handed_over() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    with batcher.hold():
        gone, kept = batcher.submit_many("ab")
        assert gone.cancel()
        assert gone.cancel()
        assert gone.status is JobStatus.CANCELLED
    with pytest.raises(CancelledError):
        gone.result()
    assert kept.result() == "b"
    assert not kept.cancel()
    assert processor.batches == [("b",)]
    assert batcher.stats().cancelled == 1


def test_P1_a_cancelled_job_is_done_for_who_waits_for_several() -> None:
    batcher = Inline(FaultyProcessor())
    with batcher.hold():
        gone, kept = batcher.submit_many("ab")
        gone.cancel()
        assert wait([gone, kept], timeout=0) == ({gone}, {kept})
    assert list(as_completed([gone], timeout=0)) == [gone]


def test_cancelling_tells_once_and_runs_the_callbacks() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor())
    batcher.on(JobCancelled, told.append)
    with batcher.hold():
        future = batcher.submit("a", job_id="x")
        future.add_done_callback(told.append)
        batcher.clock.advance(2.0)
        future.cancel()
        future.cancel()
    assert told == [future, JobCancelled("a", "x", 2.0)]


def test_a_job_that_the_processor_holds_cannot_be_cancelled() -> None:
    with Gated() as gated:
        running = gated.busy()
        assert not running.cancel()
        gated.let_go()
        assert running.result(PATIENCE) == "busy"


def test_P7_an_inherited_future_has_no_hold_on_the_jobs_of_the_child() -> None:
    batcher = Inline(FaultyProcessor())
    with batcher.hold():
        inherited = batcher.submit_many("abc")
        inherited[2].cancel()
        batcher._core.forget_parent()  # what a fork does to the child
        own = batcher.submit_many("def")
        assert not {future._sequence for future in own} & {future._sequence for future in inherited}
        assert [future.cancel() for future in inherited] == [False, False, True]
        assert batcher.status(inherited[0].job_id) is JobStatus.UNKNOWN
        assert [future.status for future in own] == [JobStatus.PENDING] * 3
    assert [future.result() for future in own] == ["d", "e", "f"]


# flush.


def test_flush_of_nothing_is_true() -> None:
    assert MicroBatcher(FaultyProcessor()).flush() is True
    assert Inline(FaultyProcessor()).flush(0) is True


def test_flush_closes_the_open_batch() -> None:
    with MicroBatcher[Any, Any](FaultyProcessor(), linger=PATIENCE / 2, delivery_timeout=60) as batcher:
        futures = batcher.submit_many("abc")
        assert batcher.flush(PATIENCE / 4)
        assert [future.result(0) for future in futures] == ["a", "b", "c"]
        assert batcher.stats().triggers["flush"] == 1


def test_P5_flush_gives_up_at_its_timeout_and_the_jobs_go_on() -> None:
    with Gated() as gated:
        running = gated.busy()
        assert gated.batcher.flush(0.02) is False
        assert gated.batcher.flush(0) is False
        gated.let_go()
        assert gated.batcher.flush(PATIENCE) is True
        assert running.done()


def test_flush_waits_for_retries() -> None:
    batcher = Inline(FaultyProcessor([OSError()]), retry=AGAIN)
    with batcher.hold():
        future = batcher.submit(1)
        assert batcher.flush()
        assert future.result() == 1


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError), (float("nan"), ValueError)])
def test_flush_and_shutdown_refuse_a_wrong_timeout(timeout: Any, error: type[Exception]) -> None:
    batcher = Inline(FaultyProcessor())
    with pytest.raises(error, match="timeout"):
        batcher.flush(timeout)
    with pytest.raises(error, match="timeout"):
        batcher.shutdown(timeout=timeout)
    assert batcher.submit(1).result() == 1


# shutdown.


def test_P6_shutdown_processes_what_was_accepted_retries_included() -> None:
    batcher = Inline(FaultyProcessor([OSError()]), retry=AGAIN, linger=5.0)
    with batcher.hold():
        futures = batcher.submit_many("ab")
        report = batcher.shutdown()
    assert [future.result() for future in futures] == ["a", "b"]
    assert report == ShutdownReport(completed=2, failed=0, cancelled=0, unknown=0, undelivered=(), finished=True)
    assert batcher.stats().triggers == {"size": 0, "idle": 0, "linger": 0, "flush": 0, "retry": 0, "shutdown": 2}


class Turnstile:
    """A lock before which somebody else gets his turn, once."""

    def __init__(self, lock: Any, first: Callable[[], object]) -> None:
        self.lock = lock
        self.first: Callable[[], object] | None = first

    def __enter__(self) -> None:
        first, self.first = self.first, None
        if first is not None:
            first()
        self.lock.__enter__()

    def __exit__(self, *exc: object) -> None:
        self.lock.__exit__(*exc)

    def _is_owned(self) -> bool:
        return bool(self.lock._is_owned())


@pytest.mark.parametrize("submit", ["submit", "submit_many"])
def test_P6_no_submit_slips_past_the_end_of_a_shutdown(submit: str) -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    batcher.submit("first")
    core: Any = batcher._core
    core.lock = Turnstile(core.lock, core.close)
    with pytest.raises(BatcherClosed):
        getattr(batcher, submit)("x")
    assert batcher.shutdown().finished
    assert processor.batches == [("first",)]
    assert batcher.stats().submitted == 1


def test_P6_the_last_event_is_the_last() -> None:
    told: list[Any] = []
    began, go_on = threading.Event(), threading.Event()
    batcher = MicroBatcher[Any, Any](FaultyProcessor())

    @batcher.on(JobCompleted)
    def slow(event: JobCompleted) -> None:
        began.set()
        assert go_on.wait(PATIENCE)

    for event_type in (JobCompleted, BatchCompleted, BatcherShutDown):
        batcher.on(event_type, told.append)
    batcher.submit("a")
    assert began.wait(PATIENCE)
    closing = in_thread(batcher.shutdown)
    assert not batcher.shutdown(timeout=0).finished
    go_on.set()
    assert closing().finished
    assert [type(event) for event in told] == [JobCompleted, BatchCompleted, BatcherShutDown]


def test_P6_shutdown_waits_for_retries_also_with_threads() -> None:
    batcher = MicroBatcher[Any, Any](FaultyProcessor([OSError()]), retry=Steady(backoff=0.05, retry_on=OSError))
    future = batcher.submit("a")
    report = batcher.shutdown(timeout=PATIENCE)
    assert future.result(0) == "a"
    assert (report.completed, report.undelivered, report.finished) == (1, (), True)


def test_P6_after_shutdown_everything_is_refused() -> None:
    batcher = Inline(FaultyProcessor())
    batcher.submit(1)
    batcher.shutdown()
    for refused in (lambda: batcher.submit(1), lambda: batcher.submit_many([1]), lambda: batcher.execute(1)):
        with pytest.raises(BatcherClosed, match="shut down: the job was not accepted"):
            refused()
    assert batcher.stats().submitted == 1
    assert batcher.flush()


def test_shutdown_before_the_first_job_starts_nothing_and_finishes() -> None:
    processor = FaultyProcessor[Any, Any]()
    told: list[Any] = []
    batcher: MicroBatcher[Any, Any] = MicroBatcher(processor)
    batcher.on(BatcherShutDown, told.append)
    before = set(threading.enumerate())
    assert batcher.shutdown().finished
    assert batcher.shutdown().finished
    assert told == [BatcherShutDown(0, 0, 0, 0)]
    assert (processor.opened, processor.closed) == (0, 0)
    assert set(threading.enumerate()) <= before
    with pytest.raises(BatcherClosed):
        batcher.submit(1)


def test_shutdown_is_idempotent_and_every_report_is_the_whole() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher: MicroBatcher[Any, Any] = MicroBatcher(processor)
    batcher.submit(1)
    reports = [in_thread(batcher.shutdown) for _ in range(4)]
    assert {report().completed for report in reports} == {1}
    assert batcher.shutdown().finished
    assert processor.closed == 1


def test_P6_cancel_futures_cancels_what_is_queued() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    with batcher.hold():
        futures = batcher.submit_many("ab")
        report = batcher.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    assert processor.batches == []
    assert report == ShutdownReport(0, 0, 2, 0, (), True)


def test_P6_cancel_futures_fails_what_waits_for_a_retry() -> None:
    lost = OSError("lost")
    batcher = Inline(FaultyProcessor([lost]), retry=AGAIN)
    with batcher.hold():
        future = batcher.submit("a")
        batcher._worker.turn(wait=False)
        report = batcher.shutdown(cancel_futures=True)
    error = future.exception()
    assert type(error) is BatcherClosed
    assert error.__cause__ is lost
    assert report == ShutdownReport(0, 1, 0, 0, (), True)


def test_P4_cancel_futures_does_not_call_an_undecided_job_failed() -> None:
    batcher = Inline(FaultyProcessor([OutcomeUnknown("lost")], retryable=(OutcomeUnknown,)), retry=AGAIN)
    with batcher.hold():
        future = batcher.submit("a")
        batcher._worker.turn(wait=False)
        report = batcher.shutdown(cancel_futures=True)
    assert future.status is JobStatus.UNKNOWN
    assert (report.unknown, report.failed) == (1, 0)


def test_P6_a_timeout_hands_back_what_it_cut_off() -> None:
    batcher = Inline(FaultyProcessor(), max_batch_size=1)
    with batcher.hold():
        futures = batcher.submit_many("ab")
        report = batcher.shutdown(timeout=0)
    assert report == ShutdownReport(0, 2, 0, 0, ("a", "b"), True)
    assert [type(future.exception()) for future in futures] == [BatcherClosed] * 2


def test_P6_a_stuck_processor_does_not_hold_up_a_shutdown_with_a_timeout() -> None:
    with Gated() as gated:
        running = gated.busy()
        queued = gated.batcher.submit("queued")
        report = gated.batcher.shutdown(timeout=0.05)
        assert report.finished
        assert report.undelivered == ("busy", "queued")
        assert (running.status, queued.status) == (JobStatus.UNKNOWN, JobStatus.FAILED)
        assert isinstance(queued.exception(), BatcherClosed)
        gated.let_go()
    assert gated.gate.batches == [("busy",)]


def test_P6_the_earliest_of_several_timeouts_wins() -> None:
    with Gated() as gated:
        running = gated.busy()
        gated.batcher.shutdown(wait=False, timeout=0.05)
        assert gated.batcher.shutdown(timeout=PATIENCE).finished
        assert running.status is JobStatus.UNKNOWN


def test_P6_without_wait_the_supervisor_keeps_the_timeout() -> None:
    with Gated() as gated:
        running = gated.busy()
        assert gated.batcher.shutdown(wait=False, timeout=0.5).finished is False
        assert isinstance(running.exception(PATIENCE), OutcomeUnknown)


def test_the_processor_is_closed_once_by_the_last_worker() -> None:
    processor = FaultyProcessor[Any, Any]()
    with MicroBatcher[Any, Any](processor, max_concurrent_batches=3, max_batch_size=1) as batcher:
        batcher.submit_many(range(30))
    assert processor.closed == 1
    assert 1 <= processor.opened <= 3


# with, repr, subscripts.


def test_with_drains_also_when_its_body_raises() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = MicroBatcher[Any, Any](processor)
    future = batcher.submit(1)
    with pytest.raises(ZeroDivisionError), batcher:
        raise ZeroDivisionError
    assert future.result(0) == 1
    assert batcher.stats().outstanding == 0


def test_the_text_of_a_batcher_says_how_it_is_and_no_payload() -> None:
    batcher = Inline(FaultyProcessor(), name="payments")
    with batcher.hold():
        batcher.submit("secret")
        assert repr(batcher) == "<InlineBatcher 'payments', open, 1 outstanding>"
        batcher._core.close()
        assert repr(batcher) == "<InlineBatcher 'payments', shutting down, 1 outstanding>"
    assert repr(batcher) == "<InlineBatcher 'payments', shut down, 0 outstanding>"
    assert repr(MicroBatcher(FaultyProcessor())) == "<MicroBatcher 'microbatch', open, 0 outstanding>"


def test_the_types_can_be_subscripted() -> None:
    assert isinstance(MicroBatcher[int, str](FaultyProcessor()), MicroBatcher)
    assert isinstance(InlineBatcher[int, str](FaultyProcessor()), InlineBatcher)
    assert JobFuture[int] is not None


def test_a_forgotten_batcher_is_collected_and_drains() -> None:
    told: list[Any] = []
    batcher: MicroBatcher[Any, Any] = MicroBatcher(FaultyProcessor())
    done = threading.Event()
    batcher.on(BatcherShutDown, lambda event: (told.append(event), done.set()))
    batcher.submit(1)
    gone = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert gone() is None
    assert done.wait(PATIENCE)
    assert told == [BatcherShutDown(1, 0, 0, 0)]


def test_P5_a_batcher_whose_listener_holds_it_is_collected_after_its_shutdown() -> None:
    def use() -> tuple[weakref.ref[Any], ...]:
        batcher: MicroBatcher[Any, Any] = MicroBatcher(FaultyProcessor(), name="held")
        batcher.on(JobCompleted, lambda event: batcher)
        batcher.execute(1)
        batcher.shutdown()
        return weakref.ref(batcher), weakref.ref(batcher._core)

    used = use()
    for thread in threading.enumerate():
        if thread.name.startswith("held-"):
            thread.join(PATIENCE)
    gc.collect()
    assert [there() for there in used] == [None, None]


# on and off.


def tellers(batcher: MicroBatcher[Any, Any]) -> list[Any]:
    told: list[Any] = []
    for event_type in (
        *(JobSubmitted, JobRetrying, JobCompleted, JobFailed, JobCancelled),
        *(BatchStarted, BatchCompleted, BatchFailed, BatcherShutDown),
    ):
        batcher.on(event_type, told.append)
    return told


def test_the_events_of_a_job_that_is_done() -> None:
    batcher = Inline(FaultyProcessor(work=str.upper))
    told = tellers(batcher)
    with batcher.hold():
        batcher.submit("a", job_id="x", priority=4)
        batcher.clock.advance(2.0)
    batch_id = told[1].batch_id
    assert told == [
        JobSubmitted("a", "x", 4),
        BatchStarted(batch_id, 1, 1, "idle"),
        JobCompleted("a", "x", 1, batch_id, "A", 2.0, waited=2.0),
        BatchCompleted(batch_id, 1, 1, "idle", 0, 0.0),
    ]


def test_the_events_of_a_job_that_is_retried_and_fails_carry_the_job() -> None:
    first, last = OSError("first"), ValueError("last")
    batcher = Inline(FaultyProcessor([first, last]), retry=AGAIN)
    told = tellers(batcher)
    batcher.submit("a")
    one, two = told[1].batch_id, told[4].batch_id
    assert one != two
    assert told == [
        JobSubmitted("a", None, 0),
        BatchStarted(one, 1, 1, "idle"),
        JobRetrying("a", None, 1, one, first, 1.0),
        BatchFailed(one, 1, 1, "idle", first, 0.0),
        BatchStarted(two, 1, 2, "retry"),
        JobFailed("a", None, 2, two, last, 1.0, waited=1.0),
        BatchFailed(two, 1, 2, "retry", last, 0.0),
    ]


def test_the_time_in_the_processor_is_no_waiting() -> None:
    clock = ManualClock()

    def slow(batch: Any) -> list[Any]:
        clock.advance(3.0)
        return [None, ValueError()]

    batcher, told = InlineBatcher[Any, Any](slow, clock=clock), list[Any]()
    batcher.on(JobCompleted, told.append)
    batcher.on(JobFailed, told.append)
    with batcher.hold():
        batcher.submit_many("ab")
        clock.advance(1.0)
    assert [(event.seconds, event.waited) for event in told] == [(4.0, 1.0)] * 2


def test_the_time_in_a_callback_is_no_time_of_a_job_or_its_batch() -> None:
    batcher = Inline(FaultyProcessor([lambda batch: [None, ValueError()]]))
    told = tellers(batcher)
    with batcher.hold():
        for future in batcher.submit_many("ab"):
            future.add_done_callback(lambda future: batcher.clock.advance(5.0))
    assert [event.seconds for event in told if isinstance(event, JobCompleted | JobFailed | BatchCompleted)] == [
        0.0
    ] * 3


def test_what_tracing_keeps_of_a_submit_comes_with_the_begin_of_its_batch() -> None:
    places = iter(["here", None, "there"])

    def traced(core: Any) -> JobFuture[Any]:
        future: JobFuture[Any] = JobFuture(core)
        future._origin = next(places)
        return future

    batcher, told = Inline(FaultyProcessor()), list[Any]()
    batcher.on(BatchStarted, told.append)
    batcher._core.new_future = traced
    with batcher.hold():
        batcher.submit(1)
        batcher.submit_many([2, 3])
    assert [event.origins for event in told] == [("here", "there")]


def test_the_dead_letter_hook_hears_of_jobs_that_never_saw_a_batch() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor())
    batcher.on(JobFailed, told.append)
    with batcher.hold():
        future = batcher.submit("a", job_id="x", delivery_timeout=5)
        batcher.clock.advance(6.0)
    assert told == [JobFailed("a", "x", 0, None, future.exception(0), 6.0, waited=None)]  # type: ignore[arg-type]


def test_futures_are_resolved_and_callbacks_have_run_before_the_event() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor())
    batcher.on(JobCompleted, lambda event: told.append(("event", futures[0].done(), futures[1].done())))
    with batcher.hold():
        futures = batcher.submit_many("ab")
        futures[1].add_done_callback(lambda future: told.append(("callback", futures[0].done())))
    assert told == [("callback", True), ("event", True, True), ("event", True, True)]


def test_on_is_a_decorator_too_and_gives_the_function_back() -> None:
    batcher = Inline(FaultyProcessor())
    told: list[Any] = []

    @batcher.on(JobCompleted)
    def listener(event: JobCompleted) -> None:
        told.append(event.result)

    assert batcher.on(JobFailed, listener) is listener
    batcher.submit(1)
    batcher.off(JobCompleted, listener)
    batcher.submit(2)
    assert told == [1]


def test_off_takes_a_bound_method_and_refuses_a_stranger() -> None:
    class Ear:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def hear(self, event: JobCompleted) -> None:
            self.heard.append(event)

    ear, batcher = Ear(), Inline(FaultyProcessor())
    batcher.on(JobCompleted, ear.hear)
    batcher.off(JobCompleted, ear.hear)
    batcher.submit(1)
    assert ear.heard == []
    with pytest.raises(ValueError, match="does not listen to JobCompleted"):
        batcher.off(JobCompleted, ear.hear)
    with pytest.raises(TypeError, match="not an event type"):
        batcher.on("JobCompleted", ear.hear)  # type: ignore[call-overload]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_P1_what_listeners_and_callbacks_raise_changes_nothing(error: type[BaseException]) -> None:
    def broken(_: object) -> None:
        raise error("broken")

    batcher = Inline(FaultyProcessor([None, ValueError("bad")]))
    for event_type in (BatchStarted, JobCompleted, JobFailed, BatchCompleted, BatchFailed, BatcherShutDown):
        batcher.on(event_type, broken)
    with batcher.hold():
        good = batcher.submit("good")
        good.add_done_callback(broken)
        last: list[Any] = []
        good.add_done_callback(last.append)
    bad = batcher.submit("bad")
    assert good.result() == "good"
    assert str(bad.exception()) == "bad"
    assert last == [good]
    assert batcher.shutdown().finished


def test_listeners_and_callbacks_may_submit_cancel_and_shut_down() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor, max_batch_size=1)
    with batcher.hold():
        first = batcher.submit("first")
        second = batcher.submit("second")
        first.add_done_callback(lambda _: second.cancel())
        first.add_done_callback(lambda _: batcher.submit("third"))
        batcher.on(JobCompleted, lambda event: event.job == "third" and batcher.shutdown())
    assert second.cancelled()
    assert processor.batches == [("first",), ("third",)]
    assert batcher.shutdown().finished


# Promises that threads make interesting.


def test_P2_P3_every_job_gets_its_own_outcome_from_many_threads() -> None:
    def work(batch: Any) -> list[Any]:
        return [ValueError(job) if job[1] % 7 == 0 else job for job in batch]

    with MicroBatcher[Any, Any](work, max_batch_size=13, max_concurrent_batches=2, max_outstanding=50) as batcher:

        def submit(client: int) -> int:
            wrong = 0
            for n in range(200):
                future = batcher.submit((client, n))
                error = future.exception(PATIENCE)
                if n % 7 == 0:
                    wrong += error is None or error.args != ((client, n),)
                else:
                    wrong += error is not None or future.result() != (client, n)
            return wrong

        clients = [in_thread(lambda client=client: submit(client)) for client in range(4)]  # type: ignore[misc]
        assert [client() for client in clients] == [0] * 4
        stats = batcher.stats()
    failed = len(range(0, 200, 7)) * 4
    assert (stats.submitted, stats.completed, stats.failed, stats.outstanding) == (800, 800 - failed, failed, 0)


def test_submitted_is_always_the_sum_of_outcomes_and_outstanding() -> None:
    stop = threading.Event()
    with MicroBatcher[Any, Any](lambda batch: None, max_batch_size=5, max_concurrent_batches=2) as batcher:

        def look() -> int:
            seen = 0
            while not (seen and stop.is_set()):
                stats = batcher.stats()
                ended = stats.completed + stats.failed + stats.cancelled + stats.unknown
                assert stats.submitted == ended + stats.outstanding
                assert stats.queued <= stats.outstanding
                seen += 1
            return seen

        looking = in_thread(look)
        for n in range(2000):
            future = batcher.submit(n)
            if n % 5 == 0:
                future.cancel()
        assert batcher.flush(PATIENCE)
        stop.set()
        assert looking() > 0
        assert batcher.stats().submitted == 2000


def test_no_thread_starts_before_the_first_submit() -> None:
    before = set(threading.enumerate())
    batcher: MicroBatcher[Any, Any] = MicroBatcher(FaultyProcessor(), name="quiet")
    batcher.on(JobCompleted, print)
    batcher.flush()
    batcher.stats()
    assert set(threading.enumerate()) <= before
    batcher.off(JobCompleted, print)
    batcher.submit(1).result(PATIENCE)
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert names == {"quiet-supervisor", "quiet-worker-0"}
    batcher.shutdown()


def test_one_worker_keeps_the_order_of_submits() -> None:
    seen: list[int] = []
    with MicroBatcher[Any, Any](lambda batch: seen.extend(batch), max_batch_size=7) as batcher:
        for n in range(500):
            batcher.submit(n)
    assert seen == list(range(500))


def test_the_report_is_a_frozen_record() -> None:
    report = Inline(FaultyProcessor()).shutdown()
    assert [field.name for field in dataclasses.fields(report)] == [
        "completed",
        "failed",
        "cancelled",
        "unknown",
        "undelivered",
        "finished",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.finished = False
