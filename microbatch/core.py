"""The inner core that threads, futures and finalisers hold: the shared state, and how a job ends.

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
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .belongings import Belongings
from .calling import Processor
from .collector import NEVER, Intake
from .errors import ForkedError, JobNotFound
from .events import Listeners
from .interpreter import Token, holds_condition, let_go, process_mark, take_all
from .job import (
    COMPLETED,
    FAILED,
    QUEUED,
    UNKNOWN,
    Job,
    JobFuture,
    JobStatus,
    Verdict,
    births,
    renew_lock,
    usable,
)
from .logs import Log
from .options import Options
from .outage import Complaints, Outage
from .queues import MemoryQueue, store_factory
from .registry import Registry
from .returning import Returning
from .stats import Counters, Stats, snapshot
from .telling import conclude, tell_cancelled

_log = Log("microbatch")

CANCELLED = JobStatus.CANCELLED
CANCELLED_VERDICT: Verdict = (CANCELLED, None, None)

_FREE_SETBACKS = 3
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0  # seconds

# Locks that listeners of the library's own take on a batcher's threads, and other threads in between.
listeners_locks: list[Any] = []

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
        registry = Registry(options.history, options.history_ttl)
        belongings = Belongings(processor, Listeners(options.name), registry, options.retry, new_store)
        # Set while there is something to do with them; see `rest`.
        self.pinned: Belongings | None = belongings
        self._adopted: weakref.ref[Belongings] | None = None
        self.opens, self.closes = processor.open is not None, processor.close is not None
        self.options = options.without_strangers()
        self.clock = clock
        self.closed = False
        self.inline = False  # one thread does everything: `testing.InlineBatcher`
        # How a job gets its future, on the submitting thread. Tracing puts another one here, which keeps the origin.
        self.new_future: Callable[[Core], JobFuture[Any]] = JobFuture
        self._start = start
        self.lock = threading.RLock()
        # Never begun again: in a child an inherited future has its number, and so has a submit that goes on there.
        self.sequence = itertools.count(1)
        # By ident, of those who start threads: owned while they are at it.
        self.starting: dict[int, Any] = {}
        self._reset()
        cores.add(self)

    def _reset(self) -> None:
        options = self.options
        self.outstanding: dict[int, Job] = {}
        self.pin()
        belongings = self.pinned
        # None in a forked child whose parent holds a future of a batcher that is forgotten.
        new_store = belongings.new_store if belongings else store_factory(MemoryQueue)
        self.intake = Intake(new_store(), self.outstanding)
        # Bound here for `admit`, which runs for every job.
        self.put = self.intake.store.put
        self.bound = options.max_outstanding
        if belongings:
            belongings.registry = Registry(options.history, options.history_ttl)
        self.counters = Counters()
        self.batch_ids = map(f"{os.urandom(4).hex()}-{{}}".format, itertools.count(1))
        self.bell = Token()  # wakes the collecting worker
        self.wake_at: float = NEVER  # the sequence number that rings it; NEVER while it is awake
        self.wake_before: float = -NEVER  # ... and so does a job with an earlier deadline
        self.alarm = Token()  # wakes the supervisor
        self.next_check: float = NEVER  # when it wakes by itself
        self.blocked: deque[tuple[int, Token]] = deque()  # submitters waiting for so many places
        self.returning = Returning()
        self.outage = Outage()
        self.complaints = Complaints()
        self.collecting = threading.Lock()  # held by the one worker that collects: the others follow
        self.workers: list[Any] = []
        self.supervisor: Any = None
        self.ready = False  # every thread has claimed its place
        self.short = False  # one of them died since
        self.touched = False  # the processor was opened or called, so it is to be closed
        self.own: set[int] = set()  # idents of the threads that must not wait for themselves
        # Ended by no worker. False: the future is to be concluded; True: callbacks and events are still to come.
        # A number above that is how often those were begun.
        self.owed: dict[Job, int] = {}
        self.teller: Any = None  # the thread that runs those
        self.worker_setbacks, self.supervisor_setbacks = Setbacks(), Setbacks()
        self.flushed = 0
        self.abandon_at: float = NEVER
        self.undelivered: list[Any] = []
        # One ticket for each call of `cancel` that has events to tell, with its thread: they come before the last one.
        self.cancelling: dict[object, int] = {}
        self.finishing = self.finished = False
        self.closers: list[Token] = []
        # Last: the fork check looks at it, and everything else is in place by then.
        self.here = process_mark()

    # What the user brought.

    @property
    def belongings(self) -> Belongings:
        """Pinned while anything is outstanding; else the batcher that calls holds them."""
        belongings = self.pinned or (self._adopted and self._adopted())
        assert belongings, "a forgotten batcher is at work"
        return belongings

    @property
    def processor(self) -> Processor:
        return self.belongings.processor

    @property
    def listeners(self) -> Listeners:
        """Nobody of a batcher that is forgotten by now."""
        belongings = self.pinned or (self._adopted and self._adopted())
        return belongings.listeners if belongings else Listeners(self.options.name)

    @property
    def registry(self) -> Registry:
        return self.belongings.registry

    def adopt(self) -> Belongings:
        """For the batcher, which is to hold them: from now on the core lets go of them when it comes to rest."""
        belongings = self.belongings
        belongings.owner = self
        self._adopted = weakref.ref(belongings)
        return belongings

    def pin(self) -> None:
        """Before anything is accepted: hold what it takes to end it."""
        if self.pinned is None and self._adopted is not None:
            self.pinned = self._adopted()

    def rest(self) -> None:
        """Under the lock, when something may have been the last: let go of what nothing is left to do with."""
        if self.pinned is None or self._adopted is None or self.inline or self.outstanding or self.owed:
            return
        if not (self.closed or self.cancelling or self._in_flight()):
            # May call `forgotten`, by the finaliser.
            self.pinned = None

    def _in_flight(self) -> bool:
        return any(worker.jobs or worker.batch is not None for worker in self.workers)

    def forgotten(self, belongings: Belongings) -> None:
        """By a finaliser: have the threads end in good order."""
        if sys.is_finalizing() or self.finished or not (self.workers or self.supervisor):
            return
        with self.lock:
            self.pinned = belongings
        self.close()

    # Wake-ups. Under the lock.

    def wake_blocked(self) -> None:
        """Under the lock: wake the first blocked submitters that have room. They keep their turn until they took it."""
        if not self.blocked:
            return
        free = self.bound - len(self.outstanding)
        for need, token in list(self.blocked):
            if need <= free:
                free -= need
                token.put()

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
            if not self.outstanding:
                with self.lock:
                    self.rest()

    def _cancel(self, future: JobFuture[Any], sequence: int, ticket: object) -> bool:
        job: Job | None = None
        try:
            with self.lock:
                job = self.outstanding.get(sequence)
                if job is None or job.place != QUEUED or job.attempts:
                    return False
                self.cancelling[ticket] = threading.get_ident()
                self.end(job, CANCELLED_VERDICT)
                job.future._mark_cancelled()
                self.buried()
                self.after_ends()
            if self.must_not_wait():
                # Neither for the locks of a future, nor may callbacks run below the section that goes on later.
                self.owe(job)
                return True
            conclude(job)
            job.future._run_callbacks()
        except BaseException:
            # Whoever waits for the job must not suffer from a Ctrl-C in here: the supervisor does the rest.
            if job is not None and job.verdict is CANCELLED_VERDICT:
                self.owe(job)
            raise
        tell_cancelled(self.listeners, job, self.clock())
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

    def buried(self) -> None:
        """Under the lock: one more dead job lies in the queue; the supervisor sweeps when they outnumber the living."""
        self.intake.dead += 1
        if self.intake.dead > 100 and self.intake.dead > len(self.outstanding):
            self.ring_supervisor()

    # Questions.

    def find(self, job_id: str) -> JobFuture[Any]:
        if not isinstance(job_id, str):
            raise TypeError(f"job_id must be a string, not {job_id!r}")
        job_id = str.__str__(job_id)  # see `submit`
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
            self.pin()
            if self.pinned is None:
                return  # of a batcher that is forgotten: nobody can ask by the id
            if sequence in self.outstanding:
                self.registry.live[job_id] = future
            else:
                self.registry.finish(job_id, future, self.clock())
                self.rest()

    def before_wait(self, timeout: float | None) -> None:
        self.check_process()
        if timeout is None and self.on_own_thread():
            raise RuntimeError(
                "result() of an unfinished job on a thread of its own batcher would wait for itself; "
                "pass a timeout, or use add_done_callback"
            )
        if timeout is None or timeout > 0:
            self.refuse_below_itself("waiting for an unfinished job")

    def refuse_below_itself(self, what: str) -> None:
        """Raise where *what* can come to no end."""
        if self.must_not_wait():
            raise RuntimeError(
                f"{what} in a signal handler or finaliser that interrupted this thread in the middle of the batcher's "
                "own code would wait for itself: submit() there, and wait elsewhere"
            )

    def must_not_wait(self) -> bool:
        """Whether this thread is below a moment of its own that the batcher's threads wait for: a signal handler or a
        finaliser runs there. What it waits for could not happen before it returns.
        """
        starting = self.starting.get(threading.get_ident())
        return (
            self.lock._is_owned()  # type: ignore[attr-defined]
            or births()._is_owned()
            or (starting is not None and starting._is_owned())
            or holds_condition()
            or any(lock._is_owned() for lock in listeners_locks)
        )

    def on_own_thread(self) -> bool:
        return threading.get_ident() in self.own

    def unresolved(self) -> list[Job]:
        """Under the lock: everything accepted that is not concluded."""
        jobs = [*list(self.outstanding.values()), *self.owed]
        for worker in list(self.workers):
            jobs += worker.jobs
        return jobs

    def stats(self) -> Stats:
        self.check_process()
        with self.lock:
            now = self.clock()
            jobs = list(self.outstanding.values())
            return snapshot(self.counters, jobs, now)

    # Closing.

    def close(self, abandon_at: float = NEVER) -> None:
        """Stop acceptance and wake everybody; safe in a finaliser."""
        self.check_process()
        with self.lock:
            self.pin()
            self.closed = True
            if abandon_at < self.abandon_at:
                self.abandon_at = abandon_at
            self.ring_worker()
            self.ring_supervisor()
            self._unblock_all()

    def _unblock_all(self) -> None:
        while self.blocked:
            self.blocked.popleft()[1].put()

    def flush_open_batch(self) -> list[Job]:
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
        self.lock = usable(self.lock)
        # This thread may be one of those who wait, and have forked in a signal handler.
        for token in [*(token for _, token in self.blocked), *self.closers]:
            token.put()
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
        starting = self.starting.setdefault(threading.get_ident(), threading.RLock())
        if starting._is_owned():
            return  # by a signal handler: those that it interrupted are on their way
        here = self.here
        with starting:
            try:
                self._start(self)
            except Exception:
                if self.here is here:
                    raise
                # A signal handler forked in the middle: a thread made before that cannot be started in the child.
                self._start(self)

    def carry_on(self) -> None:
        """After an acceptance in the middle of which the process was forked: in the child there may be no thread yet,
        and the job may lie in a queue of the parent's.
        """
        with self.lock:
            if not self.outstanding:
                return
            self.intake.rebuild(lambda: list(self.outstanding.values()))
            self.ring_worker()
            self.ring_supervisor()
        self.replace_dead()

    def threads_ready(self) -> None:
        """Under the lock, by a thread that has claimed its place."""
        full = len(self.workers) >= self.options.max_concurrent_batches
        self.ready = full and self.supervised()

    def unclosed(self) -> bool:
        """Under the lock: the worker that had the processor to close died, and another one is to do it."""
        return self.touched and self.closes and not self.workers

    def supervised(self) -> bool:
        return self.supervisor is not None and not self.supervisor.gone

    def replace_dead(self) -> None:
        """By a thread of this batcher, outside every lock, when `short` says that another one died."""
        self.short = False
        if not self.finished:
            try:
                self.start_threads()
            except RuntimeError:
                _log.of(self.options.name).exception(
                    "no thread can be started in the place of a dead one; jobs end at their deadlines"
                )


class Setbacks:
    """How often in a row threads of one kind were hit before they got anything done: after a few of them they pause,
    so that what hits them every time leaves the processor to others.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1

    def pause(self) -> None:
        over = self.count - _FREE_SETBACKS
        if over > 0:
            Token().take(min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2 ** min(over, 10)))

    def forget(self) -> None:
        self.count = 0


class DeathWatch:
    """Lies among a thread's arguments, so that the others learn of its end, however it ends.

    The thread reports last thing. Where even that is interrupted the watch reports when it is dropped, which may
    be late: an exception that somebody keeps holds the thread's frames. `Thread.is_alive` is no help: it is true for
    a moment longer, and before 3.13 an interruption in it makes a living thread look dead for ever.
    """

    # Defaults of the class: whoever drops a watch whose making was interrupted asks for them, too.
    core: Core | None = None
    holder: Any = None  # the worker or the supervisor
    left = False  # of its own accord

    def __init__(self, core: Core) -> None:
        self.core = core

    def report(self) -> None:
        core = self.core
        if core is None:
            return
        if self.holder is not None:
            self.holder.gone = True
        if not self.left:
            self.left = True
            core.short = True
            core.ready = False
            for token in (core.alarm, core.bell, *core.closers):
                token.put()

    __del__ = report


_fork_lock = threading.RLock()
# What was locked for each fork that is under way: a signal handler may fork in the middle of one.
_taken: list[list[Any]] = []


def _before_fork() -> None:
    # So that no lock is another thread's in the child: the forking thread may be a signal handler below a submit that
    # is about to enter one, and goes on to enter this very one.
    _taken.append(take_all([births(), *(core.lock for core in living_cores())]))


def _after_fork_in_parent() -> None:
    if _taken:
        let_go(_taken.pop())


def _after_fork_in_child() -> None:
    try:
        _forget_parent()
    finally:
        _after_fork_in_parent()


def _forget_parent() -> None:
    global _fork_lock
    _fork_lock = threading.RLock()
    for core in list(cores):
        try:
            core.forget_parent()
        except Exception:
            # A queue factory failed; `check_process` tries again at the next use.
            _log.of(core.options.name).exception("it cannot be used in this forked process yet")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
