"""For your own tests: a batcher without threads, a clock that you move, a processor that fails on cue, and the contract
suites that a queue or a processor of your own should pass.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from .batcher import MicroBatcher
from .collector import NEVER, lingers_until
from .core import Core, cores
from .job import JobFuture
from .logs import name_thread
from .options import DEFAULT
from .protocols import Batch, BatchProcessor
from .stats import ShutdownReport
from .supervisor import Supervisor
from .worker import Worker, leave

J = TypeVar("J")
R = TypeVar("R")


_ENDLESS = 3600.0  # seconds of the clock


class ManualClock:
    """A monotonic clock that stands still until it is moved. Call it to read it; seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move forward; a clock like this never goes back."""
        if not seconds >= 0:
            raise ValueError(f"a monotonic clock moves forward only, not by {seconds!r}")
        self.now += seconds


class InlineBatcher(MicroBatcher[J, R]):
    """A `MicroBatcher` that starts no thread: `submit` processes the job before it returns.

    The same code collects, judges, retries and settles, on the calling thread. Time is a `ManualClock`: it jumps over
    back-off and linger instead of sleeping. Inside `with batcher.hold():` jobs pile up and are processed
    together at the end. For tests of one thread.

    Args:
        processor: as for `MicroBatcher`.
        clock: a `ManualClock` to share; by default one of its own, which is never behind the real time when a job
            is submitted to an empty batcher.
        options: as for `MicroBatcher`.
    """

    def __init__(
        self,
        processor: BatchProcessor[J, R] | Callable[[Batch[J]], Sequence[R | Exception] | None],
        *,
        clock: ManualClock | None = None,
        **options: Any,
    ) -> None:
        self.clock = ManualClock(time.monotonic()) if clock is None else clock
        self._catches_up = clock is None
        self._held = 0
        self._running = False
        # There is no other thread that could make room while a submit waits.
        super().__init__(processor, **{**options, "when_full": "raise"})

    def _drive(self) -> tuple[Callable[[], float], Callable[[Core], None]]:
        return self.clock, self._place_worker

    def _place_worker(self, core: Core) -> None:
        """In the place of threads; called at the first submit, and again in a forked child."""
        self._worker = Worker(core)
        self._supervisor = Supervisor(core)
        core.inline = True
        cores.discard(core)  # no thread would drain it at exit, which waits for that
        with core.lock:
            core.workers.append(self._worker)
            core.supervisor = self._supervisor
            core.ready = True

    def submit(
        self,
        job: J,
        *,
        job_id: str | None = None,
        priority: int = 0,
        submit_timeout: float = DEFAULT,
        delivery_timeout: float | None = DEFAULT,
    ) -> JobFuture[R]:
        """As `MicroBatcher.submit`; the future is resolved already, unless the batcher is held."""
        self._catch_up()
        future: JobFuture[R] = super().submit(
            job,
            job_id=job_id,
            priority=priority,
            submit_timeout=submit_timeout,
            delivery_timeout=delivery_timeout,
        )
        self._run_unless_held()
        return future

    def submit_many(
        self,
        jobs: Iterable[J],
        *,
        priority: int = 0,
        submit_timeout: float = DEFAULT,
        delivery_timeout: float | None = DEFAULT,
    ) -> list[JobFuture[R]]:
        """As `MicroBatcher.submit_many`: the jobs form as few batches as they can."""
        self._catch_up()
        futures = super().submit_many(
            jobs, priority=priority, submit_timeout=submit_timeout, delivery_timeout=delivery_timeout
        )
        self._run_unless_held()
        return futures

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let jobs pile up; they are processed when the block ends."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._run_unless_held()

    def flush(self, timeout: float | None = None) -> bool:
        """Process what is held."""
        if not self._running:
            self._core.flush_open_batch()
            self.run()
        return super().flush(timeout)

    def shutdown(
        self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None
    ) -> ShutdownReport:
        """As `MicroBatcher.shutdown`; a *timeout* of 0 leaves what is held undelivered."""
        report = super().shutdown(False, cancel_futures=cancel_futures, timeout=timeout)
        if report.finished or self._running:
            return report
        self._core.forget_own_cancels()
        self.run()
        return super().shutdown(False)

    def run(self) -> None:
        """Process everything accepted, moving the clock to whatever is waited for."""
        core = self._core
        if not core.ready or self._running:
            return
        self._running = True
        core.own.add(threading.get_ident())
        name = name_thread(core.options.name)
        give_up = self.clock.now + _ENDLESS
        try:
            while self._supervisor.check() and (self._turn() or self._jump(give_up)):
                pass
        finally:
            name_thread(name)
            core.own.discard(threading.get_ident())
            self._running = False
        if core.closed and not core.outstanding:
            self._leave()

    def _turn(self) -> bool:
        if not self._worker.turn(wait=False):
            return False
        heap = self._core.intake.heap
        if heap and heap[0][0] <= self.clock.now:
            # Work takes time; if it did not, a retry without back-off would never reach its deadline.
            self.clock.now += 0.001
        return True

    def _leave(self) -> None:
        core = self._core
        if self._worker in core.workers:
            leave(self._worker)
        self._supervisor.check()

    def _catch_up(self) -> None:
        # A processor may compare its batch's deadline with the real time, so a clock of our own does not lag behind.
        if self._catches_up and not self._core.outstanding:
            self.clock.now = max(self.clock.now, time.monotonic())

    def _run_unless_held(self) -> None:
        if not self._held:
            self.run()

    def _jump(self, give_up: float) -> bool:
        """Move the clock to the next instant at which something happens; False when there is none.

        False past *give_up*, too, where only jobs without a deadline are left: they may be tried again for ever.
        """
        core = self._core
        instants = [core.next_check, *(due for due, _, _ in core.intake.heap[:1])]
        instants += [lingers_until(job, core.options.linger) for job in core.intake.open]
        ahead = [instant for instant in instants if self.clock.now < instant < NEVER]
        endless = self.clock.now > give_up and core.next_check == NEVER
        if not core.outstanding or not ahead or endless:
            return False
        self.clock.now = min(ahead)
        return True


class FaultyProcessor(Generic[J, R]):
    """Does its work except where the script says otherwise; safe to call from several threads.

    Args:
        script: what each call does, in order; after its end every call works. An exception instance is raised, a
            function is called with the batch and its answer returned, None works.
        work: what a working call answers for one job; the job itself by default.
        retryable: exception types that `is_retryable` says yes to.

    Attributes:
        batches: the payloads of each call, in order.
        calls: the `Batch` of each call.
    """

    def __init__(
        self,
        script: Iterable[BaseException | Callable[[Batch[J]], Any] | None] = (),
        *,
        work: Callable[[J], Any] = lambda job: job,
        retryable: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._script = iter(script)
        self._work = work
        self._retryable = retryable
        self._lock = threading.Lock()
        self.calls: list[Batch[J]] = []
        self.opened = 0
        self.closed = 0

    @property
    def batches(self) -> list[tuple[J, ...]]:
        return [batch[:] for batch in self.calls]

    def open(self) -> None:
        self.opened += 1

    def close(self) -> None:
        self.closed += 1

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, self._retryable)

    def process(self, batch: Batch[J]) -> Any:
        with self._lock:
            self.calls.append(batch)
            step = next(self._script, None)
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            return step(batch)
        return [self._work(job) for job in batch]


class _Item:
    """What the batcher puts into a queue, as far as a queue may know."""

    def __init__(self, priority: int, sequence: int) -> None:
        self.priority = priority
        self.sequence = sequence

    def __lt__(self, other: _Item) -> bool:
        return (-self.priority, self.sequence) < (-other.priority, other.sequence)

    def __repr__(self) -> str:
        return f"item(priority={self.priority}, sequence={self.sequence})"


class QueueContract:
    """What the batcher relies on in a queue. Subclass it in your tests and say how yours is made::

    class TestMyQueue(QueueContract):
        def make_queue(self):
            return MyQueue()
    """

    fifo = True  # among items of one priority

    def make_queue(self) -> Any:
        raise NotImplementedError("return a new, empty queue")

    def test_an_empty_queue_raises_empty_and_does_not_block(self) -> None:
        made = self.make_queue()
        assert made.qsize() == 0
        try:
            made.get_nowait()
        except queue.Empty:
            return
        raise AssertionError("get_nowait() of an empty queue must raise queue.Empty")

    def test_every_item_comes_out_once(self) -> None:
        made = self.make_queue()
        items = [_Item(0, n) for n in range(50)]
        for item in items:
            made.put_nowait(item)
        assert made.qsize() == 50
        assert sorted(self._drain(made)) == items
        assert made.qsize() == 0

    def test_items_come_in_their_order(self) -> None:
        made = self.make_queue()
        ordered = bool(getattr(made, "ordered", isinstance(made, queue.PriorityQueue)))
        items = [_Item(n % 3 if ordered else 0, n) for n in range(30)]
        for item in items:
            made.put_nowait(item)
        if ordered:
            assert self._drain(made) == sorted(items)
        elif self.fifo:
            assert self._drain(made) == items

    def test_get_many_takes_a_batch_at_once(self) -> None:
        made = self.make_queue()
        if not hasattr(made, "get_many"):
            return
        assert list(made.get_many(5)) == []
        items = [_Item(0, n) for n in range(7)]
        for item in items:
            made.put_nowait(item)
        first = list(made.get_many(5))
        assert len(first) == 5, "get_many(n) takes n items when they are there"
        rest = list(made.get_many(5))
        assert sorted(first + rest) == items

    def test_a_batcher_loses_nothing_through_it(self) -> None:
        with MicroBatcher[int, int](lambda batch: list(batch), queue=self.make_queue, max_batch_size=7) as batcher:
            futures = [batcher.submit(n) for n in range(200)]
            assert [future.result(10) for future in futures] == list(range(200))

    @staticmethod
    def _drain(made: Any) -> list[_Item]:
        return [made.get_nowait() for _ in range(made.qsize())]


class ProcessorContract:
    """What the batcher relies on in a processor. Subclass it in your tests::

    class TestMyProcessor(ProcessorContract):
        def make_processor(self):
            return MyProcessor(...)

        def make_jobs(self, n):
            return [{"user_id": i} for i in range(n)]

        def check(self, job, result):
            assert result["user_id"] == job["user_id"]
    """

    def make_processor(self) -> Any:
        raise NotImplementedError("return a new processor")

    def make_jobs(self, n: int) -> Sequence[Any]:
        raise NotImplementedError("return n different jobs that can be done")

    def check(self, job: Any, result: Any) -> None:
        raise NotImplementedError("assert that *result* is the one of *job*")

    def test_each_job_gets_its_own_result(self) -> None:
        jobs = self.make_jobs(25)
        with MicroBatcher[Any, Any](self.make_processor(), max_batch_size=10) as batcher:
            futures = [batcher.submit(job) for job in jobs]
            for job, future in zip(jobs, futures, strict=True):
                self.check(job, future.result(30))

    def test_a_batch_of_one_and_a_full_one(self) -> None:
        for size in (1, 10):
            jobs = self.make_jobs(size)
            with MicroBatcher[Any, Any](self.make_processor(), max_batch_size=10) as batcher:
                for job, future in zip(jobs, batcher.submit_many(jobs), strict=True):
                    self.check(job, future.result(30))

    def test_it_can_be_used_again_after_close(self) -> None:
        processor = self.make_processor()
        for _ in range(2):
            jobs = self.make_jobs(3)
            with MicroBatcher[Any, Any](processor) as batcher:
                for job in jobs:
                    self.check(job, batcher.execute(job))

    def test_several_threads_at_once(self) -> None:
        jobs = self.make_jobs(60)
        with MicroBatcher[Any, Any](self.make_processor(), max_batch_size=5, max_concurrent_batches=4) as batcher:
            for job, future in zip(jobs, [batcher.submit(job) for job in jobs], strict=True):
                self.check(job, future.result(30))


__all__ = ["FaultyProcessor", "InlineBatcher", "ManualClock", "ProcessorContract", "QueueContract"]
