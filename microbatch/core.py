"""The inner core that threads, futures and finalisers hold: the shared state and every move on it.

Who may move a job, always under `Core.lock`::

    submit ──► QUEUED ──► TAKEN ──► HANDED_OVER ──► verdict          worker
                 │ ▲        │            │
                 │ └────────┴─ recover   └─► WAITING ──► QUEUED      worker
                 ▼
              verdict: cancel (caller, QUEUED only), deadline and abandonment (supervisor, anywhere)

A job ends when its `verdict` is written, once: the first writer wins, and the same uninterrupted stretch of code
counts it and takes it out of `outstanding`. Whoever wrote it then concludes the future outside the lock; a worker's
list of jobs in flight and the supervisor's list of owed futures survive an interruption in between.

Rules for code under the lock. It is re-entrant, so that a finaliser may submit from inside it: only single
operations of C types on shared structures, no iteration over a dict that may grow, no I/O, no stranger's code (a
foreign queue excepted, which is used nowhere else). "Uninterrupted" means: no call and no jump, for these are the
places where CPython runs signal handlers, finalisers and injected exceptions (3.10 after any jump that is taken, later
ones after a backward one). A loop stands in a function of its own, not in the `with`: where a condition ends it,
Python 3.12 and 3.13 let an exception out at the jump back without a release (python/cpython#108214; a test finds it).
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .collector import NEVER, Intake, Returning, Undecided
from .errors import BatcherClosed, DeliveryTimeout, ForkedError, JobNotFound, OutcomeUnknown, QueueFull
from .events import JobCancelled, JobFailed, Listeners
from .interpreter import CANCELLED_AND_NOTIFIED, FINISHED, Token, process_mark
from .job import (
    COMPLETED,
    FAILED,
    HANDED_OVER,
    QUEUED,
    UNKNOWN,
    WAITING,
    Job,
    JobFuture,
    JobStatus,
    Verdict,
    renew_lock,
    status_of,
)
from .options import Options
from .registry import Registry
from .stats import Counters, Stats

_log = logging.getLogger("microbatch")

CANCELLED = JobStatus.CANCELLED
CANCELLED_VERDICT: Verdict = (CANCELLED, None, None)

# Every core that may have something to drain at exit or to forget in a forked child.
cores: weakref.WeakSet[Core] = weakref.WeakSet()


def living_cores() -> list[Core]:
    """What is in `cores` now, from any thread."""
    while True:
        try:
            return list(cores)
        except RuntimeError:
            # Another thread made a batcher in the middle of the list.
            pass


class Processor:
    """The user's processor with its optional methods looked up once."""

    def __init__(self, given: Any) -> None:
        process = getattr(given, "process", None)
        if process is None and callable(given) and not isinstance(given, type):
            process = given
        if not callable(process):
            raise TypeError(f"processor must have a method process(batch) or be a function, not {given!r}")
        self.process: Callable[[Any], Any] = process
        self.open: Callable[[], object] | None = _method(given, "open")
        self.close: Callable[[], object] | None = _method(given, "close")
        self.is_retryable: Callable[[BaseException], bool] | None = _method(given, "is_retryable")
        self.abandon: Callable[[Any], object] | None = _method(given, "abandon")


def _method(given: Any, name: str) -> Any:
    method = getattr(given, name, None)
    if method is not None and not callable(method):
        raise TypeError(f"{name} of processor {given!r} must be a method, not {method!r}")
    return method


class Core:
    """See the module. Lock order: `lock` is never held while a future's condition is taken."""

    # Guards everything below it. Entered only as `with core.lock:`, in C: an exception raised by a signal handler
    # inside a `Condition`'s `__enter__` would lose it for ever.
    lock: threading.RLock

    def __init__(
        self,
        processor: Processor,
        options: Options,
        new_store: Callable[[], Any],
        clock: Callable[[], float],
        start: Callable[[Core], None],
    ) -> None:
        self.processor = processor
        self.options = options
        self.clock = clock
        self.listeners = Listeners()
        self.closed = False
        self.inline = False  # one thread does everything: `testing.InlineBatcher`
        # How a job gets its future, on the submitting thread. Tracing puts another one here, which keeps the origin.
        self.new_future: Callable[[Core], JobFuture[Any]] = JobFuture
        self._new_store = new_store
        self._start = start
        self._reset()
        cores.add(self)

    def _reset(self) -> None:
        options = self.options
        self.lock = threading.RLock()
        self.outstanding: dict[int, Job] = {}
        self.sequence = itertools.count(1)
        self.intake = Intake(self._new_store(), self.outstanding)
        # Bound here for `admit`, which runs for every job.
        self.put = self.intake.store.put
        self.bound = options.max_outstanding
        self.registry = Registry(options.history, options.history_ttl)
        self.counters = Counters()
        self.batch_ids = map(f"{os.urandom(4).hex()}-{{}}".format, itertools.count(1))
        self.bell = Token()  # wakes the collecting worker
        self.wake_at: float = NEVER  # the sequence number that rings it; NEVER while it is awake
        self.wake_before: float = -NEVER  # ... and so does a job with an earlier deadline
        self.alarm = Token()  # wakes the supervisor
        self.next_check: float = NEVER  # when it wakes by itself
        self.blocked: deque[tuple[int, Token]] = deque()  # submitters waiting for so many places
        self.returning = Returning()
        self.collecting = threading.Lock()  # held by the one worker that collects: the others follow
        self.workers: list[Any] = []
        self.supervisor: Any = None
        self.ready = False  # every thread has claimed its place
        self.short = False  # one of them died since
        self.touched = False  # the processor was opened or called, so it is to be closed
        self.own: set[int] = set()  # idents of the threads that must not wait for themselves
        # Ended by no worker. False: the future is to be concluded; True: callbacks and events are still to come.
        self.owed: dict[Job, bool] = {}
        self.teller: Any = None  # the thread that runs those
        self.flushed = 0
        self.abandon_at: float = NEVER
        self.undelivered: list[Any] = []
        # One ticket for each call of `cancel` that has events to tell, with its thread: they come before the last one.
        self.cancelling: dict[object, int] = {}
        self.finishing = self.finished = False
        self.closers: list[Token] = []
        # Last: the fork check looks at it, and everything else is in place by then.
        self.here = process_mark()

    # Acceptance. Called by submitters.

    def admit(self, job: Job, submit_timeout: float, job_id: str | None) -> JobFuture[Any]:
        """Accept *job*, waiting for a place if need be; a taken *job_id* gives the future it has."""
        with self.lock:
            if self.closed:
                raise self.refuse_closed(1)
            if job_id is not None:
                taken = self.registry.taken(job_id, job.submitted)
                if taken is not None:
                    return taken
            if len(self.outstanding) < self.bound:
                sequence = next(self.sequence)
                future: JobFuture[Any] = job.future
                job.sequence = future._sequence = sequence
                # Wake-ups first, acceptance last: an interrupt in between leaves somebody awake for nothing,
                # the other way round an accepted job would sleep.
                if job.deadline < self.next_check:
                    self.alarm.put()
                    self.next_check = job.deadline
                if sequence >= self.wake_at or job.deadline < self.wake_before:
                    self.bell.put()
                    self.wake_at = NEVER
                    self.wake_before = -NEVER
                try:
                    self.put(job)
                except queue.Full:
                    pass
                else:
                    # THE acceptance: what is queued and not outstanding is skipped.
                    self.outstanding[sequence] = job
                    if job_id is not None:
                        self.registry.live[job_id] = future
                    return future
        if not self._wait_for_places(1, submit_timeout, lambda: self._accept_all([job], job_id)):
            return self.admit(job, 0.0, job_id)
        return job.future

    def admit_all(self, jobs: list[Job], submit_timeout: float) -> None:
        """Accept all *jobs* or none."""
        if len(jobs) > self.bound:
            with self.lock:
                self.counters.rejections["too_many"] += len(jobs)
            raise QueueFull(
                f"{len(jobs)} jobs can never fit at once into max_outstanding={self.bound}: "
                "submit them in slices, or raise max_outstanding"
            )
        self._wait_for_places(len(jobs), submit_timeout, lambda: self._accept_all(jobs, None))

    def _accept_all(self, jobs: list[Job], job_id: str | None) -> bool | None:
        """Under the lock. True when accepted, None when *job_id* was taken meanwhile, False when there is no room."""
        if job_id is not None and self.registry.taken(job_id, self.clock()) is not None:
            return None
        if len(self.outstanding) + len(jobs) > self.bound or not self.intake.store.fits(len(jobs)):
            return False
        accepted = {}
        try:
            for job in jobs:
                job.sequence = job.future._sequence = next(self.sequence)
                self.ring_supervisor(job.deadline)
                self.ring_worker()
                self.put(job)
                accepted[job.sequence] = job
        except queue.Full:
            # Those that went in lie there without being outstanding, and may be put again.
            self.intake.doubles = True
            return False
        self.outstanding.update(accepted)
        if job_id is not None:
            self.registry.live[job_id] = jobs[0].future
        return True

    def _wait_for_places(self, need: int, timeout: float, accept: Callable[[], bool | None]) -> bool:
        """Try *accept* until it says something, waiting for places in between; False if it said None."""
        began = self.clock()
        give_up = began + timeout
        token = Token()
        waiter = (need, token)
        nested = self.lock._is_owned()  # type: ignore[attr-defined]
        may_wait = timeout > 0 and self.options.when_full == "block" and not nested and not self.on_own_thread()
        in_line = False
        try:
            while True:
                with self.lock:
                    if self.closed:
                        raise self.refuse_closed(need)
                    accepted = accept()
                    if accepted is not False:
                        # Not left to `finally`: an interruption there would leave a place kept for nobody.
                        self._unblock(waiter)
                        return accepted is not None
                    left = give_up - self.clock()
                    if not may_wait or left <= 0:
                        raise self._refuse_full(need, timeout if may_wait else 0.0)
                    if not in_line:
                        self.blocked.append(waiter)
                        in_line = True
                        self.counters.blocked_submits += 1
                    if self.intake.dead and len(self.outstanding) + need <= self.bound:
                        # The queue's own bound: the dead in it give up their places only when they are swept.
                        self.ring_supervisor()
                token.take(left)
        finally:
            # A wake-up that this thread cannot use any more is passed on.
            with self.lock:
                self._unblock(waiter)
                self.wake_blocked()
                if in_line:
                    now = self.clock()
                    self.counters.blocked_seconds += now - began

    def _unblock(self, waiter: tuple[int, Token]) -> None:
        try:
            self.blocked.remove(waiter)
        except ValueError:
            pass

    def refuse_closed(self, need: int) -> BatcherClosed:
        """Count *need* jobs that come too late; the error for them."""
        with self.lock:
            self.counters.rejections["closed"] += need
        return BatcherClosed("the batcher is shut down: the job was not accepted")

    def _refuse_full(self, need: int, waited: float) -> QueueFull:
        """Under the lock: the same for *need* jobs without a place."""
        waits = f" for {waited:g} s" if waited else ""
        by_queue = len(self.outstanding) + need <= self.bound
        self.counters.rejections["queue" if by_queue else "full"] += need
        return QueueFull(
            f"no room for {need} more job{'s' if need > 1 else ''}{waits}: {len(self.outstanding)} outstanding of "
            f"max_outstanding={self.bound}{', and the queue has a bound of its own' if by_queue else ''}; "
            "nothing was accepted. Slow down, or raise the bound"
        )

    def wake_blocked(self) -> None:
        """Under the lock: wake the first blocked submitters that have room. They keep their turn until they took it."""
        if not self.blocked:
            return
        free = self.bound - len(self.outstanding)
        for need, token in list(self.blocked):
            if need <= free:
                free -= need
                token.put()

    # Wake-ups. Under the lock.

    def ring_worker(self) -> None:
        if self.wake_at != NEVER:
            self.bell.put()
            self.wake_at = NEVER
            self.wake_before = -NEVER

    def ring_supervisor(self, deadline: float = -NEVER) -> None:
        if deadline < self.next_check:
            self.alarm.put()
            self.next_check = deadline

    # Ends. The verdict is written here and nowhere else.

    def end(self, job: Job, verdict: Verdict) -> bool:
        """Under the lock: give *job* its one outcome; False if it has one."""
        if job.verdict is not None:
            return False
        status, counters = verdict[0], self.counters
        # Uninterrupted from here: verdict, count and slot change together.
        job.verdict = verdict
        counters.completed += status is COMPLETED
        counters.failed += status is FAILED
        counters.cancelled += status is CANCELLED
        counters.unknown += status is UNKNOWN
        del self.outstanding[job.sequence]
        job_id = job.future._job_id
        if job_id is not None:
            self.registry.finish(job_id, job.future, self.clock())
        return True

    def complete_all(self, jobs: list[Job], verdicts: list[Any]) -> int:
        """Under the lock: `end` for a batch that completed as a whole; how many jobs had an outcome already."""
        counters, outstanding, now = self.counters, self.outstanding, self.clock()
        late = 0
        for job, verdict in zip(jobs, verdicts, strict=True):
            if job.verdict is None:
                # Uninterrupted, as in `end`.
                job.verdict = verdict
                counters.completed += 1
                del outstanding[job.sequence]
                if job.future._job_id is not None:
                    self.registry.finish(job.future._job_id, job.future, now)
            else:
                late += 1
        return late

    def after_ends(self) -> None:
        """Under the lock, after one or more `end`: let those go on who waited for it."""
        self.wake_blocked()
        if self.closed and not self.outstanding:
            self.ring_worker()
            self.ring_supervisor()

    def cancel(self, future: JobFuture[Any], sequence: int) -> bool:
        """End a job that no worker has, for its future's `cancel`; False if it is too late."""
        self.check_process()
        ticket = object()
        try:
            return self._cancel(future, sequence, ticket)
        finally:
            self.cancelling.pop(ticket, None)

    def _cancel(self, future: JobFuture[Any], sequence: int, ticket: object) -> bool:
        job: Job | None = None
        try:
            with self.lock:
                job = self._job_of(future, sequence)
                if job is None or job.place != QUEUED or job.attempts:
                    return False
                self.cancelling[ticket] = threading.get_ident()
                self.end(job, CANCELLED_VERDICT)
                job.future._mark_cancelled()
                self._buried()
                self.after_ends()
            conclude(job)
            job.future._run_callbacks()
        except BaseException:
            # Whoever waits for the job must not suffer from a Ctrl-C in here: the supervisor does the rest.
            if job is not None and job.verdict is CANCELLED_VERDICT:
                self.owe(job)
            raise
        self._tell_cancelled(job)
        job.payload = None
        return True

    def forget_own_cancels(self) -> None:
        """Before a wait for the last event inside a `cancel` of this thread, which would wait for itself."""
        ident = threading.get_ident()
        for ticket, thread in list(self.cancelling.items()):
            if thread == ident:
                self.cancelling.pop(ticket, None)

    def owe(self, job: Job) -> None:
        """Leave the rest of an end to the supervisor."""
        with self.lock:
            self.owed[job] = False
            self.ring_supervisor()

    def _tell_cancelled(self, job: Job) -> None:
        if self.listeners.want(JobCancelled):
            age = self.clock() - job.submitted
            self.listeners.tell(JobCancelled(job.payload, job.future._job_id, age))

    def _buried(self) -> None:
        """Under the lock: one more dead job lies in the queue; the supervisor sweeps when they outnumber the living."""
        self.intake.dead += 1
        if self.intake.dead > 100 and self.intake.dead > len(self.outstanding):
            self.ring_supervisor()

    def overdue(self, jobs: list[Job], now: float) -> None:
        """Under the lock: end those of *jobs* whose deadline has passed."""
        ended = [job for job in jobs if job.deadline <= now and job.verdict is None]
        # Owed first: an interruption must not leave a job with a verdict that nobody concludes.
        self.owed.update(dict.fromkeys(ended, False))
        for job in ended:
            self.end(job, _failure(self._deadline_error(job)))
            if job.place == QUEUED:
                self._buried()
        if ended:
            self.after_ends()

    def _deadline_error(self, job: Job) -> BaseException:
        age = job.deadline - job.submitted
        if job.place == HANDED_OVER:
            return OutcomeUnknown(
                f"the processor still held the job at its deadline, {age:g} s after submit",
                batch_id=self.batch_of(job),
            )
        if job.undecided is not None:
            return _caused(
                OutcomeUnknown(
                    f"the fate of the job's batch was still undecided at its deadline, {age:g} s after submit",
                    batch_id=getattr(job.undecided, "batch_id", None),
                ),
                job.error,
            )
        tries = f"failed {job.attempts} times" if job.attempts else "was not handed to the processor"
        return _caused(DeliveryTimeout(f"the job {tries} within {age:g} s; it left no trace"), job.error)

    def abandon_all(self) -> None:
        """Under the lock, past the deadline of `shutdown`: end everything that is left, and keep it for the report."""
        for job in list(self.outstanding.values()):
            self.undelivered.append(job.payload)
            self.owed[job] = False
            if job.place == HANDED_OVER or job.undecided is not None:
                error: BaseException = OutcomeUnknown(
                    "the batcher's shutdown timed out while the processor held the job",
                    batch_id=self.batch_of(job),
                )
            else:
                error = BatcherClosed("the batcher's shutdown timed out before the job was processed; it left no trace")
            self.end(job, _failure(_caused(error, job.error)))
        self.after_ends()

    def cancel_all(self) -> None:
        """For `shutdown(cancel_futures=True)`: end what no worker has. Callbacks may block, and so run elsewhere."""
        with self.lock:
            for job in list(self.outstanding.values()):
                if job.place not in (WAITING, QUEUED):
                    continue
                self.owed[job] = False
                if not job.attempts:
                    self.end(job, CANCELLED_VERDICT)
                    job.future._mark_cancelled()
                    self._buried()
                    continue
                if job.undecided is not None:
                    error: BaseException = OutcomeUnknown(
                        "the batcher was shut down before the fate of the job's batch was known",
                        batch_id=self.batch_of(job),
                    )
                else:
                    error = BatcherClosed("the batcher was shut down before another attempt; the job left no trace")
                self.end(job, _failure(_caused(error, job.error)))
            self.after_ends()
            self.ring_supervisor()

    def batch_of(self, job: Job) -> str | None:
        """The id of the batch that holds *job*, for its error."""
        if isinstance(job.undecided, Undecided):
            return job.undecided.batch_id
        for worker in list(self.workers):
            if job in worker.jobs:
                return worker.batch and worker.batch.id  # type: ignore[no-any-return]
        return None

    def settle_owed(self) -> bool:
        """On the supervisor: conclude the futures it ended; False if one must be tried again."""
        with self.lock:
            owed = self._unconcluded()
        settled = True
        for job in owed:
            if conclude(job, blocking=False) is None:
                settled = False
            else:
                self.owed[job] = True
        self._tell_apart()
        return settled

    def _unconcluded(self) -> list[Job]:
        owed = []
        for job, concluded in list(self.owed.items()):
            if job.verdict is None:
                del self.owed[job]  # interrupted before its end
            elif not concluded:
                owed.append(job)
        return owed

    def _tell_apart(self) -> None:
        """Have callbacks and listeners of jobs that no worker ended run on a thread of their own: they may block."""
        heard = self.listeners.want(JobFailed, JobCancelled)
        loud = False
        for job, concluded in list(self.owed.items()):
            if concluded and not heard and not job.future._done_callbacks:
                job.payload = None
                self.owed.pop(job, None)
            elif concluded:
                loud = True
        if loud and (self.teller is None):
            try:
                if self.inline:
                    raise RuntimeError
                threading.Thread(target=self._tell_owed, name=f"{self.options.name}-callbacks", daemon=True).start()
            except RuntimeError:
                # No more threads: late callbacks are better than none.
                self._tell_owed()

    def _tell_owed(self) -> None:
        """That thread's function; a second one leaves at once."""
        ident = threading.get_ident()
        with self.lock:
            if self.teller is not None:
                return
            self.teller = threading.current_thread()
            borrowed = ident in self.own
            self.own.add(ident)
        try:
            self._tell_all_owed()
        finally:
            if not borrowed:
                self.own.discard(ident)
            with self.lock:
                if self.teller is threading.current_thread():
                    self.teller = None
                self.ring_supervisor()

    def _tell_all_owed(self) -> None:
        while untold := self._untold():
            for job in untold:
                run_callbacks(job.future)
                if job not in self.owed:
                    return  # a child forked inside a callback: what is left is its parent's
                self._tell_end(job)
                job.payload = None
                self.owed.pop(job, None)

    def _untold(self) -> list[Job]:
        with self.lock:
            untold = _concluded(list(self.owed.items()))
            if not untold:
                self.teller = None  # under the lock, so that what comes now gets a new one
            return untold

    def _tell_end(self, job: Job) -> None:
        if job.verdict is not CANCELLED_VERDICT:
            self.tell_failed(job)
            return
        try:
            self._tell_cancelled(job)
        except KeyboardInterrupt:
            _log.exception("a listener failed on JobCancelled")

    def tell_failed(
        self, job: Job, batch_id: str | None = None, began: float | None = None, ended: float | None = None
    ) -> None:
        error = job.verdict[2] if job.verdict is not None else None
        if error is None or not self.listeners.want(JobFailed):
            return
        batch_id = getattr(error, "batch_id", None) or batch_id
        age = (self.clock() if ended is None else ended) - job.submitted
        waited = None if began is None else began - job.submitted
        job_id = job.future._job_id
        tell_contained(self.listeners, JobFailed(job.payload, job_id, job.attempts, batch_id, error, age, waited))

    # Questions.

    def find(self, job_id: str) -> JobFuture[Any]:
        if not isinstance(job_id, str):
            raise TypeError(f"job_id must be a string, not {job_id!r}")
        self.check_process()
        with self.lock:
            future = self.registry.find(job_id, self.clock())
        if future is None:
            raise JobNotFound(f"no job {job_id!r} is outstanding or in the history of this process")
        return future

    def remember(self, future: JobFuture[Any], sequence: int) -> None:
        self.check_process()
        with self.lock:
            job_id = future._job_id
            assert job_id is not None
            if self._job_of(future, sequence) is not None:
                self.registry.live[job_id] = future
            else:
                self.registry.finish(job_id, future, self.clock())

    def _job_of(self, future: JobFuture[Any], sequence: int) -> Job | None:
        """Under the lock: the outstanding job of *future*. After a fork its number may be another job's."""
        job = self.outstanding.get(sequence)
        return job if job is not None and job.future is future else None

    def before_wait(self, unbounded: bool) -> None:
        self.check_process()
        if unbounded and self.on_own_thread():
            raise RuntimeError(
                "result() of an unfinished job on a thread of its own batcher would wait for itself; "
                "pass a timeout, or use add_done_callback"
            )

    def on_own_thread(self) -> bool:
        return threading.get_ident() in self.own

    def unresolved(self) -> list[JobFuture[Any]]:
        """Under the lock: the futures of everything accepted that are not concluded."""
        jobs = [*list(self.outstanding.values()), *self.owed]
        for worker in list(self.workers):
            jobs += worker.jobs
        return [job.future for job in jobs]

    def stats(self) -> Stats:
        self.check_process()
        with self.lock:
            now = self.clock()
            jobs = list(self.outstanding.values())
            c = self.counters
            return Stats(
                submitted=c.ended() + len(jobs),
                completed=c.completed,
                failed=c.failed,
                cancelled=c.cancelled,
                unknown=c.unknown,
                rejected=c.rejected(),
                retries=c.retries,
                isolated=c.isolated,
                late_results=c.late_results,
                outstanding=len(jobs),
                queued=sum(job.place == QUEUED for job in jobs),
                oldest_age=max((now - job.submitted for job in jobs), default=0.0),
                batches=c.batches,
                batch_jobs=c.batch_jobs,
                triggers=dict(c.triggers),
                consecutive_failures=c.consecutive_failures,
                last_success=None if c.last_success is None else now - c.last_success,
                queue_wait_seconds=c.queue_wait_seconds,
                process_seconds=c.process_seconds,
                rejections=dict(c.rejections),
                blocked_submits=c.blocked_submits,
                blocked_seconds=c.blocked_seconds,
            )

    # Closing.

    def close(self, abandon_at: float = NEVER) -> None:
        """Stop acceptance and wake everybody; safe in a finaliser."""
        self.check_process()
        with self.lock:
            self.closed = True
            if abandon_at < self.abandon_at:
                self.abandon_at = abandon_at
            self.ring_worker()
            self.ring_supervisor()
            self._unblock_all()

    def _unblock_all(self) -> None:
        while self.blocked:
            self.blocked.popleft()[1].put()

    def flush_open_batch(self) -> list[JobFuture[Any]]:
        with self.lock:
            self.flushed = next(self.sequence)
            self.ring_worker()
            return self.unresolved()

    # Process life.

    def check_process(self) -> None:
        """Notice a fork that ran no hooks (uWSGI runs none)."""
        if not self.here[0]:
            with _fork_lock:
                if not self.here[0]:
                    self.forget_parent()

    def forget_parent(self) -> None:
        """In a forked child: start empty. The parent's jobs stay the parent's, its threads do not exist here."""
        jobs = [*self.outstanding.values(), *self.owed]
        for worker in self.workers:
            jobs += worker.jobs
        renew_lock()
        for job in jobs:
            if not job.future.done():
                error = ForkedError("this future was inherited through fork(); the parent process owns its job")
                job.verdict = (UNKNOWN, None, error)
                job.future._orphan(error)
            elif job.future._done_callbacks:
                # In place: this thread may be in the middle of them, if one of them forked.
                job.future._done_callbacks.clear()
        finished = self.finished
        self._reset()
        self.finishing = self.finished = finished

    def start_threads(self) -> None:
        """Called before acceptance and outside every lock: a thread that cannot start means not accepted."""
        self._start(self)

    def threads_ready(self) -> None:
        """Under the lock, by a thread that has claimed its place."""
        full = len(self.workers) >= self.options.max_concurrent_batches
        self.ready = full and self.supervised()

    def unclosed(self) -> bool:
        """Under the lock: the worker that had the processor to close died, and another one is to do it."""
        return self.touched and self.processor.close is not None and not self.workers

    def supervised(self) -> bool:
        return self.supervisor is not None and not self.supervisor.gone

    def replace_dead(self) -> None:
        """By a thread of this batcher, outside every lock, when `short` says that another one died."""
        self.short = False
        if not self.finished:
            try:
                self.start_threads()
            except RuntimeError:
                _log.exception("no thread can be started in the place of a dead one; jobs end at their deadlines")


class DeathWatch:
    """Lies among a thread's arguments, so that the others learn of its end, however it ends.

    The thread reports last thing. Where even that is interrupted the watch reports when it is dropped, which may
    be late: an exception that somebody keeps holds the thread's frames. `Thread.is_alive` is no help: it is true for
    a moment longer, and before 3.13 an interruption in it makes a living thread look dead for ever.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.holder: Any = None  # the worker or the supervisor
        self.left = False  # of its own accord

    def report(self) -> None:
        core = self.core
        if self.holder is not None:
            self.holder.gone = True
        if not self.left:
            self.left = True
            core.short = True
            core.ready = False
            for token in (core.alarm, core.bell, *core.closers):
                token.put()

    __del__ = report


def _concluded(owed: list[tuple[Job, bool]]) -> list[Job]:
    return [job for job, concluded in owed if concluded]


def _failure(error: BaseException) -> Verdict:
    return (status_of(error), None, error)


def _caused(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error


def conclude(job: Job, blocking: bool = True) -> bool | None:
    """Let the future say what the verdict says; None if it must be tried again. Not under the lock."""
    assert job.verdict is not None
    status, result, error = job.verdict
    if status is CANCELLED:
        # The hand-shake that `concurrent.futures.wait` counts on: cancelled *and notified*.
        return job.future._conclude(CANCELLED_AND_NOTIFIED, None, None, blocking)
    return job.future._conclude(FINISHED, result, error, blocking)


def run_callbacks(future: JobFuture[Any]) -> None:
    """On the batcher's own threads nothing passes, a KeyboardInterrupt neither."""
    try:
        future._run_callbacks()
    except KeyboardInterrupt:
        _log.exception("exception calling a callback for %r", future)


def tell_contained(listeners: Listeners, event: Any) -> None:
    """As `run_callbacks`, for listeners."""
    try:
        listeners.tell(event)
    except KeyboardInterrupt:
        _log.exception("a listener failed on %s", type(event).__name__)


_fork_lock = threading.RLock()


def _after_fork_in_child() -> None:
    global _fork_lock
    _fork_lock = threading.RLock()
    for core in list(cores):
        try:
            core.forget_parent()
        except Exception:
            # A queue factory failed; `check_process` tries again at the next use.
            _log.exception("%s cannot be used in this forked process yet", core.options.name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
