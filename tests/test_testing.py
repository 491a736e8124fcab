"""What users test with: a batcher without threads, a clock, a processor that fails on cue, the contract suites."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from typing import Any

import pytest

from microbatch import (
    BatchProcessor,
    DeliveryTimeout,
    JobFailed,
    JobStatus,
    MicroBatcher,
    OutcomeUnknown,
    QueueFull,
    RetryPolicy,
)
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock, ProcessorContract, QueueContract

Inline = InlineBatcher[Any, Any]

# The clock.


def test_the_clock_stands_still_until_it_is_moved() -> None:
    clock = ManualClock()
    assert clock() == clock() == 1000.0
    clock.advance(2.5)
    assert clock() == 1002.5
    assert ManualClock(5.0)() == 5.0


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_the_clock_never_goes_back(seconds: float) -> None:
    clock = ManualClock()
    with pytest.raises(ValueError, match="moves forward only"):
        clock.advance(seconds)
    assert clock() == 1000.0


# The batcher without threads.


def test_a_submit_returns_a_resolved_future_and_starts_no_thread() -> None:
    before = set(threading.enumerate())
    batcher = Inline(FaultyProcessor(work=str.upper))
    future = batcher.submit("a")
    assert future.result(timeout=0) == "A"
    assert set(threading.enumerate()) <= before


def test_it_is_a_micro_batcher() -> None:
    assert issubclass(InlineBatcher, MicroBatcher)


def test_jobs_pile_up_while_it_is_held_and_holds_may_nest() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    with batcher.hold():
        batcher.submit("a")
        with batcher.hold():
            future = batcher.submit("b")
        assert future.status is JobStatus.PENDING
    assert processor.batches == [("a", "b")]


def test_what_is_held_is_processed_also_when_the_block_raises() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)

    def fail() -> None:
        with batcher.hold():
            batcher.submit("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert processor.batches == [("a",)]


def test_time_jumps_over_linger_and_back_off() -> None:
    batcher = Inline(
        FaultyProcessor([OSError()] * 3), linger=2.0, retry=RetryPolicy(backoff=1.0, backoff_max=4.0, retry_on=OSError)
    )
    begin = batcher.clock.now
    assert batcher.submit("a").result() == "a"
    assert 2.0 < batcher.clock.now - begin <= 2.0 + 1.0 + 2.0 + 4.0 + 0.5


def test_P5_a_processor_that_never_recovers_ends_at_the_deadline() -> None:
    batcher = Inline(FaultyProcessor([OSError()] * 10**6), retry=RetryPolicy(retry_on=OSError))
    begin = batcher.clock.now
    assert isinstance(batcher.submit("a").exception(), DeliveryTimeout)
    assert batcher.clock.now - begin == pytest.approx(20.0, abs=0.5)


def test_P5_retries_without_back_off_end_at_the_deadline_too() -> None:
    batcher = Inline(FaultyProcessor([OSError()] * 10**6), retry=RetryPolicy(backoff=0, retry_on=OSError))
    assert isinstance(batcher.submit("a", delivery_timeout=1.0).exception(), DeliveryTimeout)


def test_callbacks_and_listeners_of_expired_jobs_run_on_the_calling_thread_too() -> None:
    told: list[Any] = []
    batcher = Inline(FaultyProcessor())
    batcher.on(JobFailed, lambda event: told.append(threading.current_thread()))
    with batcher.hold():
        batcher.submit("a").add_done_callback(lambda _: told.append(threading.current_thread()))
        batcher.clock.advance(20)
    assert told == [threading.current_thread()] * 2


def test_two_batchers_can_share_a_clock() -> None:
    clock = ManualClock()
    first, second = Inline(FaultyProcessor(), clock=clock, linger=1.0), Inline(FaultyProcessor(), clock=clock)
    first.submit("a")
    assert second.clock.now == 1001.0


@pytest.mark.parametrize("when_full", ["block", "raise"])
def test_a_full_one_raises_at_once_for_nobody_could_make_room(when_full: str) -> None:
    batcher = Inline(FaultyProcessor(), max_outstanding=1, when_full=when_full)
    with batcher.hold():
        batcher.submit(1)
        with pytest.raises(QueueFull):
            batcher.submit(2, submit_timeout=3600)


def test_flush_and_shutdown_process_what_is_held() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    with batcher.hold():
        batcher.submit("a")
        assert batcher.flush()
        assert processor.batches == [("a",)]
        batcher.submit("b")
        report = batcher.shutdown()
        assert processor.batches == [("a",), ("b",)]
    assert (report.completed, report.finished, processor.closed) == (2, True, 1)


def test_a_shutdown_in_no_time_leaves_what_is_held_undelivered() -> None:
    batcher = Inline(FaultyProcessor())
    with batcher.hold():
        batcher.submit("a")
        assert batcher.shutdown(timeout=0).undelivered == ("a",)


def test_a_job_submitted_by_a_callback_is_processed_before_submit_returns() -> None:
    processor = FaultyProcessor[Any, Any]()
    batcher = Inline(processor)
    with batcher.hold():
        batcher.submit("first").add_done_callback(lambda _: batcher.submit("second"))
    assert processor.batches == [("first",), ("second",)]


def test_the_exit_of_a_process_does_not_wait_for_one_that_was_never_shut_down() -> None:
    script = (
        "from microbatch.testing import InlineBatcher\n"
        "batcher = InlineBatcher(lambda batch: None)\n"
        "batcher.submit(1)\n"
        "batcher._held = 1\n"
        "batcher.submit(2)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=10)


# The processor that fails on cue.


def test_the_script_is_followed_and_then_everything_works() -> None:
    processor = FaultyProcessor[int, int](
        [OSError("first"), None, lambda batch: [ValueError(job) for job in batch], OutcomeUnknown("?")],
        work=lambda job: job * 10,
    )
    batcher = Inline(processor)
    outcomes = [repr(future.exception() or future.result()) for future in map(batcher.submit, range(1, 6))]
    assert outcomes == ["OSError('first')", "20", "ValueError(3)", "OutcomeUnknown('?')", "50"]
    assert processor.batches == [(1,), (2,), (3,), (4,), (5,)]
    assert [batch.attempt for batch in processor.calls] == [1] * 5


def test_it_says_which_errors_are_retryable() -> None:
    processor = FaultyProcessor[int, int]([OSError()] * 2, retryable=(OSError,))
    assert Inline(processor).submit(1).result() == 1
    assert len(processor.calls) == 3


def test_it_counts_how_often_it_was_opened_and_closed() -> None:
    processor = FaultyProcessor[int, int]()
    with MicroBatcher(processor) as batcher:
        batcher.submit(1)
        batcher.submit(2)
    assert (processor.opened, processor.closed) == (1, 1)
    assert isinstance(processor, BatchProcessor)


# The contract suites, on processors of several kinds.


class TestFaultyProcessorKeepsTheContract(ProcessorContract):
    def make_processor(self) -> Any:
        return FaultyProcessor(work=lambda job: ("done", job))

    def make_jobs(self, n: int) -> list[int]:
        return list(range(n))

    def check(self, job: Any, result: Any) -> None:
        assert result == ("done", job)


class TestPlainFunctionKeepsTheContract(ProcessorContract):
    def make_processor(self) -> Any:
        return lambda batch: [{"id": job["n"]} for job in batch]

    def make_jobs(self, n: int) -> list[dict[str, int]]:
        return [{"n": number} for number in range(n)]

    def check(self, job: Any, result: Any) -> None:
        assert result == {"id": job["n"]}


class Table:
    """A processor with a resource that is opened and closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open_for: set[int] = set()

    def open(self) -> None:
        with self.lock:
            self.open_for.add(threading.get_ident())

    def close(self) -> None:
        with self.lock:
            self.open_for.clear()

    def process(self, batch: Any) -> list[int]:
        assert threading.get_ident() in self.open_for
        return [job + 1 for job in batch]


class TestTableKeepsTheContract(ProcessorContract):
    def make_processor(self) -> Any:
        return Table()

    def make_jobs(self, n: int) -> range:
        return range(n)

    def check(self, job: Any, result: Any) -> None:
        assert result == job + 1


class Crossed(ProcessorContract):
    def make_processor(self) -> Any:
        return lambda batch: list(reversed(batch))

    def make_jobs(self, n: int) -> range:
        return range(n)

    def check(self, job: Any, result: Any) -> None:
        assert result == job


class Stack(QueueContract):
    def make_queue(self) -> Any:
        return queue.LifoQueue()


class Blocking(QueueContract):
    def make_queue(self) -> Any:
        class Never(queue.SimpleQueue):  # type: ignore[type-arg]
            def get_nowait(self) -> Any:
                return None

        return Never()


def test_a_processor_that_crosses_results_fails_its_contract() -> None:
    with pytest.raises(AssertionError):
        Crossed().test_each_job_gets_its_own_result()


def test_a_stack_that_claims_to_be_fifo_fails_its_contract() -> None:
    with pytest.raises(AssertionError):
        Stack().test_items_come_in_their_order()


def test_a_queue_that_gives_something_although_it_is_empty_fails_its_contract() -> None:
    with pytest.raises(AssertionError, match=r"must raise queue\.Empty"):
        Blocking().test_an_empty_queue_raises_empty_and_does_not_block()


@pytest.mark.parametrize(
    "unfinished",
    [QueueContract().make_queue, ProcessorContract().make_processor, lambda: ProcessorContract().make_jobs(1)],
)
def test_a_suite_says_what_it_needs(unfinished: Any) -> None:
    with pytest.raises(NotImplementedError, match="return"):
        unfinished()
