"""The background thread: collect, process, settle.

What holds at shutdown, and at any other end of a worker:

1. The truth is the dict of outstanding jobs and each job's verdict; a token on the bell is only a wake-up.
2. A job is in `Worker.jobs` before it leaves the queue's hands, and until its future, its callbacks and its events
   are through. Whatever hits the thread in between, the sweep finds it there.
3. Handed over and no verdict means unknown; not handed over means queued again. Nothing is handed over twice for
   this reason.
4. A worker leaves only when the batcher is closed and nothing is outstanding: retries come back to it.
5. The last one to leave closes the processor, once, and only then is gone from `Core.workers`.
6. A worker never joins or waits for a thread; `shutdown` on it only closes.
"""

from __future__ import annotations

import threading

from . import job as job_module
from .calling import call
from .collector import NEVER, Collected, Undecided, Wait, collect_batch
from .core import Core, DeathWatch
from .events import BatchStarted
from .flight import Flight
from .foreign import is_ordinary, type_name
from .job import HANDED_OVER, TAKEN
from .judge import Judge, Outcome
from .logs import Log, name_thread
from .protocols import Batch
from .telling import tell_started

_log = Log("microbatch.worker")


class Worker(Flight):
    """One worker, with the batch that it has in flight."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.thread = threading.current_thread()
        self.opened = not core.opens
        self.leaving = False
        self.gone = False

    def claim(self) -> bool:
        """Take a place among the workers; False for a surplus one, which is to leave."""
        core = self.core
        with core.lock:
            needed = core.outstanding or core.unclosed() or not core.closed
            if needed and len(core.workers) < core.options.max_concurrent_batches:
                core.workers.append(self)
                core.own.add(threading.get_ident())
                core.threads_ready()
        return self in core.workers

    def run(self) -> None:
        """Until the batcher is closed and empty. An exception ends it only if it hits the recovery as well."""
        while True:
            try:
                # A `for`: on every interpreter its jump back lies inside the `try`.
                for _ in iter(self.turn, False):
                    pass
                return
            except BaseException:
                self.core.worker_setbacks.add()
                # Before the line in the log: a handler may block, and what this thread held must not wait for it.
                self.recover()
                _log.exception("%s was interrupted; it goes on", self.thread.name)
                self.core.worker_setbacks.pause()

    def turn(self, wait: bool = True) -> bool:
        """One batch from collecting to its last event; False when there is none (any more, with *wait*)."""
        with self.core.collecting:
            collected = self._collect(wait)
        if collected is None:
            return False
        outcome = self._process(collected)
        if self in self.core.workers:  # a child forked inside the processor has no part in this batch
            self.settle(outcome)
        self.core.worker_setbacks.forget()
        return True

    # Collecting: one worker at a time, the others follow on the lock `collecting`.

    def _collect(self, wait: bool) -> Collected | None:
        core, options = self.core, self.core.options
        while True:
            with core.lock:
                if self not in core.workers:
                    return None
                # What a finaliser submits in the middle of this rings, whatever was found before.
                core.wake_at = 0
                now = core.clock()
                found = collect_batch(
                    core.intake,
                    now,
                    max_batch_size=options.max_batch_size,
                    linger=options.linger,
                    closing=core.closed,
                    flushed=core.flushed,
                    # Blocked callers come only when places are given back.
                    returning=None if core.blocked else core.returning,
                )
                core.wake_before = -NEVER
                if isinstance(found, Collected):
                    core.wake_at = NEVER
                    core.returning.came(len(found.jobs) + len(core.intake.open), now)
                    self._take(found)
                elif not wait or (core.closed and not core.outstanding):
                    core.wake_at = NEVER
                    return None
                else:
                    core.rest()
                    # The deadline of a job, submitted from now on, whose half-time is before the end of the sleep.
                    core.wake_before = 2 * found.until - now
                    core.wake_at = next(core.sequence) + found.jobs
                if core.blocked:
                    core.wake_blocked()
            if isinstance(found, Collected):
                return found
            self._sleep(found)

    def _sleep(self, wait: Wait) -> None:
        self.core.bell.take(wait.until - self.core.clock())
        if self.core.short:
            self.core.replace_dead()

    def _take(self, collected: Collected) -> None:
        """Under the lock: from here on the jobs are in flight, and no `cancel` gets them."""
        self.jobs = collected.jobs
        now = self.core.clock()
        waited = 0.0
        fresh = []
        for job in collected.jobs:
            if job.verdict is None:
                job.place = TAKEN
                if not job.attempts:
                    fresh.append(job)
                    waited += now - job.submitted
        job_module.start(fresh)
        self.core.counters.queue_wait_seconds += waited
        if self.opened:
            self._hand_over(collected, HANDED_OVER)

    def _hand_over(self, collected: Collected, place: int) -> None:
        """Under the lock: make the batch. A batch that comes back is unchanged, jobs that ended meanwhile included."""
        core, undecided = self.core, collected.undecided
        unchanged = undecided is not None and not undecided.left_nothing
        if not unchanged:
            self.jobs = collected.jobs = [job for job in collected.jobs if job.verdict is None]
            if not self.jobs:
                return
        deadline = NEVER
        attempt = 0
        for job in self.jobs:
            if job.verdict is None:
                job.place = place
                job.attempts += 1
                # Comparisons instead of min and max: this loop runs for every job.
                if job.attempts > attempt:
                    attempt = job.attempts
                if job.deadline < deadline:
                    deadline = job.deadline
        self.batch = Batch(
            undecided.payloads if undecided is not None and unchanged else [job.payload for job in self.jobs],
            id=next(core.batch_ids) if undecided is None else undecided.batch_id,
            attempt=attempt if undecided is None else undecided.attempt + 1,
            trigger=collected.trigger,
            deadline=None if deadline == NEVER else deadline,
        )
        self.abandoned = False
        counters = core.counters
        counters.batches += 1
        counters.batch_jobs += len(self.jobs)
        counters.triggers[collected.trigger] += 1

    # Processing: outside every lock.

    def _process(self, collected: Collected) -> Outcome:
        error = None if self.opened else self._open(collected)
        if error is not None:
            error = self._still_undecided(collected.undecided, error)
        batch, began = self.batch, self.core.clock()
        if batch is None:
            return Outcome([], began)
        if error is None:
            if self.core.listeners.want(BatchStarted) and not self.core.finishing:
                tell_started(self.core.listeners, batch, self.jobs)
            if self not in self.core.workers:
                return Outcome([], began)  # a child forked inside `open` or a listener
            self.core.touched = True
            self.processing = True
            results, error = call(self.core.processor.process, batch)
            self.processing = False
            if error is None:
                answers, alone, error = self._judge().results(batch, self.jobs, results)
                return Outcome(answers, began, error, alone)
            if not is_ordinary(error):
                # It may come from outside, before the processor could look what became of the first attempt.
                error = self._still_undecided(collected.undecided, error)
        return Outcome(self._judge().failure(batch, self.jobs, error), began, error)

    def _judge(self) -> Judge:
        belongings = self.core.belongings
        return Judge(belongings.processor.is_retryable, belongings.retry)

    def _open(self, collected: Collected) -> BaseException | None:
        """Open the processor for this thread; its failure is this batch's failure, the next one tries again."""
        error = None
        self.core.touched = self.processing = True
        try:
            assert self.core.processor.open is not None
            self.core.processor.open()
            self.opened = True
        except BaseException as exc:
            error = exc
        self.processing = False
        with self.core.lock:
            self._hand_over(collected, HANDED_OVER if error is None else TAKEN)
        return error

    def _still_undecided(self, undecided: Undecided | None, error: BaseException) -> BaseException:
        """If the processor has not seen this attempt of a batch that comes back, its fate is as undecided as before."""
        if undecided is None or undecided.left_nothing:
            return error
        line = "batch %s: %s before the processor took it up again"
        _log.warning(line, undecided.batch_id, type_name(error))
        errors = (job.error for job in self.jobs if job.verdict is None and job.error is not None)
        return next(errors, error)


def work(core: Core, watch: DeathWatch) -> None:
    """The thread's function: claim a place, work, leave. A surplus thread leaves at once."""
    name_thread(core.options.name)
    try:
        worker = watch.holder = Worker(core)
        if worker.claim():
            core.worker_setbacks.pause()
            worker.run()
            leave(worker)
        watch.left = True
    except BaseException:
        # The supervisor sweeps what this one held and starts another.
        _log.exception("%s died", threading.current_thread().name)
    finally:
        core.own.discard(threading.get_ident())
        watch.report()


def leave(worker: Worker) -> None:
    """Invariant 5."""
    core = worker.core
    with core.lock:
        if worker not in core.workers:
            return  # a child forked on this thread
        worker.leaving = True
        last = all(other.leaving for other in core.workers)
    if last and core.touched and core.closes:
        try:
            core.touched = False
            assert core.processor.close is not None
            core.processor.close()
        except BaseException:
            _log.of(core.options.name).exception("closing the processor failed")
    with core.lock:
        if worker in core.workers:
            core.workers.remove(worker)
        core.ring_supervisor()
