"""`MicroBatcher`: what users hold. Everything behind it lives in `core`, so a forgotten batcher can be collected."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, overload

from .acceptance import admit, admit_all, refuse_closed, refuse_without_threads
from .belongings import Belongings
from .calling import Processor
from .collector import NEVER
from .core import Core
from .events import Event, JobSubmitted
from .job import Job, JobFuture, JobStatus
from .life import bound_of_shutdown, finish_without_threads, start_threads, wait_for_all, wait_for_finish
from .mapping import results_of
from .options import DEFAULT, Options, check_submit, options_from_env, seconds
from .owed import cancel_all
from .protocols import Batch, BatchProcessor
from .queues import MemoryQueue, store_factory
from .retry import RetryPolicy
from .stats import ShutdownReport, Stats

J = TypeVar("J")
R = TypeVar("R")
E = TypeVar("E", bound=Event)
Self = TypeVar("Self", bound="MicroBatcher[Any, Any]")

_RETRY = RetryPolicy()


class MicroBatcher(Generic[J, R]):
    """Collects submitted jobs into batches and runs each through *processor* on a background thread.

    All methods may be called from any thread. No thread starts before the first submit in this process; after a
    fork the child starts empty and works. Every accepted job gets exactly one outcome.

    Args:
        processor: an object with `process(batch)`, or a plain function; see `BatchProcessor`.
        max_batch_size: exact upper bound of a batch.
        linger: longest extra time, in seconds, that the oldest queued job waits for company while a worker is
            free (elsewhere: batch timeout, interval, frequency). Never more than half of a job's delivery timeout.
            With 0 a lone job never waits; callers whom a batch has woken are given a moment to come back together.
        max_concurrent_batches: worker threads; 1 keeps the order of submits, retries and isolation aside.
        max_outstanding: bound on accepted jobs without an outcome; a queue's own `maxsize` adds to it.
        when_full: `"block"` up to *submit_timeout*, or `"raise"`; both end in `QueueFull`.
        submit_timeout: seconds that a submit may block when full.
        delivery_timeout: seconds from submit to outcome, retries included; None for no limit.
        retry: a `RetryPolicy`, or None for never.
        queue: a factory of a `JobQueue`, or an empty queue of the stdlib.
        history: how many finished jobs `status` still knows.
        history_ttl: for how many seconds.
        name: for threads, logs and metrics.

    Raises:
        TypeError, ValueError: naming the option, the value and the remedy.
    """

    def __init__(
        self,
        processor: BatchProcessor[J, R] | Callable[[Batch[J]], Sequence[R | Exception] | None],
        *,
        max_batch_size: int = 100,
        linger: float = 0.0,
        max_concurrent_batches: int = 1,
        max_outstanding: int = 10_000,
        when_full: str = "block",
        submit_timeout: float = 5.0,
        delivery_timeout: float | None = 20.0,
        retry: RetryPolicy | None = _RETRY,
        queue: Any = MemoryQueue,
        history: int = 10_000,
        history_ttl: float = 300.0,
        name: str = "microbatch",
    ) -> None:
        options = Options(
            max_batch_size,
            linger,
            max_concurrent_batches,
            max_outstanding,
            when_full,
            submit_timeout,
            delivery_timeout,
            retry,
            queue,
            history,
            history_ttl,
            name,
        )
        self._processor, self._options = processor, options
        self._open(Core(Processor(processor), options, store_factory(queue), *self._drive()))

    def _drive(self) -> tuple[Callable[[], float], Callable[[Core], None]]:
        """The clock, and how threads are started."""
        return time.monotonic, start_threads

    def _open(self, core: Core) -> None:
        self._core = core
        self._belongings = core.adopt()
        self._submit_timeout = core.options.submit_timeout
        timeout = core.options.delivery_timeout
        self._lifetime = NEVER if timeout is None else timeout
        # Holds none of them: a listener may lead back to the batcher. Exit has hooks of its own.
        weakref.finalize(self, _close, weakref.ref(core), weakref.ref(self._belongings)).atexit = False

    @classmethod
    def from_env(
        cls,
        processor: BatchProcessor[J, R] | Callable[[Batch[J]], Sequence[R | Exception] | None],
        prefix: str = "MICROBATCH_",
        **overrides: Any,
    ) -> MicroBatcher[J, R]:
        """A batcher with options from the environment, such as `MICROBATCH_MAX_BATCH_SIZE=500`.

        The word `none` is None, an empty variable is unset; the retry policy's numbers are `…RETRY_MAX_ATTEMPTS`,
        `…RETRY_BACKOFF` and `…RETRY_BACKOFF_MAX`. Keyword arguments win over the environment.

        Raises:
            ValueError: a bad value, or a variable that is nearly an option's name.
        """
        return cls(processor, **{**options_from_env(prefix), **overrides})

    def submit(
        self,
        job: J,
        *,
        job_id: str | None = None,
        priority: int = 0,
        submit_timeout: float = DEFAULT,
        delivery_timeout: float | None = DEFAULT,
    ) -> JobFuture[R]:
        """Accept *job* and return its future at once; it waits only while the batcher is full.

        **The job is read when its batch is made, and not here**: what is changed in between is processed as it is
        then. Make a new object for each job, or submit a copy.

        Args:
            job_id: an id of your own. One that is pending, processing, completed or unknown in this process gives
                the same future again; after failed or cancelled it is free.
            priority: larger first, FIFO within one.
            submit_timeout: seconds to wait for a place, instead of the batcher's.
            delivery_timeout: seconds to the outcome, instead of the batcher's.

        Raises:
            QueueFull: no place within *submit_timeout*; on the batcher's own threads at once.
            BatcherClosed: `shutdown` has begun, also while this call waited.
            ThreadsUnavailable: no thread can be started.
            TypeError, ValueError: a bad argument.

        Whatever it raises, the job was not accepted. (One exception: an interrupt such as Ctrl-C may arrive just
        after the acceptance; the job then runs without a handle.)
        """
        core = self._core
        here = core.here
        if not here[0]:
            core.check_process()
            here = core.here
        if submit_timeout is not DEFAULT or delivery_timeout is not DEFAULT or priority or job_id is not None:
            if job_id is not None and isinstance(job_id, str):
                # A string of a class of its own could raise from its hash, and in the middle of the acceptance.
                job_id = str.__str__(job_id)
            self._check(job_id, priority, submit_timeout, delivery_timeout)
            record = self._record(job, priority, delivery_timeout)
            if job_id is not None:
                record.future._job_id = job_id
            if submit_timeout is DEFAULT:
                submit_timeout = self._submit_timeout
        else:
            now = core.clock()
            record = Job(job, core.new_future(core), 0, now, now + self._lifetime)
            submit_timeout = self._submit_timeout
        if not core.ready:
            self._start(1)
        future = admit(core, record, submit_timeout, job_id)
        if core.here is not here:
            core.carry_on()
        if core.listeners.by_type and future is record.future:
            self._tell_submitted(job, future, priority)
        return future

    def submit_many(
        self,
        jobs: Iterable[J],
        *,
        priority: int = 0,
        submit_timeout: float = DEFAULT,
        delivery_timeout: float | None = DEFAULT,
    ) -> list[JobFuture[R]]:
        """Accept all *jobs* in their order, or none of them; see `submit`. Cheaper than one by one.

        Raises:
            ValueError: they are more than `max_outstanding`, and could never be accepted together; `map` takes any
                number.
        """
        core = self._core
        core.check_process()
        here = core.here
        self._check(None, priority, submit_timeout, delivery_timeout)
        payloads = list(jobs)
        records = [self._record(job, priority, delivery_timeout) for job in payloads]
        if not records:
            return []
        if not core.ready:
            self._start(len(records))
        admit_all(core, records, self._submit_timeout if submit_timeout is DEFAULT else submit_timeout)
        futures = [record.future for record in records]
        if core.here is not here:
            core.carry_on()
        if core.listeners.by_type:
            for payload, future in zip(payloads, futures, strict=True):
                self._tell_submitted(payload, future, priority)
        return futures

    def execute(
        self,
        job: J,
        *,
        job_id: str | None = None,
        priority: int = 0,
        submit_timeout: float = DEFAULT,
        delivery_timeout: float | None = DEFAULT,
    ) -> R:
        """Submit *job* and wait for its result, bounded by *delivery_timeout*; see `submit`.

        Raises:
            RuntimeError: on the batcher's own threads, where it would wait for itself, and in a signal handler or
                finaliser that interrupted the batcher's own code on this thread; the job was not accepted then.
            Exception: whatever failed the job.
        """
        if self._core.on_own_thread():
            raise RuntimeError("execute() on a thread of its own batcher would wait for itself; use submit()")
        self._core.refuse_below_itself("execute()")
        return self.submit(
            job,
            job_id=job_id,
            priority=priority,
            submit_timeout=submit_timeout,
            delivery_timeout=delivery_timeout,
        ).result()

    @overload
    def map(
        self,
        jobs: Iterable[J],
        *,
        priority: int = 0,
        delivery_timeout: float | None = DEFAULT,
        return_exceptions: Literal[False] = False,
    ) -> Iterator[R]: ...
    @overload
    def map(
        self,
        jobs: Iterable[J],
        *,
        priority: int = 0,
        delivery_timeout: float | None = DEFAULT,
        return_exceptions: bool,
    ) -> Iterator[R | BaseException]: ...
    def map(
        self,
        jobs: Iterable[J],
        *,
        priority: int = 0,
        delivery_timeout: float | None = DEFAULT,
        return_exceptions: bool = False,
    ) -> Iterator[Any]:
        """The results of any number of *jobs*, in their order, in bounded memory.

        *jobs* is read as results are taken, some batches ahead. The first error is raised where its result would
        come; closing the iterator, as an error does, stops the reading, and what was accepted goes on. While others
        take all places it waits, unless `when_full="raise"`.

        Args:
            return_exceptions: yield errors in the place of results.

        Raises:
            RuntimeError: on the batcher's own threads, where it would wait for itself.
        """
        core, options = self._core, self._core.options
        core.check_process()
        self._check(None, priority, DEFAULT, delivery_timeout)
        if core.on_own_thread():
            raise RuntimeError("map() on a thread of its own batcher would wait for itself; use submit()")
        return results_of(
            partial(self.submit, priority=priority, delivery_timeout=delivery_timeout),
            jobs,
            window=min(options.max_outstanding, options.max_batch_size * (2 * options.max_concurrent_batches + 1)),
            patient=options.when_full == "block" and options.submit_timeout > 0,
            return_exceptions=return_exceptions,
        )

    def status(self, job_id: str) -> JobStatus:
        """The status of a job of this process, by its id.

        Raises:
            JobNotFound: never seen here, or forgotten by now (`history`, `history_ttl`).
        """
        return self.future(job_id).status

    def future(self, job_id: str) -> JobFuture[R]:
        """The future of a job of this process, by its id; raises as `status` does."""
        return self._core.find(job_id)

    def flush(self, timeout: float | None = None) -> bool:
        """Close the open batch, and wait until everything accepted before this call is resolved.

        Args:
            timeout: seconds; None waits as long as it takes (`delivery_timeout` bounds every job).

        Returns:
            False if *timeout* passed first.

        Raises:
            RuntimeError: on the batcher's own threads, where it would wait for itself, and in a signal handler or
                finaliser that interrupted the batcher's own code on this thread.
        """
        if timeout is not None:
            seconds("timeout", timeout)
        core = self._core
        core.check_process()
        if core.on_own_thread():
            raise RuntimeError("flush() on a thread of its own batcher would wait for itself")
        core.refuse_below_itself("flush()")
        return wait_for_all(core.flush_open_batch(), timeout)

    def shutdown(
        self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None
    ) -> ShutdownReport:
        """Stop accepting, process everything accepted before, retries included, and report.

        Idempotent; the earliest of several timeouts wins. On the batcher's own threads (a callback, a listener), and
        in a signal handler or finaliser that interrupted the batcher's own code on this thread, it only begins the
        shutdown and returns an incomplete report at once (`finished` is false): call it again, or leave the rest to
        the interpreter's exit.

        Args:
            wait: until every job has its outcome and the last event is out; False returns at once, and the
                timeout is kept all the same.
            cancel_futures: cancel what is queued; what waits for a retry fails with `BatcherClosed`.
            timeout: seconds, after which queued jobs fail with `BatcherClosed` and running ones become
                unknown; both are handed back in the report. None waits as long as the jobs' deadlines, and 10
                seconds for jobs that have none and may be tried again for ever.
        """
        if timeout is not None:
            seconds("timeout", timeout)
        core = self._core
        core.check_process()
        if timeout is None:
            core.close()
            bound = bound_of_shutdown(core)
            timeout = None if bound == NEVER else bound
        if timeout is not None:
            core.close(core.clock() + timeout)
        if cancel_futures:
            cancel_all(core)
        if core.must_not_wait():
            # What it interrupted goes on after this, and threads are there or on their way.
            return self._report()
        if not wait or core.on_own_thread():
            finish_without_threads(core)
        else:
            wait_for_finish(core, timeout)
        return self._report()

    @overload
    def on(self, event_type: type[E], listener: Callable[[E], object]) -> Callable[[E], object]: ...
    @overload
    def on(self, event_type: type[E]) -> Callable[[Callable[[E], object]], Callable[[E], object]]: ...
    def on(self, event_type: type[E], listener: Callable[[E], object] | None = None) -> Any:
        """Call *listener* with every event of *event_type*; without *listener*, a decorator.

        Listeners run on the batcher's threads after the futures are resolved, outside every lock. One that raises
        is logged and changes nothing; a slow one delays the next batch.
        """
        if listener is None:
            return lambda function: self.on(event_type, function)
        self._core.check_process()
        with self._core.lock:
            self._core.listeners.add(event_type, listener)
        return listener

    def off(self, event_type: type[E], listener: Callable[[E], object]) -> None:
        """Stop calling *listener*, compared by equality; ValueError if it does not listen."""
        self._core.check_process()
        with self._core.lock:
            self._core.listeners.remove(event_type, listener)

    @property
    def name(self) -> str:
        """As given; it begins every line of the log, and stands in every event and in the names of threads."""
        return self._options.name

    @property
    def processor(self) -> BatchProcessor[J, R] | Callable[[Batch[J]], Sequence[R | Exception] | None]:
        """The one that was given."""
        return self._processor

    @property
    def options(self) -> Options:
        """All of them as given or by default; frozen."""
        return self._options

    def stats(self) -> Stats:
        """A consistent snapshot of the counters."""
        return self._core.stats()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        core = self._core
        state = "shut down" if core.finished else "shutting down" if core.closed else "open"
        return f"<{type(self).__name__} {core.options.name!r}, {state}, {len(core.outstanding)} outstanding>"

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: its threads and futures belong to this process;"
            " make one in the process that uses it"
        )

    # Helpers.

    def _check(self, job_id: str | None, priority: int, submit_timeout: float, delivery_timeout: float | None) -> None:
        check_submit(job_id, priority, submit_timeout, delivery_timeout, ordered=self._core.intake.store.ordered)

    def _record(self, job: J, priority: int, delivery_timeout: float | None) -> Job:
        core = self._core
        lifetime = self._lifetime if delivery_timeout is DEFAULT else delivery_timeout
        now = core.clock()
        return Job(job, core.new_future(core), priority, now, NEVER if lifetime is None else now + lifetime)

    def _start(self, jobs: int) -> None:
        if self._core.closed:
            raise refuse_closed(self._core, jobs)
        try:
            self._core.start_threads()
        except RuntimeError as error:
            raise refuse_without_threads(self._core, jobs) from error

    def _tell_submitted(self, job: J, future: JobFuture[Any], priority: int) -> None:
        if self._core.listeners.want(JobSubmitted):
            name = self._core.options.name
            self._core.listeners.tell(JobSubmitted(job, future._job_id, priority, batcher=name))

    def _report(self) -> ShutdownReport:
        core = self._core
        with core.lock:
            c = core.counters
            return ShutdownReport(c.completed, c.failed, c.cancelled, c.unknown, tuple(core.undelivered), core.finished)


def _close(core: weakref.ref[Core], belongings: weakref.ref[Belongings]) -> None:
    """Of a batcher that nobody holds any more. A core that nobody holds either has no threads, and nothing to drain.

    Where its belongings die with it, their own finaliser sees to it: without them nothing could be closed.
    """
    living = core()
    if living is not None and belongings() is not None:
        living.close()
