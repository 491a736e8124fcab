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

import logging
import threading
from dataclasses import dataclass
from typing import Any

from . import job as job_module
from .collector import NEVER, Collected, Undecided, Wait, collect_batch
from .core import Core, DeathWatch, conclude, run_callbacks, tell_contained
from .errors import OutcomeUnknown, WorkerDied
from .events import BatchCompleted, BatchFailed, BatchStarted, Event, JobCompleted, JobRetrying
from .job import HANDED_OVER, QUEUED, TAKEN, UNKNOWN, WAITING, Job
from .judge import Again, Answer, Judge
from .protocols import Batch

_log = logging.getLogger("microbatch.worker")


Retried = tuple[Job, BaseException, float]


@dataclass(slots=True)
class Outcome:
    """What became of a batch: one answer per job, when it began, its error as a whole, how many failed alone, how many
    answers came too late, when the jobs ended, how many others were queued then.
    """

    answers: list[Answer]
    began: float
    error: BaseException | None = None
    alone: int = 0
    late: int = 0
    ended: float = 0.0
    backlog: int = 0


class Worker:
    """One worker. `jobs`, `batch` and `processing` are read by other threads, under the lock."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.thread = threading.current_thread()
        self.judge = Judge(core.processor.is_retryable, core.options.retry)
        self.jobs: list[Job] = []
        self.batch: Batch[Any] | None = None
        self.answers: list[Answer] = []  # of the batch that is settled: the ends that are this worker's to tell
        self.opened = core.processor.open is None
        self.processing = False
        self.abandoned = False
        self.leaving = False
        self.gone = False

    def stuck(self) -> bool:
        """Whether the processor still runs although every job it holds has its outcome."""
        return self.processing and all(job.verdict is not None for job in self.jobs)

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
                # Before the line in the log: a handler may block, and what this thread held must not wait for it.
                self.recover()
                _log.exception("%s was interrupted; it goes on", self.thread.name)

    def turn(self, wait: bool = True) -> bool:
        """One batch from collecting to its last event; False when there is none (any more, with *wait*)."""
        with self.core.collecting:
            collected = self._collect(wait)
        if collected is None:
            return False
        outcome = self._process(collected)
        if self in self.core.workers:  # a child forked inside the processor has no part in this batch
            self._settle(outcome)
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
        if undecided is None:
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
            [job.payload for job in self.jobs] if undecided is None else undecided.payloads,
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
                self._tell_started(batch)
            if self not in self.core.workers:
                return Outcome([], began)  # a child forked inside `open` or a listener
            self.core.touched = True
            self.processing = True
            results, error = call(self.core.processor.process, batch)
            self.processing = False
            if error is None:
                answers, alone, error = self.judge.results(batch, self.jobs, results)
                return Outcome(answers, began, error, alone)
            if not isinstance(error, Exception):
                # It may come from outside, before the processor could look what became of the first attempt.
                error = self._still_undecided(collected.undecided, error)
        return Outcome(self.judge.failure(batch, self.jobs, error), began, error)

    def _tell_started(self, batch: Batch[Any]) -> None:
        origins = tuple(job.future._origin for job in self.jobs if job.future._origin is not None)
        event = BatchStarted(batch.id, len(batch), batch.attempt, batch.trigger, origins)
        tell_contained(self.core.listeners, event)

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
        if undecided is None:
            return error
        _log.warning("batch %s: %s before the processor took it up again", undecided.batch_id, type(error).__name__)
        errors = (job.error for job in self.jobs if job.verdict is None and job.error is not None)
        return next(errors, error)

    # Settling: verdicts under the lock, then futures, callbacks and events outside it.

    def _settle(self, outcome: Outcome) -> None:
        core, batch, jobs = self.core, self.batch, self.jobs
        if batch is None:
            return
        self.answers = outcome.answers
        retried = self._decide(batch, outcome)
        left = job_module.complete(jobs)
        for job in left:
            conclude(job)
        callers = sum(job.future._bell is not None and job.future._waiters is None for job in left)
        # After the futures, for a handler may block.
        _report(batch, outcome, retried)
        for job in left:
            run_callbacks(job.future)
        # A batch that the shutdown did not wait for is not told: there is nothing after the last event.
        if core.listeners.by_type and not core.finishing:
            self._tell(batch, outcome, retried)
        with core.lock:
            self.jobs = []
            self.batch = None
            if callers and core.options.max_concurrent_batches == 1:
                seconds, limit = outcome.ended - outcome.began, core.options.max_batch_size
                core.returning.expect(callers, outcome.backlog, seconds, core.clock(), max_batch_size=limit)
            core.after_ends()
        for job, answer in zip(jobs, outcome.answers, strict=True):
            # The payload of a job that somebody else ended is theirs: they may not have told its event yet.
            if job.verdict is answer:
                job.payload = None

    def _decide(self, batch: Batch[Any], outcome: Outcome) -> list[Retried]:
        """Write the verdicts; return the jobs to retry, with error and delay."""
        core = self.core
        retried: list[Retried] = []
        # One delay for the whole batch: what failed together comes back together.
        delay = core.options.retry.delay(batch.attempt) if core.options.retry is not None else 0.0
        first = outcome.answers[0] if outcome.answers else None
        together = isinstance(first, Again) and first.undecided
        undecided = Undecided(self.jobs, batch[:], batch.id, batch.attempt) if together else None
        with core.lock:
            now = outcome.ended = core.clock()
            self._count(outcome, now)
            if outcome.error is None and not outcome.alone:
                outcome.late = core.complete_all(self.jobs, outcome.answers)
            else:
                for job, answer in zip(self.jobs, outcome.answers, strict=True):
                    if job.verdict is not None:
                        outcome.late += 1
                    elif isinstance(answer, Again):
                        self._postpone(job, answer, now + delay, undecided)
                        retried.append((job, answer.error, delay))
                    else:
                        core.end(job, answer)
            if retried and undecided is not None:
                core.intake.wait_until(now + delay, undecided)
            core.counters.late_results += outcome.late
            core.counters.retries += len(retried)
            if retried:
                core.ring_worker()
            outcome.backlog = len(core.outstanding) - len(core.intake.heap)
            core.after_ends()
        return retried

    def _count(self, outcome: Outcome, now: float) -> None:
        counters = self.core.counters
        counters.process_seconds += now - outcome.began
        counters.isolated += outcome.alone
        if outcome.error is None:
            counters.consecutive_failures = 0
            counters.last_success = now
        else:
            counters.consecutive_failures += 1

    def _postpone(self, job: Job, again: Again, due: float, undecided: Undecided | None) -> None:
        job.due = due
        job.error = again.error
        # The batch before the place: if an interruption came in between, the job would be retried on its own.
        job.undecided = undecided
        job.place = WAITING
        if undecided is None:
            self.core.intake.wait_until(due, job)

    def _tell(self, batch: Batch[Any], outcome: Outcome, retried: list[Retried]) -> None:
        core, listeners, began, ended = self.core, self.core.listeners, outcome.began, outcome.ended
        if listeners.want(JobRetrying):
            for job, cause, delay in retried:
                self._say(JobRetrying(job.payload, job.future._job_id, job.attempts, batch.id, cause, delay))
        failed = 0
        for job, answer in zip(self.jobs, outcome.answers, strict=True):
            if job.verdict is not answer:
                continue  # retried, or ended by somebody else, who tells it
            if job.verdict[2] is not None:
                failed += 1
                if self in core.workers:
                    core.tell_failed(job, batch.id, began, ended)
            elif listeners.want(JobCompleted):
                age, waited = ended - job.submitted, began - job.submitted
                result = job.verdict[1]
                self._say(JobCompleted(job.payload, job.future._job_id, job.attempts, batch.id, result, age, waited))
        facts = (batch.id, len(batch), batch.attempt, batch.trigger)
        seconds = ended - began
        if outcome.error is None:
            self._say(BatchCompleted(*facts, failed, seconds))
        else:
            self._say(BatchFailed(*facts, outcome.error, seconds))

    def _say(self, event: Event) -> None:
        if self in self.core.workers:  # a child forked inside a callback or a listener tells nothing of this batch
            tell_contained(self.core.listeners, event)

    # Recovery, after an exception from outside hit this thread's own lines.

    def recover(self) -> None:
        swept = self.sweep()
        for job in swept:
            self._resolve(job)
        for job in swept:
            self.core.tell_failed(job)
        with self.core.lock:
            self.jobs = []
            self.batch = None
            self.core.after_ends()

    def sweep(self) -> list[Job]:
        """Invariant 3, for this worker's jobs; then the order is made anew. Returns the jobs that ended."""
        with self.core.lock:
            return self._sweep()

    def _sweep(self) -> list[Job]:
        core = self.core
        self.processing = False
        if self not in core.workers:
            return []
        batch_id = self.batch.id if self.batch is not None else None
        for job in self.jobs:
            if job.verdict is None and job.place == HANDED_OVER:
                error = WorkerDied("the worker was interrupted while it held the job", batch_id=batch_id)
                core.end(job, (UNKNOWN, None, error))
            elif job.verdict is None and job.place == TAKEN:
                job.place = QUEUED if job.undecided is None else WAITING
                if not job.attempts:
                    job.future._put_back()
        core.intake.rebuild(lambda: list(core.outstanding.values()))
        core.ring_worker()  # another one may be asleep, and what this one had taken is back in the queue
        core.after_ends()
        # Not what the supervisor ended meanwhile: it tells that itself, and may have done so.
        own = {id(answer) for answer in self.answers}
        return [
            job
            for job in self.jobs
            if job.verdict is not None and (id(job.verdict) in own or isinstance(job.verdict[2], WorkerDied))
        ]

    def _resolve(self, job: Job) -> None:
        conclude(job)
        run_callbacks(job.future)


def call(process: Any, batch: Batch[Any]) -> tuple[Any, BaseException | None]:
    """What *process* returned, or what it raised.

    `map` runs it inside one C call: if an exception from outside arrives between its return and ours, the
    answer is in the list already and counts. A plain call would lose it and take a done batch for a failed one.
    """
    answer: list[Any] = []
    error: BaseException | None = None
    try:
        answer.extend(map(process, (batch,)))
    except BaseException as exc:
        error = exc
    if answer:
        return answer[0], None
    if error is None:
        # `map` takes a StopIteration for its own end.
        error = RuntimeError("the processor raised StopIteration")
    return None, error


def _report(batch: Batch[Any], outcome: Outcome, retried: list[Retried]) -> None:
    """At most a line each for what an operator should know. Types only: an error's text may quote a row."""
    if retried:
        cause = "single jobs failed" if outcome.error is None else type(outcome.error).__name__
        delay = retried[0][2]
        _log.warning("batch %s: %s; %d jobs are tried again in %.2f s", batch.id, cause, len(retried), delay)
    elif isinstance(outcome.error, OutcomeUnknown):
        kind = type(outcome.error).__name__
        _log.error("batch %s: the outcome of its %d jobs is unknown (%s)", batch.id, len(batch), kind)
    if outcome.late:
        _log.warning("batch %s: %d results came after their jobs had an outcome; dropped", batch.id, outcome.late)


def work(core: Core, watch: DeathWatch) -> None:
    """The thread's function: claim a place, work, leave. A surplus thread leaves at once."""
    try:
        worker = watch.holder = Worker(core)
        if worker.claim():
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
    if last and core.touched and core.processor.close is not None:
        try:
            core.touched = False
            core.processor.close()
        except BaseException:
            _log.exception("closing the processor failed")
    with core.lock:
        if worker in core.workers:
            core.workers.remove(worker)
        core.ring_supervisor()
