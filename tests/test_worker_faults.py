"""P1 under exceptions from outside: at every point where the interpreter may raise one, in every thread of the library.

Points, not lines: between the instructions that the library counts on no interpreter looks for something to raise.
"""

from __future__ import annotations

import _weakrefset
import inspect
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest
from interrupts import Interrupt, _Injector, interrupted_everywhere

from microbatch import (
    Batch,
    BatchCompleted,
    BatcherClosed,
    DeliveryTimeout,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobRetrying,
    JobStatus,
    MicroBatcher,
    OutcomeUnknown,
    QueueFull,
    RetryPolicy,
    life,
    protocols,
)
from microbatch.core import DeathWatch

pytestmark = pytest.mark.timeout(120)

BOUND = 30.0
# The jobs' deadline. An outcome that comes only with it was not brought by anybody: a lost wake-up.
DEADLINE = 15.0
FAST = RetryPolicy(backoff=0.001, backoff_max=0.001, retry_on=ConnectionError)


@pytest.fixture(autouse=True)
def _frame(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What an interrupted finaliser of the stdlib raises is dropped, and in C: pytest's hook would be interrupted, too.
    monkeypatch.setattr(sys, "unraisablehook", deque(maxlen=0).append)
    yield
    nobody_stays()


def nobody_stays() -> None:
    """A thread that hangs would let the interpreter hang at its end, where nobody sees why."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            give_up = time.monotonic() + BOUND
            while not thread.is_alive() and thread in threading.enumerate():
                assert time.monotonic() < give_up, f"{thread} hangs in its start"
                time.sleep(0.001)
            thread.join(BOUND)
            assert not thread.is_alive(), thread


class ThreadInjector(_Injector):
    """Interrupts one of the batcher's threads, but not the test's processor and the batch it reads.

    Nor where Python itself drops what is raised, nor `logging`, which loses the lock of a handler by it.
    """

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call" and _is_left_alone(frame):
            return None
        if frame.f_lineno is None and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return self  # the end of a generator that nobody reads to its end
        try:
            return super().__call__(frame, event, arg)
        except Interrupt:
            self._last.clear()  # the frames would keep the dead thread's things alive
            raise


_ELSEWHERE = (__file__, protocols.__file__, weakref.__file__, _weakrefset.__file__)


def _is_left_alone(frame: FrameType) -> bool:
    name = frame.f_code.co_name
    if name == "__del__" or (name == "report" and not frame.f_locals["self"].left):
        return True
    if frame.f_code.co_filename in _ELSEWHERE:
        return True
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename != logging.__file__:
        caller = caller.f_back
    return caller is not None


class Rig:
    """A batcher with one of its threads interrupted at point *n*."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, role: str, n: int) -> None:
        self.injector = ThreadInjector(n)
        self.done: dict[Any, int] = {}  # by payload: how often it was really done
        self.calls: list[Batch[Any]] = []
        self.ledger: list[str] = []  # ids of batches that were done and left undecided
        self.called: list[Any] = []  # by callbacks: payloads
        self.events: list[Any] = []
        self.gates: dict[Any, SimpleQueue[None]] = {"hold": SimpleQueue(), "hold again": SimpleQueue()}
        self.inside: dict[Any, SimpleQueue[None]] = {"hold": SimpleQueue(), "hold again": SimpleQueue()}
        self.failures = 0  # of `open`
        self.no_trace, self.undecided, self.bad = ConnectionError("x"), OutcomeUnknown("commit sent"), KeyError("bad")
        self._first = True
        real = getattr(life, {"worker": "work", "supervisor": "supervise"}[role])

        def traced(core: Any, watch: Any) -> None:
            if not self._first:
                return real(core, watch)
            self._first = False
            sys._getframe().f_trace_opcodes = True
            sys.settrace(self.injector)
            try:
                return real(core, watch)
            except Interrupt:
                return None  # the thread dies of it
            finally:
                sys.settrace(None)

        monkeypatch.setattr(life, real.__name__, traced)

    @property
    def where(self) -> str:
        return self.injector.where

    def open(self) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("cannot open")

    def process(self, batch: Batch[Any]) -> Any:
        # Calls nothing but C: an interruption in here is the processor's own error, and not what is tested.
        jobs = batch[:]
        if jobs[0] in self.gates:
            self.inside[jobs[0]].put(None)
            self.gates[jobs[0]].get(timeout=BOUND)
        if "retry" in jobs and batch.attempt == 1:
            raise self.no_trace
        if batch.id in self.ledger:
            return jobs
        for job in jobs:
            if job != "bad":
                self.done[job] = self.done.get(job, 0) + 1
        if "undecided" in jobs and not self.ledger:
            self.ledger.append(batch.id)
            raise self.undecided
        return [self.bad if job == "bad" else job for job in jobs]

    def holds(self, job: Any, future: JobFuture[Any]) -> bool:
        """Whether the processor holds *job*; if not, the interruption or the deadline came first."""
        give_up = time.monotonic() + BOUND
        while self.inside[job].empty() and not future.done():
            assert time.monotonic() < give_up
            time.sleep(0.0005)
        if self.inside[job].empty():
            self.gates[job].put(None)
            return False
        return True

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, (ConnectionError, OutcomeUnknown))

    def watch(self, payload: Any, future: JobFuture[Any]) -> JobFuture[Any]:
        future.add_done_callback(lambda _: self.called.append(payload))
        return future

    def check(self, futures: dict[Any, JobFuture[Any]]) -> None:
        """What holds whatever happened."""
        settled(futures)
        for payload, future in futures.items():
            times = self.done.get(payload, 0)
            said = f"{payload!r} {future!r} done {times} times, interrupted in {self.where}"
            assert times <= 1, said
            if future.status is JobStatus.COMPLETED:
                assert future.result(0) == payload, said
                assert times == 1, said
            elif future.status in (JobStatus.FAILED, JobStatus.CANCELLED):
                assert times == 0, said
            if not future.cancelled():
                assert not isinstance(future.exception(0), DeliveryTimeout) or payload == "short", said


def settled(futures: dict[Any, JobFuture[Any]]) -> None:
    # Interrupted in the middle of telling it, `wait` may return too early, never too late.
    assert wait(futures.values(), BOUND)
    for future in futures.values():
        try:
            future.exception(BOUND)
        except CancelledError:
            pass


def everywhere(monkeypatch: pytest.MonkeyPatch, role: str, scenario: Callable[[Rig], None], stride: int) -> int:
    """Run *scenario* with the thread interrupted at one point after the other until it gets through; how many fired."""
    n = quiet = fired = 0
    while quiet < 3:
        with monkeypatch.context() as patch:
            rig = Rig(patch, role, n)
            began = time.monotonic()
            try:
                scenario(rig)
            except BaseException as exc:
                raise AssertionError(f"point {n} of the {role}, in {rig.where or 'nothing'}") from exc
            took = time.monotonic() - began
        assert took < DEADLINE, f"point {n} of the {role}, in {rig.where}: somebody slept until a deadline"
        quiet = 0 if rig.where else quiet + 1
        fired += bool(rig.where)
        n += stride
    return fired


def plain(rig: Rig) -> None:
    batcher = MicroBatcher[Any, Any](rig, max_batch_size=3, retry=FAST, delivery_timeout=DEADLINE)
    batcher.on(JobCompleted, rig.events.append)
    batcher.on(JobFailed, rig.events.append)
    batcher.on(BatchCompleted, rig.events.append)
    futures = dict(zip([1, "bad", 3], batcher.submit_many([1, "bad", 3]), strict=True))
    rig.watch(1, futures[1])
    settled(futures)
    futures["mine"] = rig.watch("mine", batcher.submit("mine", job_id="mine"))
    settled(futures)
    fired = rig.where
    futures["after"] = batcher.submit("after")
    settled(futures)
    if fired:
        assert futures["after"].result(0) == "after"
    assert batcher.shutdown(timeout=DEADLINE).finished
    rig.check(futures)
    assert batcher.stats().outstanding == 0
    assert batcher.stats().submitted == 5


def comes_back(rig: Rig) -> None:
    """A failing open, a batch that is retried, one that stays undecided, and neighbours of both."""
    rig.failures = 1
    batcher = MicroBatcher[Any, Any](rig, max_batch_size=3, retry=FAST, delivery_timeout=DEADLINE)
    batcher.on(JobRetrying, rig.events.append)
    futures: dict[Any, JobFuture[Any]] = {}

    def submit(*jobs: Any) -> None:
        futures.update(zip(jobs, batcher.submit_many(jobs), strict=True))

    submit("first")
    submit("undecided", "with it")
    settled(futures)
    submit("retry", "bad")
    submit("neighbour")
    settled(futures)
    fired = rig.where
    submit("after")
    settled(futures)
    if fired:
        assert futures["after"].result(0) == "after"
    assert batcher.shutdown(timeout=DEADLINE).finished
    rig.check(futures)
    assert batcher.stats().outstanding == 0
    assert batcher.stats().submitted == 7


def stuck(rig: Rig) -> None:
    """Deadlines while the processor holds a batch, cancels, and a shutdown that runs into its timeout."""
    batcher = MicroBatcher[Any, Any](rig, max_batch_size=1, retry=FAST, delivery_timeout=DEADLINE)
    batcher.on(JobFailed, rig.events.append)
    futures = {"hold": rig.watch("hold", batcher.submit("hold", delivery_timeout=0.02))}
    held = rig.holds("hold", futures["hold"])
    futures["short"] = rig.watch("short", batcher.submit("short", delivery_timeout=0.01))
    futures["silent"] = batcher.submit("silent", delivery_timeout=0.01)
    settled(futures)
    if held:
        rig.gates["hold"].put(None)
        assert futures["hold"].status is JobStatus.UNKNOWN
        assert futures["short"].status is futures["silent"].status is JobStatus.FAILED
    fired = rig.where
    futures["after"] = batcher.submit("after")
    settled(futures)
    if fired:
        assert futures["after"].result(0) == "after"
    futures["hold again"] = batcher.submit("hold again")
    held = rig.holds("hold again", futures["hold again"])
    futures["cancelled"] = batcher.submit("cancelled")
    cancelled = futures["cancelled"].cancel()
    assert cancelled or not held
    futures["cut off"] = rig.watch("cut off", batcher.submit("cut off"))
    batcher.shutdown(timeout=0.01 if held else DEADLINE)
    settled(futures)
    if held:
        rig.gates["hold again"].put(None)
        assert isinstance(futures["hold again"].exception(0), OutcomeUnknown)
        assert isinstance(futures["cut off"].exception(0), BatcherClosed)
    report = batcher.shutdown(timeout=DEADLINE)
    assert report.finished
    # One too many if the interruption hits the very moment of noting it down.
    assert set(report.undelivered) == ({"cut off", "hold again"} if held else set())
    for name in ("short", "silent", "cut off", "cancelled"):
        assert rig.done.get(name, 0) <= (futures[name].status in (JobStatus.COMPLETED, JobStatus.UNKNOWN))
    if "_run_callbacks" not in rig.where:  # between a callback's leaving the list and its call it is lost
        assert sorted(rig.called) == ["cut off", "hold", "short"]
    assert batcher.stats().outstanding == 0


# Every so many-th point, so that the whole takes less than a minute; all of them take several.
STRIDES = {
    ("worker", plain): 2,
    ("worker", comes_back): 7,
    ("worker", stuck): 5,
    ("supervisor", plain): 1,
    ("supervisor", stuck): 7,
}
EVERY_POINT = "MICROBATCH_EVERY_POINT" in os.environ


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="this interpreter crashes when one thread traces what another one runs"
)
@pytest.mark.timeout(1200 if EVERY_POINT else 120)
@pytest.mark.parametrize(("role", "scenario"), STRIDES, ids=lambda given: getattr(given, "__name__", given))
def test_P1_a_thread_of_the_library_is_interrupted_anywhere(
    role: str, scenario: Callable[[Rig], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stride = 1 if EVERY_POINT else STRIDES[role, scenario]
    assert everywhere(monkeypatch, role, scenario, stride) * stride > 80


# The same in the threads of the callers.


class Caller:
    """A batcher whose worker can be held, and whose caller is about to be interrupted."""

    def __init__(self, **options: Any) -> None:
        self.gate = threading.Event()
        self.inside = threading.Event()
        self.seen: list[Any] = []
        self.batcher = MicroBatcher[Any, Any](
            self.process, **{"max_batch_size": 2, "delivery_timeout": DEADLINE, "submit_timeout": BOUND, **options}
        )

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.inside.set()
        assert self.gate.wait(BOUND)
        self.seen += batch
        return list(batch)

    def held(self) -> Caller:
        self.batcher.submit("held")
        assert self.inside.wait(BOUND)
        return self

    def idle(self) -> Caller:
        self.gate.set()
        assert self.batcher.submit("first").result(BOUND) == "first"
        return self

    def check(self, where: str, *, at_most: int, room: int = 0) -> None:
        """Whatever was interrupted, everything goes on, and nothing is done twice or by halves."""
        began = time.monotonic()
        self.gate.set()
        batcher = self.batcher
        assert batcher.flush(BOUND), where
        stats = batcher.stats()
        assert stats.outstanding == 0, where
        assert stats.submitted == stats.completed + stats.cancelled <= at_most, where
        assert len(self.seen) == len(set(self.seen)) == stats.completed, where
        if room:
            # No place has leaked.
            with batcher._core.lock:
                futures = [batcher.submit(n, submit_timeout=0) for n in range(room)]
                with pytest.raises(QueueFull):
                    batcher.submit("too many", submit_timeout=0)
            assert [future.result(BOUND) for future in futures] == list(range(room)), where
        assert not batcher._core.blocked, where
        assert batcher.shutdown(timeout=BOUND).finished, where
        assert time.monotonic() - began < DEADLINE, f"{where}: somebody slept until a deadline"


def test_P1_submit_is_interrupted_anywhere() -> None:
    for where, caller in interrupted_everywhere(
        lambda: Caller(max_outstanding=3).idle(), lambda caller: caller.batcher.submit("job", job_id="mine")
    ):
        caller.check(where, at_most=2, room=3)


def test_P1_the_first_submit_is_interrupted_anywhere() -> None:
    for where, caller in interrupted_everywhere(Caller, lambda caller: caller.batcher.submit("job")):
        caller.gate.set()
        assert caller.batcher.submit("after").result(BOUND) == "after", where
        caller.check(where, at_most=2)


def test_a_thread_s_watch_whose_making_is_interrupted_is_dropped_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: dropped.append(event.exc_value))
    core = MicroBatcher(lambda batch: list(batch))._core

    places = [where for where, _ in interrupted_everywhere(lambda: core, DeathWatch)]

    assert any(where.startswith("__init__") for where in places), places
    # What interrupts the finaliser itself is dropped by Python.
    assert {type(error) for error in dropped} <= {Interrupt}, dropped


def test_P1_submit_many_is_interrupted_anywhere() -> None:
    for where, caller in interrupted_everywhere(
        lambda: Caller(max_outstanding=3).idle(), lambda caller: caller.batcher.submit_many(["a", "b", "c"])
    ):
        caller.check(where, at_most=4, room=3)
        assert len(caller.seen) in (4, 7), where  # all or none, and the three that prove the room


def test_P1_submit_many_into_a_bounded_queue_is_interrupted_anywhere() -> None:
    for where, caller in interrupted_everywhere(
        lambda: Caller(queue=queue.Queue(3)).idle(), lambda caller: caller.batcher.submit_many(["a", "b", "c"])
    ):
        caller.check(where, at_most=4)
        assert len(caller.seen) in (1, 4), where


def test_P5_a_blocked_submit_is_interrupted_anywhere() -> None:
    """Next to it another one waits: it must get the place, and not only when its patience ends."""

    class Blocked(Caller):
        def __init__(self) -> None:
            super().__init__(max_outstanding=1, max_batch_size=1)
            self.held()
            self.took = 0.0
            self.over = threading.Event()
            self.go: SimpleQueue[None] = SimpleQueue()
            # Started here: an interruption inside `Thread.start` makes the thread hang in it for ever.
            self.helpers = [threading.Thread(target=self.release), threading.Thread(target=self.neighbour)]
            for helper in self.helpers:
                helper.start()

        def call(self) -> None:
            self.go.put(None)
            self.go.put(None)
            self.batcher.submit("blocked")

        def release(self) -> None:
            self.go.get()
            while len(self.batcher._core.blocked) < 2 and not self.over.wait(0.0005):
                pass
            self.gate.set()

        def neighbour(self) -> None:
            self.go.get()
            began = time.monotonic()
            self.batcher.submit("neighbour")
            self.took = time.monotonic() - began

    prepared = []

    def prepare() -> Blocked:
        prepared.append(Blocked())
        return prepared[-1]

    def finish(caller: Blocked) -> None:
        caller.over.set()
        for _ in caller.helpers:
            caller.go.put(None)
        for helper in caller.helpers:
            helper.join(BOUND)
            assert not helper.is_alive()

    points = 0
    for where, caller in interrupted_everywhere(prepare, Blocked.call):
        points += 1
        finish(caller)
        caller.check(where, at_most=3, room=1)
        assert caller.took < DEADLINE, f"{where}: the place was left to nobody"
    finish(prepared[-1])
    prepared[-1].check("nowhere", at_most=3, room=1)
    assert points > 50


def test_P1_cancel_is_interrupted_anywhere() -> None:
    """Somebody waits for the job: with `result()`, with `wait()`, with a callback."""

    class Cancelling(Caller):
        def __init__(self) -> None:
            super().__init__()
            self.held()
            self.called: list[Any] = []
            self.future = self.batcher.submit("job")
            self.future.add_done_callback(self.called.append)
            self.outcomes: list[Any] = []
            self.waiters = [threading.Thread(target=self.get), threading.Thread(target=self.wait)]
            for waiter in self.waiters:
                waiter.start()
            while not self.future._waiters:
                time.sleep(0.0005)

        def get(self) -> None:
            try:
                self.outcomes.append(self.future.result(BOUND))
            except CancelledError:
                self.outcomes.append("cancelled")

        def wait(self) -> None:
            self.outcomes.append(wait([self.future], BOUND).done)

    for where, caller in interrupted_everywhere(Cancelling, lambda caller: caller.future.cancel()):
        caller.check(where, at_most=2)
        for waiter in caller.waiters:
            waiter.join(BOUND)
        expected = "cancelled" if caller.future.cancelled() else "job"
        assert sorted(map(str, caller.outcomes)) == sorted([expected, str({caller.future})]), where
        assert caller.future.cancelled() == ("job" not in caller.seen), where
        if "_run_callbacks" not in where:
            assert caller.called == [caller.future], where


@pytest.mark.parametrize(
    "call",
    [
        lambda caller: caller.batcher.flush(BOUND),
        lambda caller: caller.batcher.shutdown(timeout=BOUND),
        lambda caller: caller.batcher.shutdown(cancel_futures=True, timeout=BOUND),
        lambda caller: caller.future.result(BOUND),
        lambda caller: wait([caller.future], BOUND),
        lambda caller: caller.batcher.stats(),
        lambda caller: caller.future.job_id,
        lambda caller: caller.future.add_done_callback(caller.called.append),
    ],
    ids=["flush", "shutdown", "cancel_futures", "result", "wait", "stats", "job_id", "add_done_callback"],
)
def test_P6_other_calls_are_interrupted_anywhere(call: Callable[[Any], object]) -> None:
    class Waiting(Caller):
        def __init__(self) -> None:
            super().__init__()
            self.held()
            self.called: list[Any] = []
            self.future = self.batcher.submit("job")
            threading.Timer(0.01, self.gate.set).start()

    for where, caller in interrupted_everywhere(Waiting, call):
        assert wait([caller.future], BOUND).done, where
        caller.check(where, at_most=2)


def test_P6_the_end_of_a_multiprocessing_child_is_interrupted_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits there for the other threads is no daemon: if it hung, so would the process."""
    monkeypatch.setattr(life, "_close_at_exit", lambda: None)
    runs: list[tuple[threading.Event, threading.Thread]] = []
    # Fewer points than where it looks at all threads.
    monkeypatch.setattr(life, "_other_threads", lambda: [runs[-1][1]][: not runs[-1][0].is_set()])

    def prepare() -> None:
        over = threading.Event()
        runs.append((over, threading.Thread(target=over.wait)))
        runs[-1][1].start()

    for _ in interrupted_everywhere(prepare, lambda _: life._close_after_other_threads()):
        runs[-1][0].set()
        nobody_stays()
    runs[-1][0].set()
    assert len(runs) > 30
