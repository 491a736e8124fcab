"""P1, P2, P5 and P6 with real threads: events and barriers, every wait bounded."""

from __future__ import annotations

import collections
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, CancelledError, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import Any

import pytest
from interrupts import bounded
from naming import named

from microbatch import (
    Batch,
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
    JobRetrying,
    JobStatus,
    JobSubmitted,
    MicroBatcher,
    OutcomeUnknown,
    ProcessorContractError,
    QueueFull,
    RetryPolicy,
)
from microbatch.errors import in_parts, parts_of
from microbatch.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)

# No wait in these tests is longer; a wait that takes so long is a failure.
BOUND = 15.0
# What a deadline may be late by, on a machine that does other things as well.
LATE = 1.5


class Held:
    """Echoes. While it is held, `process` does not return."""

    def __init__(self) -> None:
        self.inside = threading.Semaphore(0)  # one release per call
        self.go = threading.Event()
        self.batches: list[Batch[Any]] = []
        self.abandoned: list[Batch[Any]] = []

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.batches.append(batch)
        go = self.go  # before anybody is told: a test may put another one in its place then
        self.inside.release()
        assert go.wait(BOUND)
        return list(batch)

    def abandon(self, batch: Batch[Any]) -> None:
        self.abandoned.append(batch)

    def entered(self) -> None:
        assert self.inside.acquire(timeout=BOUND), "the worker did not call the processor"

    def seen(self) -> list[Any]:
        return [job for batch in self.batches for job in batch]


@contextmanager
def batcher_of(processor: Any, **options: Any) -> Iterator[MicroBatcher[Any, Any]]:
    """A batcher that is shut down at the end, and must then be finished with nothing outstanding."""
    batcher = MicroBatcher[Any, Any](processor, **options)
    try:
        yield batcher
    finally:
        if isinstance(processor, Held):
            processor.go.set()
        report = batcher.shutdown(timeout=BOUND)
    assert report.finished
    stats = batcher.stats()
    assert stats.outstanding == 0
    assert stats.submitted == stats.completed + stats.failed + stats.cancelled + stats.unknown


@contextmanager
def threads(*targets: Callable[[], object]) -> Iterator[None]:
    """Run the *targets* next to the block; what they raise is raised here."""
    errors: list[BaseException] = []

    def run(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as exc:
            errors.append(exc)

    started = [threading.Thread(target=run, args=(target,), daemon=True) for target in targets]
    for thread in started:
        thread.start()
    yield
    give_up = time.monotonic() + BOUND
    for thread in started:
        thread.join(max(0.0, give_up - time.monotonic()))
    assert not any(thread.is_alive() for thread in started), "a thread hangs"
    if errors:
        raise errors[0]


@contextmanager
def tiny_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Steady(RetryPolicy):
    """Without jitter."""

    def delay(self, attempts: int, draw: object = None) -> float:
        return self.backoff


def eventually(question: Callable[[], Any]) -> None:
    give_up = time.monotonic() + BOUND
    while not question():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.001)


def echo(batch: Batch[Any]) -> list[Any]:
    return list(batch)


# P1: one outcome, whatever the processor does.


class CustomBase(BaseException):
    pass


class Uncopyable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")

    def __copy__(self) -> Uncopyable:
        raise TypeError("no copies")


def too_deep(batch: Batch[Any]) -> Any:
    return too_deep(batch)


def raises(error: BaseException) -> Callable[[Batch[Any]], Any]:
    def process(batch: Batch[Any]) -> Any:
        if "good" in batch:
            return list(batch)
        raise error

    return process


ERRORS = [
    ValueError("x"),
    SystemExit(3),
    KeyboardInterrupt(),
    MemoryError(),
    GeneratorExit(),
    StopAsyncIteration(),
    CustomBase("x"),
    Uncopyable("a", "b"),
    CancelledError(),
    FutureTimeoutError(),
    QueueFull("the processor's own"),
    BatcherClosed("the processor's own"),
    RecursionError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_p1_whatever_the_processor_raises_fails_its_batch_and_not_the_worker(error: BaseException) -> None:
    with batcher_of(raises(error)) as batcher:
        futures = batcher.submit_many([1, 2, 3])
        assert not wait(futures, BOUND).not_done
        for future in futures:
            assert type(future.exception(0)) is type(error)
            assert future.status is JobStatus.FAILED
        if not isinstance(error, Uncopyable):
            assert len({id(future.exception(0)) for future in futures}) == 3
        assert batcher.submit("good").result(BOUND) == "good"
        assert batcher.stats().failed == 3


def test_p1_stop_iteration_and_a_real_recursion_error() -> None:
    with batcher_of(raises(StopIteration("x"))) as batcher:
        error = batcher.submit(1).exception(BOUND)
        assert isinstance(error, RuntimeError)
        assert batcher.submit("good").result(BOUND) == "good"
    with batcher_of(lambda batch: list(batch) if "good" in batch else too_deep(batch)) as batcher:
        assert isinstance(batcher.submit(1).exception(BOUND), RecursionError)
        assert batcher.submit("good").result(BOUND) == "good"


def test_P5_a_job_with_less_time_than_the_linger_is_taken_before_its_deadline() -> None:
    with batcher_of(lambda batch: list(batch), linger=60.0, delivery_timeout=300.0) as batcher:
        first = batcher.submit("asleep until it has lingered")
        time.sleep(0.05)
        assert batcher.submit("hasty", delivery_timeout=1.0).result(BOUND) == "hasty"
        assert first.result(BOUND)
        alone = batcher.submit("alone", delivery_timeout=1.0)
        assert alone.result(BOUND) == "alone"
        assert batcher.stats().triggers["linger"] == 2


def test_P5_deadlines_are_kept_where_the_supervisor_dies_while_the_worker_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    die, run = threading.Event(), Supervisor.run

    def run_or_die(supervisor: Supervisor) -> None:
        if not die.is_set():
            assert die.wait(BOUND)
            raise SystemExit
        run(supervisor)

    monkeypatch.setattr(Supervisor, "run", run_or_die)
    processor = Held()
    with batcher_of(processor, max_batch_size=1) as batcher:
        batcher.submit("held")
        processor.entered()
        short = batcher.submit("short", delivery_timeout=0.3)
        die.set()
        assert isinstance(short.exception(BOUND / 2), DeliveryTimeout)


def test_P6_a_shutdown_that_is_woken_all_the_time_ends_within_its_timeout() -> None:
    """As by threads that die as soon as they are started."""
    over = threading.Event()

    def wake() -> None:
        while not over.is_set():
            for token in batcher._core.closers:
                token.put()

    with batcher_of(lambda batch: list(batch)) as batcher:
        batcher.on(BatcherShutDown, lambda event: over.wait(BOUND))
        assert batcher.submit("job").result(BOUND) == "job"
        with threads(wake):
            began = time.monotonic()
            assert not batcher.shutdown(timeout=0.1).finished
            assert time.monotonic() - began < BOUND / 2
            over.set()


@pytest.mark.parametrize("waits", [False, True])
def test_P6_a_cancel_tells_its_event_before_the_last_one(waits: bool) -> None:
    heard: list[str] = []
    with batcher_of(lambda batch: list(batch), linger=60.0, delivery_timeout=300.0) as batcher:
        for kind in (JobCancelled, BatcherShutDown):
            batcher.on(kind, lambda event: heard.append(type(event).__name__))
        future = batcher.submit("job")

        def shut_down(_: Any) -> None:
            assert batcher.shutdown(waits).finished == waits
            # Whoever waits in here would wait for itself if the last event waited for this cancel.
            time.sleep(0.1)

        future.add_done_callback(shut_down)
        began = time.monotonic()
        assert future.cancel()
        assert batcher.shutdown(timeout=BOUND).finished
        assert time.monotonic() - began < BOUND / 2
    assert heard == (["BatcherShutDown", "JobCancelled"] if waits else ["JobCancelled", "BatcherShutDown"])


def test_P1_a_log_handler_that_blocks_holds_up_no_future() -> None:
    class Full(logging.Handler):
        """As where nobody reads the pipe that the log goes to."""

        def emit(self, record: logging.LogRecord) -> None:
            assert room.wait(BOUND)

    def lose(batch: Batch[Any]) -> None:
        raise OutcomeUnknown("x")

    room, handler = threading.Event(), Full()
    logging.getLogger("microbatch.worker").addHandler(handler)
    try:
        with batcher_of(lose) as batcher:
            futures = batcher.submit_many(range(3))
            assert not wait(futures, BOUND / 2).not_done
            room.set()
    finally:
        room.set()
        logging.getLogger("microbatch.worker").removeHandler(handler)
    assert {future.status for future in futures} == {JobStatus.UNKNOWN}


def test_p1_outcome_unknown_from_the_processor_is_unknown_and_carries_the_batch() -> None:
    class Careless(OutcomeUnknown):
        def __init__(self) -> None:  # no batch_id
            pass

    for error in (OutcomeUnknown("?"), Careless()):
        with batcher_of(raises(error)) as batcher:
            futures = batcher.submit_many([1, 2])
            for future in futures:
                raised = future.exception(BOUND)
                assert type(raised) is type(error)
                assert raised.batch_id
                assert future.status is JobStatus.UNKNOWN
            assert batcher.stats().unknown == 2


def answers(make: Callable[[Batch[Any]], Any]) -> Callable[[Batch[Any]], Any]:
    return lambda batch: list(batch) if "good" in batch else make(batch)


class Lying(Sequence[Any]):
    """A sequence whose parts misbehave."""

    def __init__(self, length: Any, items: Any) -> None:
        self._length = length
        self._items = items

    def __len__(self) -> int:
        if isinstance(self._length, BaseException):
            raise self._length
        return int(self._length)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._items, BaseException):
            raise self._items
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        raise IndexError(index)


WRONG = {
    "too few": lambda batch: list(batch)[1:],
    "too many": lambda batch: [*batch, 0],
    "empty": lambda batch: [],
    "generator": lambda batch: (job for job in batch),
    "iterator": lambda batch: iter(list(batch)),
    "map": lambda batch: map(str, batch),
    "dict": lambda batch: dict.fromkeys(batch),
    "set": set,
    "str": lambda batch: "abc",
    "bytes": lambda batch: b"abc",
    "bytearray": lambda batch: bytearray(b"abc"),
    "int": lambda batch: 3,
    "object": lambda batch: object(),
    "True": lambda batch: True,
    "a class": lambda batch: list,
    "deque too short": lambda batch: collections.deque([1]),
    "len raises": lambda batch: Lying(ValueError("len"), [1, 2]),
    "iter raises": lambda batch: Lying(3, ValueError("iter")),
    "iter raises SystemExit": lambda batch: Lying(3, SystemExit(3)),
    "iter raises KeyboardInterrupt": lambda batch: Lying(3, KeyboardInterrupt()),
    "lies about its length": lambda batch: Lying(3, [1, 2]),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_p2_a_wrong_answer_makes_every_job_unknown(make: Callable[[Batch[Any]], Any]) -> None:
    with batcher_of(answers(make), retry=RetryPolicy(retry_on=Exception)) as batcher:
        futures = batcher.submit_many([1, 2, 3])
        for future in futures:
            error = future.exception(BOUND)
            assert isinstance(error, ProcessorContractError)
            assert error.batch_id
            assert future.status is JobStatus.UNKNOWN
        assert len({id(future.exception(0)) for future in futures}) == 3
        assert batcher.submit("good").result(BOUND) == "good"
        assert batcher.stats().retries == 0


def test_p2_any_sequence_of_the_right_length_and_none_are_answers() -> None:
    for make in (tuple, collections.deque, lambda batch: batch, lambda batch: Lying(99, list(batch)), list):
        with batcher_of(answers(make)) as batcher:
            assert [future.result(BOUND) for future in batcher.submit_many([1, 2, 3])] == [1, 2, 3]
    with batcher_of(lambda batch: None) as batcher:
        assert [future.result(BOUND) for future in batcher.submit_many([1, 2, 3])] == [None, None, None]


def test_p2_an_exception_instance_fails_one_job_and_a_class_is_a_value() -> None:
    shared = KeyError("shared")
    slots: list[Any] = [ValueError("a"), ValueError, SystemExit(1), KeyboardInterrupt(), "fine", shared, shared]
    with batcher_of(lambda batch: [slots[job] for job in batch]) as batcher:
        futures = batcher.submit_many(range(len(slots)))
        assert not wait(futures, BOUND).not_done
        assert str(futures[0].exception(0)) == "a"
        assert futures[1].result(0) is ValueError
        assert isinstance(futures[2].exception(0), SystemExit)
        assert isinstance(futures[3].exception(0), KeyboardInterrupt)
        assert futures[4].result(0) == "fine"
        assert futures[5].exception(0) is not futures[6].exception(0)
        stats = batcher.stats()
        assert (stats.completed, stats.failed, stats.isolated) == (2, 5, 5)


def test_p2_values_that_misbehave_when_looked_at_are_values() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("unbound")

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("unbound")

        __hash__ = None  # type: ignore[assignment]

    proxy = Proxy()
    with batcher_of(lambda batch: [proxy for _ in batch]) as batcher:
        futures = batcher.submit_many([1, 2])
        assert all(future.result(BOUND) is proxy for future in futures)
    with batcher_of(echo) as batcher:
        assert batcher.submit(proxy).result(BOUND) is proxy


@pytest.mark.parametrize("asked", [ValueError("asked"), SystemExit(1), KeyboardInterrupt()], ids=named)
def test_p1_a_question_that_raises_means_no_retry(asked: BaseException) -> None:
    class Careless:
        def process(self, batch: Batch[Any]) -> Any:
            raise KeyError("x")

        def is_retryable(self, error: BaseException) -> bool:
            raise asked

    def predicate(error: BaseException) -> bool:
        raise asked

    for retry in (RetryPolicy(), RetryPolicy(retry_on=predicate)):
        with batcher_of(Careless(), retry=retry) as batcher:
            assert isinstance(batcher.submit(1).exception(BOUND), KeyError)


# P1 and P5: callbacks and listeners.

STRANGE = [ValueError("x"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), CustomBase()]


@pytest.mark.parametrize("error", STRANGE, ids=lambda error: type(error).__name__)
def test_p1_a_callback_that_raises_changes_nothing(error: BaseException) -> None:
    processor = Held()
    called: list[Any] = []

    def bad(future: Any) -> None:
        called.append(future)
        raise error

    with batcher_of(processor) as batcher:
        futures = batcher.submit_many(range(5))
        for future in futures:
            future.add_done_callback(bad)
            future.add_done_callback(called.append)
        processor.go.set()
        assert [future.result(BOUND) for future in futures] == list(range(5))
        assert batcher.submit("after").result(BOUND) == "after"
        eventually(lambda: len(called) == 10)
        assert collections.Counter(map(id, called)) == {id(future): 2 for future in futures}


@pytest.mark.parametrize("error", STRANGE, ids=lambda error: type(error).__name__)
def test_p1_a_listener_that_raises_changes_nothing(error: BaseException) -> None:
    told: list[type] = []

    def bad(event: Any) -> None:
        told.append(type(event))
        raise error

    def process(batch: Batch[Any]) -> Any:
        if "raise" in batch:
            raise KeyError("x")
        if "retry" in batch and batch.attempt == 1:
            raise ConnectionError("x")
        return list(batch)

    retry = RetryPolicy(retry_on=ConnectionError, backoff=0.001, backoff_max=0.001)
    with batcher_of(process, retry=retry) as batcher:
        for event in (JobRetrying, JobCompleted, JobFailed, BatchStarted, BatchCompleted, BatchFailed, BatcherShutDown):
            batcher.on(event, bad)
            batcher.on(event, lambda event: told.append(type(event)))
        assert batcher.submit("good").result(BOUND) == "good"
        assert batcher.submit("retry").result(BOUND) == "retry"
        assert isinstance(batcher.submit("raise").exception(BOUND), KeyError)
        assert batcher.submit("good").result(BOUND) == "good"
    counted = collections.Counter(told)
    assert counted == {
        JobRetrying: 2,
        JobCompleted: 6,
        JobFailed: 2,
        BatchStarted: 10,
        BatchCompleted: 6,
        BatchFailed: 4,
        BatcherShutDown: 2,
    }


def test_p1_a_listener_of_the_callers_own_thread_that_raises_changes_nothing() -> None:
    processor = Held()
    told: list[type] = []

    def bad(event: Any) -> None:
        told.append(type(event))
        raise SystemExit(1)

    with batcher_of(processor) as batcher:
        batcher.on(JobSubmitted, bad)
        batcher.on(JobCancelled, bad)
        batcher.submit(1)
        processor.entered()
        second = batcher.submit(2)
        assert second.cancel()
    assert told == [JobSubmitted, JobSubmitted, JobCancelled]


def test_p5_a_callback_that_blocks_delays_the_next_batch_and_no_deadline() -> None:
    release = threading.Event()
    blocked = threading.Event()

    def block(future: Any) -> None:
        blocked.set()
        assert release.wait(BOUND)

    with batcher_of(echo, delivery_timeout=BOUND) as batcher:
        gate = threading.Event()
        first = batcher.submit_many([1, 2])
        first[0].add_done_callback(lambda future: block(future) if gate.is_set() else None)
        gate.set()
        with batcher._core.lock:  # it is not done yet, so the callback runs on the worker
            third = batcher.submit(3)
            third.add_done_callback(block)
        assert blocked.wait(BOUND)
        # The neighbours of the batch are resolved although the callback is still in there.
        assert [future.result(BOUND) for future in first] == [1, 2]
        began = time.monotonic()
        late = batcher.submit(4, delivery_timeout=0.1)
        error = late.exception(BOUND)
        assert isinstance(error, DeliveryTimeout)
        assert 0.09 <= time.monotonic() - began < 0.1 + LATE
        release.set()
        assert batcher.submit(5).result(BOUND) == 5


def test_p5_a_callback_of_an_expired_job_that_blocks_stops_nobody() -> None:
    processor = Held()
    release = threading.Event()
    entered = threading.Event()

    def block(future: Any) -> None:
        entered.set()
        assert release.wait(BOUND)

    with batcher_of(processor) as batcher:
        batcher.submit("held")
        processor.entered()
        with batcher._core.lock:  # it has not expired yet, so the callback runs on the supervisor
            expired = batcher.submit(1, delivery_timeout=0.05)
            expired.add_done_callback(block)
        assert entered.wait(BOUND)
        assert isinstance(batcher.submit(2, delivery_timeout=0.05).exception(LATE + 1), DeliveryTimeout)
        release.set()


def from_the_inside(where: str, action: Callable[[MicroBatcher[Any, Any]], Any], **options: Any) -> Any:
    """What *action* returned or raised, run in a callback, in a listener or in the processor."""
    answer: list[Any] = []
    done = threading.Event()

    def act(*_: Any) -> None:
        if done.is_set():
            return
        try:
            answer.append(action(batcher))
        except BaseException as exc:
            answer.append(exc)
        done.set()

    def process(batch: Batch[Any]) -> Any:
        if where == "processor":
            act()
        return list(batch)

    with batcher_of(process, **options) as batcher:
        if where == "listener":
            batcher.on(JobCompleted, act)
        if where == "batch listener":
            batcher.on(BatchStarted, act)
        future = batcher.submit("first")
        if where == "callback":
            future.add_done_callback(act)
        assert done.wait(BOUND), "it waits for itself"
        assert future.result(BOUND) == "first"
        return answer[0]


# A callback of a future that is done already runs on the thread that adds it, so these start from a held batch.
INSIDE = ["listener", "batch listener", "processor"]


@pytest.mark.parametrize("where", INSIDE)
def test_p6_the_inside_may_submit_and_ask(where: str) -> None:
    def action(batcher: MicroBatcher[Any, Any]) -> Any:
        futures = [batcher.submit("again"), *batcher.submit_many([1, 2])]
        assert batcher.status(futures[0].job_id) in (JobStatus.PENDING, JobStatus.PROCESSING)
        assert batcher.stats().submitted >= 3
        batcher.off(JobFailed, batcher.on(JobFailed, print))
        return futures

    futures = from_the_inside(where, action)
    assert not isinstance(futures, BaseException), futures
    assert [future.result(BOUND) for future in futures] == ["again", 1, 2]


@pytest.mark.parametrize("where", INSIDE)
def test_p6_the_inside_does_not_wait_for_itself(where: str) -> None:
    for action in (
        lambda batcher: batcher.execute("x"),
        lambda batcher: batcher.flush(),
        lambda batcher: batcher.flush(1),
        lambda batcher: batcher.submit("x").result(),
        lambda batcher: batcher.submit("x").exception(),
    ):
        assert type(from_the_inside(where, action)) is RuntimeError
    assert type(from_the_inside(where, lambda batcher: batcher.submit("x").result(0.01))) is FutureTimeoutError


@pytest.mark.parametrize("where", INSIDE)
def test_p5_the_inside_is_refused_at_once_when_full(where: str) -> None:
    def action(batcher: MicroBatcher[Any, Any]) -> Any:
        if where == "listener":  # its job has given its place back
            for n in range(10):
                batcher.submit(n)
        began = time.monotonic()
        for submit in (lambda: batcher.submit("x", submit_timeout=BOUND), lambda: batcher.submit_many(["x"])):
            with pytest.raises(QueueFull):
                submit()
        return time.monotonic() - began

    took = (
        from_the_inside(where, action, max_outstanding=1, submit_timeout=BOUND)
        if where != "listener"
        else (from_the_inside(where, action, max_outstanding=10, submit_timeout=BOUND))
    )
    assert isinstance(took, float), took
    assert took < 1


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize("cancel_futures", [False, True])
def test_p6_the_inside_may_begin_the_shutdown(where: str, cancel_futures: bool) -> None:
    def action(batcher: MicroBatcher[Any, Any]) -> Any:
        queued = batcher.submit("queued")
        report = batcher.shutdown(cancel_futures=cancel_futures)
        with pytest.raises(BatcherClosed):
            batcher.submit("late")
        return report, queued

    answer = from_the_inside(where, action)
    assert not isinstance(answer, BaseException), answer
    report, queued = answer
    assert not report.finished
    if cancel_futures:
        assert queued.cancelled()
    else:
        assert queued.result(BOUND) == "queued"


def test_p6_a_callback_of_the_worker_may_do_all_that() -> None:
    processor = Held()
    answer: list[Any] = []

    def act(future: JobFuture[Any]) -> None:
        try:
            batcher.submit_many(range(3))
            with pytest.raises(QueueFull):
                batcher.submit_many(range(4), submit_timeout=BOUND)
            with pytest.raises(RuntimeError):
                batcher.execute(1)
            with pytest.raises(RuntimeError):
                batcher.flush()
            again = batcher.submit("again")
            assert again.cancel()
            assert again.cancelled()
            answer.append(batcher.submit("again"))
            answer.append(batcher.shutdown(timeout=BOUND))
        except BaseException as exc:
            answer.append(exc)

    with batcher_of(processor, max_outstanding=4) as batcher:
        future = batcher.submit("first")
        processor.entered()
        future.add_done_callback(act)
        processor.go.set()
        eventually(lambda: len(answer) == 2)
        assert answer[0].result(BOUND) == "again"
        assert not answer[1].finished


def test_p6_a_callback_of_an_expired_job_may_begin_the_shutdown() -> None:
    processor = Held()
    reports: list[Any] = []
    with batcher_of(processor) as batcher:
        batcher.submit("held")
        processor.entered()
        with batcher._core.lock:  # it has not expired yet, so the callback runs on the supervisor
            expired = batcher.submit("expires", delivery_timeout=0.05)
            expired.add_done_callback(lambda future: reports.append(batcher.shutdown()))
        eventually(lambda: reports)
        assert not reports[0].finished
        with pytest.raises(BatcherClosed):
            batcher.submit("late")


def test_p6_a_callback_of_a_cancelled_job_may_submit_and_shut_down() -> None:
    processor = Held()
    answer: list[Any] = []
    with batcher_of(processor) as batcher:
        batcher.submit("held")
        processor.entered()
        queued = batcher.submit("queued")

        def act(future: Any) -> None:
            answer.append(batcher.submit("again"))
            answer.append(batcher.shutdown(wait=False))

        queued.add_done_callback(act)
        assert queued.cancel()
        assert len(answer) == 2
        processor.go.set()
        assert answer[0].result(BOUND) == "again"


# P1: cancel races with the take.


@pytest.mark.parametrize("workers", [1, 3])
def test_p1_a_cancelled_job_is_never_handed_over(workers: int) -> None:
    seen: list[int] = []

    def process(batch: Batch[int]) -> list[int]:
        seen.extend(batch)
        return list(batch)

    count, rounds = 400, 10
    with (
        tiny_switch_interval(),
        batcher_of(
            process, max_batch_size=7, max_concurrent_batches=workers, max_outstanding=count * rounds
        ) as batcher,
    ):
        futures: list[JobFuture[Any]] = []
        cancelled: set[int] = set()
        refused: set[int] = set()
        lock = threading.Lock()

        def submitter(number: int) -> Callable[[], None]:
            def run() -> None:
                dice = random.Random(number)
                for n in range(count):
                    job = number * count + n
                    future = batcher.submit(job)
                    said = future.cancel() if dice.random() < 0.6 else None
                    with lock:
                        futures.append(future)
                        if said is True:
                            cancelled.add(job)
                        elif said is False:
                            refused.add(job)

            return run

        with threads(*[submitter(number) for number in range(rounds)]):
            pass
        done, open_ = wait(futures, BOUND, ALL_COMPLETED)
        assert not open_
        assert len(list(as_completed(futures, BOUND))) == count * rounds
        assert batcher.flush(BOUND)
    assert len(seen) == len(set(seen))
    assert not cancelled & set(seen)
    assert refused <= set(seen)
    assert cancelled | set(seen) == set(range(count * rounds))
    for future in done:
        assert future.cancelled() or future.result(0) in seen
    stats = batcher.stats()
    assert (stats.cancelled, stats.completed) == (len(cancelled), len(seen))


def test_p1_waiters_wake_when_a_queued_job_is_cancelled() -> None:
    processor = Held()
    with batcher_of(processor) as batcher:
        batcher.submit("held")
        processor.entered()
        futures = [batcher.submit(n) for n in range(20)]
        outcomes: list[Any] = []
        ready = threading.Barrier(22)

        def get(future: JobFuture[Any]) -> Callable[[], None]:
            def run() -> None:
                ready.wait(BOUND)
                try:
                    outcomes.append(future.result(BOUND))
                except CancelledError as exc:
                    outcomes.append(exc)

            return run

        def wait_for_all() -> None:
            ready.wait(BOUND)
            assert not wait(futures, BOUND).not_done

        with threads(*map(get, futures), wait_for_all):
            ready.wait(BOUND)
            for future in futures:
                assert future.cancel()
                assert future.cancel(), "cancelled again, and nothing changes"
        assert len(outcomes) == 20
        assert all(isinstance(outcome, CancelledError) for outcome in outcomes)
        assert batcher.stats().cancelled == 20
    assert processor.seen() == ["held"]


def test_p1_many_threads_each_get_their_own() -> None:
    class Token:
        pass

    with (
        tiny_switch_interval(),
        batcher_of(echo, max_batch_size=13, max_outstanding=50, submit_timeout=BOUND) as batcher,
    ):

        def client() -> None:
            for n in range(60):
                token = Token()
                if n % 3:
                    assert batcher.execute(token) is token
                elif n % 2:
                    assert batcher.submit(token).result(BOUND) is token
                else:
                    tokens = [Token() for _ in range(4)]
                    futures = batcher.submit_many(tokens)
                    assert all(future.result(BOUND) is one for future, one in zip(futures, tokens, strict=True))

        with threads(*[client] * 24):
            pass
        assert batcher.stats().completed == 24 * (40 + 10 + 10 * 4)


# P5: every deadline is kept while the worker is stuck.


def took(began: float, least: float) -> None:
    assert least - 0.02 <= time.monotonic() - began < least + LATE


def test_p5_delivery_timeout_of_queued_and_handed_over_jobs() -> None:
    processor = Held()
    with batcher_of(processor, max_batch_size=2, delivery_timeout=0.7) as batcher:
        began = time.monotonic()
        held = batcher.submit("held")
        processor.entered()
        queued = [batcher.submit(n) for n in range(5)]
        for future in queued:
            error = future.exception(BOUND)
            assert isinstance(error, DeliveryTimeout)
            assert not isinstance(error, OutcomeUnknown)
            assert future.status is JobStatus.FAILED
        unknown = held.exception(BOUND)
        assert isinstance(unknown, OutcomeUnknown)
        assert unknown.batch_id == processor.batches[0].id
        took(began, 0.7)
        assert held.status is JobStatus.UNKNOWN
        eventually(lambda: processor.abandoned)
        assert batcher.stats().outstanding == 0
        processor.go.set()
        assert batcher.submit("after").result(BOUND) == "after", "the worker goes on"
        stats = batcher.stats()
        assert (stats.late_results, stats.unknown, stats.failed, stats.completed) == (1, 1, 5, 1)
        assert processor.abandoned == [processor.batches[0]], "once"
    assert processor.seen() == ["held", "after"]


def test_p5_of_one_batch_each_job_has_its_own_deadline_and_abandon_waits_for_the_last() -> None:
    processor = Held()
    with batcher_of(processor) as batcher:
        batcher.submit("first")
        processor.entered()
        short = batcher.submit("short", delivery_timeout=1.0)
        long = batcher.submit("long", delivery_timeout=2.0)
        first, processor.go = processor.go, threading.Event()
        first.set()
        processor.entered()
        assert isinstance(short.exception(BOUND), OutcomeUnknown)
        assert not processor.abandoned
        assert isinstance(long.exception(BOUND), OutcomeUnknown)
        eventually(lambda: len(processor.abandoned) == 1)


def test_p5_an_earlier_deadline_overtakes() -> None:
    processor = Held()
    with batcher_of(processor) as batcher:
        batcher.submit("held", delivery_timeout=60)
        processor.entered()
        late = batcher.submit(1, delivery_timeout=30)
        began = time.monotonic()
        early = [batcher.submit(n, delivery_timeout=0.5 - n / 10) for n in range(4)]
        assert isinstance(early[3].exception(BOUND), DeliveryTimeout)
        took(began, 0.2)
        assert isinstance(early[0].exception(BOUND), DeliveryTimeout)
        took(began, 0.5)
        assert not late.done()


def test_p5_a_job_that_waits_for_a_retry_expires_with_its_cause() -> None:
    attempts: list[int] = []

    def process(batch: Batch[Any]) -> Any:
        attempts.append(batch.attempt)
        raise ConnectionError("no link")

    retry = Steady(retry_on=ConnectionError, backoff=30, backoff_max=30)
    with batcher_of(process, retry=retry) as batcher:
        began = time.monotonic()
        future = batcher.submit(1, delivery_timeout=0.7)
        eventually(lambda: batcher.stats().retries)
        assert future.status is JobStatus.PROCESSING
        assert not future.cancel()
        error = future.exception(BOUND)
        took(began, 0.7)
        assert isinstance(error, DeliveryTimeout)
        assert isinstance(error.__cause__, ConnectionError)
    assert attempts[:1] == [1]


def test_p5_an_undecided_job_expires_as_unknown() -> None:
    class Processor:
        def process(self, batch: Batch[Any]) -> Any:
            raise OutcomeUnknown("commit sent", batch_id="mine")

        def is_retryable(self, error: BaseException) -> bool:
            return isinstance(error, OutcomeUnknown)

    with batcher_of(Processor(), retry=Steady(backoff=30, backoff_max=30)) as batcher:
        began = time.monotonic()
        future = batcher.submit(1, delivery_timeout=0.7)
        error = future.exception(BOUND)
        took(began, 0.7)
        assert isinstance(error, OutcomeUnknown)
        assert error.batch_id
        assert isinstance(error.__cause__, OutcomeUnknown)
        assert future.status is JobStatus.UNKNOWN


def test_p5_submit_timeout_and_flush_timeout() -> None:
    processor = Held()
    with batcher_of(processor, max_outstanding=2, submit_timeout=0.2) as batcher:
        futures = [batcher.submit(1), batcher.submit(2)]
        processor.entered()
        began = time.monotonic()
        with pytest.raises(QueueFull, match="2 outstanding of max_outstanding=2"):
            batcher.submit(3)
        took(began, 0.2)
        began = time.monotonic()
        with pytest.raises(QueueFull):
            batcher.submit_many([3, 4], submit_timeout=0.1)
        took(began, 0.1)
        with pytest.raises(QueueFull):
            batcher.submit(3, submit_timeout=0)
        began = time.monotonic()
        assert not batcher.flush(0.1)
        took(began, 0.1)
        assert not batcher.flush(0)
        stats = batcher.stats()
        assert (stats.rejected, stats.outstanding) == (4, 2)
        processor.go.set()
        assert batcher.flush(BOUND)
        assert all(future.done() for future in futures)


def test_p5_a_submit_timeout_is_kept_however_short_it_is() -> None:
    processor = Held()
    with batcher_of(processor, max_outstanding=1) as batcher:
        batcher.submit("held")
        processor.entered()

        def refused() -> int:
            for n in range(10_000):
                with pytest.raises(QueueFull):
                    batcher.submit("x", submit_timeout=n * 3e-9)
            return n

        assert bounded(refused, BOUND) == 9_999
        processor.go.set()


def test_callers_who_come_back_at_once_go_together() -> None:
    """Without a look at who returns, the first of them would go alone and the others wait: two halves in turn."""
    sizes: list[int] = []

    def process(batch: Batch[int]) -> list[int]:
        sizes.append(len(batch))
        time.sleep(0.16)  # the longest patience
        return list(batch)

    with batcher_of(process) as batcher:

        def client() -> None:
            for n in range(12):
                assert batcher.execute(n) == n

        with threads(*[client] * 8):
            pass
    assert sum(size >= 6 for size in sizes) > 0.6 * len(sizes), sizes


def test_who_does_not_wait_for_a_job_is_not_expected_back() -> None:
    def process(batch: Batch[int]) -> list[int]:
        time.sleep(0.01)
        return list(batch)

    with batcher_of(process) as batcher:
        for _ in range(5):
            told = threading.Semaphore(0)
            for future in batcher.submit_many(range(8)):
                future.add_done_callback(lambda _, told=told: told.release())
            for _ in range(8):
                assert told.acquire(timeout=BOUND)
            assert not batcher._core.returning.jobs


def test_p5_flush_closes_a_lingering_batch_and_waits_for_retries() -> None:
    tries = collections.Counter[Any]()

    def process(batch: Batch[Any]) -> Any:
        tries.update(batch)
        if batch.attempt < 3:
            raise ConnectionError("x")
        return list(batch)

    retry = RetryPolicy(retry_on=ConnectionError, backoff=0.01, backoff_max=0.01)
    with batcher_of(process, linger=10, retry=retry) as batcher:
        futures = [batcher.submit(n) for n in range(3)]
        assert not wait(futures, 0.05).done
        assert batcher.flush(BOUND)
        assert [future.result(0) for future in futures] == [0, 1, 2]
    assert set(tries.values()) == {3}


def test_p5_flush_while_others_submit_ends() -> None:
    stop = threading.Event()
    with tiny_switch_interval(), batcher_of(echo, max_outstanding=100, submit_timeout=BOUND) as batcher:

        def feed() -> None:
            while not stop.is_set():
                batcher.submit(0)

        with threads(feed, feed):
            for n in range(30):
                mine = batcher.submit(n)
                assert batcher.flush(BOUND)
                assert mine.done()
            stop.set()


# P5: blocked submitters.


@pytest.mark.parametrize("bound", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_p5_no_blocked_submitter_is_forgotten(bound: int, workers: int) -> None:
    """A lost wake-up would leave submitters asleep until their `submit_timeout`, which fails the test."""
    with (
        tiny_switch_interval(),
        batcher_of(
            echo,
            max_outstanding=bound,
            max_batch_size=2,
            max_concurrent_batches=workers,
            submit_timeout=BOUND - 1,
            delivery_timeout=BOUND,
        ) as batcher,
    ):

        def client() -> None:
            for n in range(25):
                if n % 5 == 4 and bound > 1:
                    batcher.submit_many([n, n])
                else:
                    future = batcher.submit(n)
                    if n % 3 == 0:
                        future.cancel()

        began = time.monotonic()
        with threads(*[client] * 32):
            pass
        assert time.monotonic() - began < BOUND - 2
        assert batcher.flush(BOUND)
        assert batcher.stats().rejected == 0


def test_p5_blocked_submitters_come_in_their_order_and_timeouts_hurt_nobody() -> None:
    processor = Held()
    with batcher_of(processor, max_outstanding=1, max_batch_size=1) as batcher:
        batcher.submit("held")
        processor.entered()
        refused: list[int] = []
        started = []

        def client(n: int) -> Callable[[], None]:
            def run() -> None:
                try:
                    batcher.submit(n, submit_timeout=0.2 if n % 2 else BOUND)
                except QueueFull:
                    refused.append(n)

            return run

        running = []
        for n in range(10):
            thread = threads(client(n))
            thread.__enter__()
            running.append(thread)
            eventually(lambda n=n: len(batcher._core.blocked) + len(refused) >= n + 1)
            started.append(n)
        eventually(lambda: len(refused) == 5)
        processor.go.set()
        for thread in running:
            thread.__exit__(None, None, None)
        assert batcher.flush(BOUND)
    assert sorted(refused) == [1, 3, 5, 7, 9]
    assert processor.seen() == ["held", 0, 2, 4, 6, 8]


def test_p6_shutdown_releases_blocked_submitters() -> None:
    processor = Held()
    with batcher_of(processor, max_outstanding=1) as batcher:
        batcher.submit("held")
        processor.entered()
        refused: list[float] = []

        def client() -> None:
            with pytest.raises(BatcherClosed):
                batcher.submit("x", submit_timeout=BOUND)
            refused.append(time.monotonic())

        with threads(*[client] * 8):
            eventually(lambda: len(batcher._core.blocked) == 8)
            began = time.monotonic()
            batcher.shutdown(wait=False)
        assert len(refused) == 8
        assert max(refused) - began < LATE
    assert processor.seen() == ["held"]


def test_p5_place_given_back_by_cancel_and_by_expiry_releases_submitters() -> None:
    processor = Held()
    with batcher_of(processor, max_outstanding=2, submit_timeout=BOUND) as batcher:
        batcher.submit("held")
        processor.entered()
        queued = batcher.submit("queued")
        with threads(lambda: batcher.submit("a", delivery_timeout=0.2)):
            eventually(lambda: batcher._core.blocked)
            assert queued.cancel()
        with threads(lambda: batcher.submit("b")):
            pass
        processor.go.set()
    assert processor.seen() == ["held", "b"]


# P6: shutdown.


def test_p6_everything_accepted_is_processed_and_nothing_after() -> None:
    processed: list[Any] = []

    def process(batch: Batch[Any]) -> Any:
        processed.extend(batch)
        return list(batch)

    for workers in (1, 3):
        processed.clear()
        batcher = MicroBatcher[Any, Any](process, max_batch_size=3, max_concurrent_batches=workers)
        accepted: list[JobFuture[Any]] = []
        ready = threading.Barrier(9)

        def client(
            number: int,
            batcher: MicroBatcher[Any, Any] = batcher,
            ready: threading.Barrier = ready,
            accepted: list[JobFuture[Any]] = accepted,
        ) -> Callable[[], None]:
            def run() -> None:
                ready.wait(BOUND)
                try:
                    for n in range(100_000):
                        accepted.append(batcher.submit((number, n)))
                except BatcherClosed:
                    return
                raise AssertionError("it was never closed")

            return run

        with tiny_switch_interval(), threads(*map(client, range(8))):
            ready.wait(BOUND)
            eventually(lambda accepted=accepted: len(accepted) > 200)
            report = batcher.shutdown()
        assert report.finished
        assert not report.undelivered
        assert report.completed == len(accepted)
        assert all(future.done() for future in accepted)
        assert sorted(processed) == sorted(future.result(0) for future in accepted)


def test_p6_past_the_timeout_queued_jobs_fail_and_running_ones_are_unknown() -> None:
    processor = Held()
    with batcher_of(processor, max_batch_size=2) as batcher:
        held = batcher.submit("held")
        processor.entered()
        queued = [batcher.submit(n) for n in range(3)]
        began = time.monotonic()
        report = batcher.shutdown(timeout=0.2)
        took(began, 0.2)
        assert report.finished
        assert sorted(map(str, report.undelivered)) == ["0", "1", "2", "held"]
        assert (report.failed, report.unknown) == (3, 1)
        error = held.exception(0)
        assert isinstance(error, OutcomeUnknown)
        assert error.batch_id == processor.batches[0].id
        assert all(isinstance(future.exception(0), BatcherClosed) for future in queued)
        assert batcher.shutdown(timeout=BOUND) == report, "idempotent"
        eventually(lambda: processor.abandoned)
        processor.go.set()
        eventually(lambda: batcher.stats().late_results == 1)
    assert processor.seen() == ["held"]


def test_p6_the_earliest_of_several_deadlines_wins() -> None:
    processor = Held()
    with batcher_of(processor) as batcher:
        future = batcher.submit("held")
        processor.entered()
        reports: list[Any] = []
        began = time.monotonic()
        with threads(
            lambda: reports.append(batcher.shutdown()),
            lambda: reports.append(batcher.shutdown(timeout=BOUND)),
            lambda: reports.append(batcher.shutdown(timeout=0.5)),
            lambda: reports.append(batcher.shutdown(timeout=0.3)),
            lambda: reports.append(batcher.shutdown(wait=False, timeout=5)),
        ):
            pass
        took(began, 0.3)
        assert isinstance(future.exception(0), OutcomeUnknown)
        assert [report.finished for report in reports].count(True) >= 4


def test_p6_shutdown_without_waiting_keeps_its_timeout() -> None:
    processor = Held()
    with batcher_of(processor) as batcher:
        held = batcher.submit("held")
        processor.entered()
        queued = batcher.submit("queued")
        began = time.monotonic()
        report = batcher.shutdown(wait=False, timeout=1.0)
        assert time.monotonic() - began < 0.9
        assert not report.finished
        assert isinstance(queued.exception(BOUND), BatcherClosed)
        assert isinstance(held.exception(BOUND), OutcomeUnknown)
        took(began, 1.0)
        final = batcher.shutdown()
        assert final.finished
        assert sorted(final.undelivered) == ["held", "queued"]


def test_p6_cancel_futures_cancels_what_is_queued_and_ends_what_waits_for_a_retry() -> None:
    processor = Held()
    failing = threading.Event()

    def process(batch: Batch[Any]) -> Any:
        if "retry" in batch:
            failing.set()
            raise ConnectionError("x")
        return processor.process(batch)

    retry = Steady(retry_on=ConnectionError, backoff=60, backoff_max=60)
    with batcher_of(process, retry=retry, delivery_timeout=60) as batcher:
        waiting = batcher.submit("retry")
        assert failing.wait(BOUND)
        held = batcher.submit("held")
        processor.entered()
        if batcher.stats().retries == 0:
            pytest.fail("the failed job does not wait")
        queued = [batcher.submit(n) for n in range(5)]
        reports: list[Any] = []
        with threads(lambda: reports.append(batcher.shutdown(cancel_futures=True))):
            assert isinstance(waiting.exception(BOUND), BatcherClosed)
            assert not wait(queued, BOUND).not_done
            assert all(future.cancelled() for future in queued)
            processor.go.set()
        assert held.result(BOUND) == "held"
        assert (reports[0].cancelled, reports[0].completed, reports[0].failed) == (5, 1, 1)
        assert reports[0].undelivered == ()


def test_p6_a_hanging_callback_does_not_hang_a_bounded_shutdown() -> None:
    release = threading.Event()
    entered = threading.Event()

    def block(future: Any) -> None:
        entered.set()
        assert release.wait(BOUND)

    processor = Held()
    with batcher_of(processor, delivery_timeout=BOUND) as batcher:
        future = batcher.submit(1)
        future.add_done_callback(block)
        processor.go.set()
        assert entered.wait(BOUND)
        began = time.monotonic()
        assert not batcher.shutdown(timeout=0.2).finished
        took(began, 0.2)
        release.set()


def test_p6_a_hanging_callback_of_a_cancelled_job_does_not_hang_a_bounded_shutdown() -> None:
    release = threading.Event()

    def block(future: Any) -> None:
        assert release.wait(BOUND)

    processor = Held()
    with batcher_of(processor, delivery_timeout=BOUND) as batcher:
        batcher.submit("held")
        processor.entered()
        queued = [batcher.submit(n) for n in range(2)]
        queued[0].add_done_callback(block)
        began = time.monotonic()
        batcher.shutdown(cancel_futures=True, timeout=0.2)
        took(began, 0.2)
        assert all(future.cancelled() for future in queued)
        release.set()


def test_p6_a_hanging_close_does_not_hang_the_shutdown() -> None:
    release = threading.Event()

    class Processor:
        def process(self, batch: Batch[Any]) -> Any:
            return list(batch)

        def close(self) -> None:
            assert release.wait(BOUND)

    batcher = MicroBatcher[Any, Any](Processor(), delivery_timeout=1.5)
    assert batcher.submit(1).result(BOUND) == 1
    began = time.monotonic()
    assert not batcher.shutdown(timeout=0).finished
    assert time.monotonic() - began < 1.4
    assert batcher.shutdown().finished
    took(began, 1.5)
    release.set()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1)], ids=named)
def test_p6_a_failing_close_and_a_failing_abandon_change_nothing(error: BaseException) -> None:
    class Processor(Held):
        def close(self) -> None:
            raise error

        def abandon(self, batch: Batch[Any]) -> None:
            super().abandon(batch)
            raise error

    processor = Processor()
    with batcher_of(processor) as batcher:
        future = batcher.submit(1, delivery_timeout=0.5)
        assert isinstance(future.exception(BOUND), OutcomeUnknown)
        eventually(lambda: processor.abandoned)
        assert isinstance(batcher.submit(2, delivery_timeout=0.1).exception(BOUND), DeliveryTimeout)
    assert len(processor.abandoned) == 1


class Opening:
    """Counts, and opens as it is told."""

    def __init__(self, *script: BaseException | threading.Event | None) -> None:
        self.script = list(script)
        self.calls: list[str] = []
        self.entered = threading.Event()

    def open(self) -> None:
        self.calls.append("open")
        self.entered.set()
        step = self.script.pop(0) if self.script else None
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            assert step.wait(BOUND)

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.calls.append("process")
        return list(batch)

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("error", [OSError("x"), SystemExit(1), KeyboardInterrupt()], ids=named)
def test_p1_a_failing_open_is_its_batchs_failure_and_is_tried_again(error: BaseException) -> None:
    processor = Opening(error)
    with batcher_of(processor, retry=None) as batcher:
        assert type(batcher.submit(1).exception(BOUND)) is type(error)
        assert batcher.submit(2).result(BOUND) == 2
        assert batcher.submit(3).result(BOUND) == 3
    assert processor.calls == ["open", "open", "process", "process", "close"]


def test_p1_a_failing_open_is_retried_where_the_policy_says_so() -> None:
    processor = Opening(OSError("x"), OSError("y"))
    retry = RetryPolicy(retry_on=OSError, backoff=0.001, backoff_max=0.001)
    with batcher_of(processor, retry=retry) as batcher:
        assert batcher.submit(1).result(BOUND) == 1
        assert batcher.stats().retries == 2
    assert processor.calls == ["open", "open", "open", "process", "close"]


def test_p5_a_slow_open_keeps_no_job_past_its_deadline() -> None:
    gate = threading.Event()
    processor = Opening(gate)
    with batcher_of(processor) as batcher:
        began = time.monotonic()
        future = batcher.submit(1, delivery_timeout=0.2)
        assert isinstance(future.exception(BOUND), DeliveryTimeout), "the processor has never seen it"
        took(began, 0.2)
        waiting = batcher.submit(2)
        gate.set()
        assert waiting.result(BOUND) == 2
    assert processor.calls == ["open", "process", "close"]


def test_p6_shutdown_during_a_slow_open() -> None:
    gate = threading.Event()
    processor = Opening(gate)
    with batcher_of(processor) as batcher:
        future = batcher.submit(1)
        assert processor.entered.wait(BOUND)
        report = batcher.shutdown(timeout=0.1)
        assert report.undelivered == (1,)
        assert isinstance(future.exception(0), BatcherClosed)
        gate.set()
    eventually(lambda: processor.calls[-1] == "close")
    assert processor.calls == ["open", "close"]


def test_p6_close_runs_once_with_several_workers_and_never_without_a_batch() -> None:
    processor = Opening()
    with batcher_of(processor, max_concurrent_batches=4, max_batch_size=1) as batcher:
        assert [future.result(BOUND) for future in batcher.submit_many(range(50))] == list(range(50))
    assert processor.calls.count("close") == 1
    assert processor.calls[-1] == "close"
    assert processor.calls.count("open") <= 4
    untouched = Opening()
    with batcher_of(untouched):
        pass
    assert untouched.calls == []


def test_p6_shutdown_at_the_same_time_as_the_first_submit() -> None:
    for _ in range(30):
        processed: list[Any] = []
        batcher = MicroBatcher[Any, Any](lambda batch, processed=processed: processed.extend(batch))
        accepted: list[Any] = []
        ready = threading.Barrier(5)

        def client(
            batcher: MicroBatcher[Any, Any] = batcher,
            ready: threading.Barrier = ready,
            accepted: list[Any] = accepted,
        ) -> None:
            ready.wait(BOUND)
            try:
                accepted.append(batcher.submit(1))
            except BatcherClosed:
                pass

        def close(batcher: MicroBatcher[Any, Any] = batcher, ready: threading.Barrier = ready) -> None:
            ready.wait(BOUND)
            assert batcher.shutdown().finished

        with threads(client, client, client, close, close):
            pass
        assert all(future.done() for future in accepted)
        assert len(processed) == len(accepted)


@pytest.mark.parametrize("timeout", [None, 0.2])
def test_p6_a_second_shutdown_waits_for_the_last_event_of_the_first(timeout: float | None) -> None:
    """Of a batcher without threads, where the first one tells it."""
    inside, go = threading.Event(), threading.Event()
    reports: list[Any] = []
    batcher = MicroBatcher[Any, Any](echo)

    def hold(_: BatcherShutDown) -> None:
        reports.append(batcher.shutdown())  # waits for itself if it waits
        inside.set()
        assert go.wait(BOUND)

    batcher.on(BatcherShutDown, hold)
    with threads(lambda: reports.append(batcher.shutdown())):
        assert inside.wait(BOUND)
        began = time.monotonic()
        if timeout is None:
            threading.Timer(0.2, go.set).start()
        second = batcher.shutdown(timeout=timeout)
        took(began, 0.2)
        assert second.finished == (timeout is None)
        go.set()
    assert [report.finished for report in reports] == [False, True]


# Undecided batches.


class Undecided:
    """Says *times* that it does not know, then answers."""

    def __init__(self, times: int, error: Callable[[], OutcomeUnknown] = lambda: OutcomeUnknown("commit sent")) -> None:
        self.times = times
        self.error = error
        self.calls: list[Batch[Any]] = []

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.calls.append(batch)
        if "plain" not in batch and batch.attempt <= self.times:
            raise self.error()
        return list(batch)

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, OutcomeUnknown)


FAST = RetryPolicy(backoff=0.005, backoff_max=0.005)


def test_p4_an_undecided_batch_comes_back_unchanged_alone_with_its_id() -> None:
    processor = Undecided(3)
    with batcher_of(processor, retry=FAST) as batcher:
        futures = batcher.submit_many([1, 2, 3])
        eventually(lambda: processor.calls)
        neighbours = [batcher.submit("plain") for _ in range(20)]
        assert [future.result(BOUND) for future in futures] == [1, 2, 3]
        assert not wait(neighbours, BOUND).not_done
    mine = [batch for batch in processor.calls if 1 in batch]
    assert len({batch.id for batch in mine}) == 1
    assert [batch.attempt for batch in mine] == [1, 2, 3, 4]
    assert all(batch[:3] == (1, 2, 3) for batch in mine)
    assert len({batch[:] for batch in mine}) == 1, "unchanged"
    assert all(batch.trigger == "retry" for batch in mine[1:])


def test_p4_an_undecided_batch_is_unchanged_although_one_of_its_jobs_expired() -> None:
    processor = Undecided(1)
    with batcher_of(processor, retry=Steady(backoff=2.0, backoff_max=2.0), max_batch_size=2) as batcher:
        core = batcher._core
        with core.lock:  # both in one batch
            short = batcher.submit("short", delivery_timeout=0.5)
            long = batcher.submit("long")
        error = short.exception(BOUND)
        assert isinstance(error, OutcomeUnknown)
        assert error.batch_id == processor.calls[0].id
        assert long.result(BOUND) == "long"
        stats = batcher.stats()
        assert (stats.unknown, stats.completed) == (1, 1)
    assert [batch[:] for batch in processor.calls] == [("short", "long")] * 2
    assert len({batch.id for batch in processor.calls}) == 1


def test_p4_an_undecided_batch_whose_jobs_are_all_over_does_not_come_back() -> None:
    processor = Undecided(1)
    with batcher_of(processor, retry=Steady(backoff=60, backoff_max=60)) as batcher:
        assert isinstance(batcher.submit(1, delivery_timeout=0.5).exception(BOUND), OutcomeUnknown)
        assert batcher.submit("plain").result(BOUND) == "plain"
    assert [batch[:] for batch in processor.calls] == [(1,), ("plain",)]


def test_p4_retry_on_alone_never_retries_an_unknown_outcome() -> None:
    calls: list[Any] = []

    def process(batch: Batch[Any]) -> Any:
        calls.append(batch)
        raise OutcomeUnknown("x")

    for retry_on in (Exception, OutcomeUnknown, lambda error: True):
        calls.clear()
        with batcher_of(process, retry=RetryPolicy(retry_on=retry_on, backoff=0.001)) as batcher:
            assert isinstance(batcher.submit(1).exception(BOUND), OutcomeUnknown)
        assert len(calls) == 1


def test_p4_a_broken_contract_is_never_retried() -> None:
    processor = Undecided(9, lambda: ProcessorContractError("said by the processor"))
    with batcher_of(processor, retry=FAST) as batcher:
        assert isinstance(batcher.submit(1).exception(BOUND), ProcessorContractError)
    assert len(processor.calls) == 1


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_p4_max_attempts_bounds_undecided_and_decided_retries(attempts: int) -> None:
    policy = RetryPolicy(max_attempts=attempts, backoff=0.001, backoff_max=0.001, retry_on=ConnectionError)
    processor = Undecided(99)
    with batcher_of(processor, retry=policy) as batcher:
        futures = batcher.submit_many([1, 2])
        assert all(isinstance(future.exception(BOUND), OutcomeUnknown) for future in futures)
    assert [batch.attempt for batch in processor.calls] == list(range(1, attempts + 1))
    calls: list[int] = []

    def process(batch: Batch[Any]) -> Any:
        calls.append(batch.attempt)
        raise ConnectionError("x")

    with batcher_of(process, retry=policy) as batcher:
        assert isinstance(batcher.submit(1).exception(BOUND), ConnectionError)
    assert calls == list(range(1, attempts + 1))


def test_p4_a_failing_open_leaves_an_undecided_batch_undecided() -> None:
    """The second worker opens for a batch that the first one left undecided: no "no trace" may come out of that."""
    inside = threading.Event()
    gate = threading.Event()
    calls: list[Batch[Any]] = []
    opened: list[int] = []
    failed: list[int] = []  # openings, while the first worker was held up

    class Processor:
        def open(self) -> None:
            opened.append(threading.get_ident())
            if opened[-1] != opened[0] and len(failed) < 2:
                if inside.is_set():
                    failed.append(opened[-1])
                raise OSError("no link")

        def process(self, batch: Batch[Any]) -> Any:
            calls.append(batch)
            if "mine" in batch and batch.attempt == 1:
                raise OutcomeUnknown("commit sent")
            if "hold" in batch:
                inside.set()
                assert gate.wait(BOUND)
            return list(batch)

        def is_retryable(self, error: BaseException) -> bool:
            return isinstance(error, OutcomeUnknown)

    class Later(RetryPolicy):
        def delay(self, attempt: int) -> float:
            return 1.5 if attempt == 1 else 0.01

    with batcher_of(Processor(), retry=Later(), max_concurrent_batches=2, delivery_timeout=BOUND) as batcher:
        mine = batcher.submit("mine")
        eventually(lambda: calls)
        while not inside.is_set():
            # The second worker may be the one to take it, and fails it.
            held = batcher.submit("hold")
            eventually(lambda held=held: inside.is_set() or held.done())  # type: ignore[misc]
        outcome = mine.exception(BOUND)
        gate.set()
        assert held.exception(BOUND) is None
    assert outcome is None
    assert len(failed) == 2
    assert next(batch.attempt for batch in calls if "mine" in batch) == 1
    assert len({batch.id for batch in calls if "mine" in batch}) == 1


def test_p5_retries_do_not_hold_up_neighbours() -> None:
    def process(batch: Batch[Any]) -> Any:
        if "bad" in batch:
            return [ConnectionError("x") if job == "bad" else job for job in batch]
        return list(batch)

    retry = Steady(retry_on=ConnectionError, backoff=30, backoff_max=30)
    with batcher_of(process, retry=retry, delivery_timeout=3.0) as batcher:
        bad = batcher.submit("bad")
        for n in range(20):
            assert batcher.submit(n).result(BOUND) == n
        assert not bad.done()
        assert isinstance(bad.exception(BOUND), DeliveryTimeout)


# Ids.


def test_p1_one_id_is_one_job_however_many_threads_submit_it() -> None:
    processed: list[Any] = []

    def process(batch: Batch[Any]) -> Any:
        processed.extend(batch)
        return list(batch)

    with tiny_switch_interval(), batcher_of(process, max_outstanding=3, submit_timeout=BOUND) as batcher:
        got: list[JobFuture[Any]] = []

        def client() -> None:
            for n in range(40):
                got.append(batcher.submit(n, job_id=f"job-{n}"))

        with threads(*[client] * 12):
            pass
        assert not wait(got, BOUND).not_done
        assert sorted(processed) == list(range(40))
        assert len({id(future) for future in got}) == 40
        assert all(future.job_id == f"job-{future.result(0)}" for future in got)
        assert all(batcher.future(future.job_id) is future for future in got)


class Splitting:
    """Refuses every batch that holds "bad" beside others, and has it come back in halves."""

    def __init__(self) -> None:
        self.calls: list[Batch[Any]] = []

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.calls.append(batch)
        if "bad" not in batch:
            return list(batch)
        error = ConnectionError("lost")
        if len(batch) > 1:
            half = len(batch) // 2
            in_parts(error, [(f"{batch.id}.1", half), (f"{batch.id}.2", len(batch) - half)])
        raise error

    def is_retryable(self, error: BaseException) -> bool:
        return bool(parts_of(error))


def test_p3_a_batch_comes_back_in_parts_until_one_job_is_alone() -> None:
    processor = Splitting()
    with batcher_of(processor, retry=Steady(backoff=0.05, backoff_max=0.05)) as batcher:
        futures = batcher.submit_many([1, 2, "bad", 4, 5])
        eventually(lambda: processor.calls)
        neighbours = [batcher.submit("plain") for _ in range(20)]
        assert isinstance(futures[2].exception(BOUND), ConnectionError)
        assert [future.result(BOUND) for i, future in enumerate(futures) if i != 2] == [1, 2, 4, 5]
        assert not wait(neighbours, BOUND).not_done
        stats = batcher.stats()
        assert (stats.completed, stats.failed, stats.outstanding) == (24, 1, 0)
    parts = [batch for batch in processor.calls if "." in batch.id]
    assert all(batch.trigger == "retry" for batch in parts)
    # The first batch may have taken some of the neighbours along.
    assert len(processor.calls[0]) > 5 or {batch[:] for batch in parts} == {(1, 2), ("bad", 4, 5), ("bad",), (4, 5)}


def test_P4_P5_a_job_of_a_part_that_expires_left_no_trace_and_is_not_written_any_more() -> None:
    processor = Splitting()
    with batcher_of(processor, retry=Steady(backoff=1.0, backoff_max=1.0)) as batcher:
        core = batcher._core
        with core.lock:  # both in one batch
            short = batcher.submit("short", delivery_timeout=0.5)
            rest = [batcher.submit(job) for job in ("long", "bad", "other")]
        assert isinstance(short.exception(BOUND), DeliveryTimeout)
        assert rest[0].result(BOUND) == "long"
        assert rest[2].result(BOUND) == "other"
    assert [batch[:] for batch in processor.calls if "short" in batch] == [("short", "long", "bad", "other")]
