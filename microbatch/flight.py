"""The batch that a worker has in flight, from its taking to its last event: how it is settled, and what becomes of its
jobs when an exception from outside hits the worker in between.

The numbers are those of the invariants in `worker`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import job as job_module
from .collector import Undecided
from .core import Core
from .errors import WorkerDied
from .events import BatchCompleted, BatchFailed, Event, JobCompleted, JobRetrying
from .foreign import is_unknown, type_name
from .job import HANDED_OVER, QUEUED, TAKEN, UNKNOWN, WAITING, Job
from .judge import Again, Answer, Outcome, Retried
from .logs import Log
from .outage import is_away, reason
from .protocols import Batch
from .telling import conclude, run_callbacks, tell_contained, tell_failed

_log = Log("microbatch.worker")


class Flight:
    """One batch at a time. `jobs`, `batch` and `processing` are read by other threads, under the lock."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.jobs: list[Job] = []
        self.batch: Batch[Any] | None = None
        self.answers: list[Answer] = []  # of the batch that is settled: the ends that are this worker's to tell
        self.processing = False
        self.abandoned = False

    def stuck(self) -> bool:
        """Whether the processor still runs although every job it holds has its outcome."""
        return self.processing and all(job.verdict is not None for job in self.jobs)

    def settle(self, outcome: Outcome) -> None:
        """Verdicts under the lock, then futures, callbacks and events outside it."""
        core, batch, jobs = self.core, self.batch, self.jobs
        if batch is None:
            return
        self.answers = outcome.answers
        retried = self._decide(batch, outcome)
        left = job_module.complete(jobs)
        for job in left:
            conclude(job)
        self._count_unheard(left, outcome)
        callers = sum(job.future._bell is not None and job.future._waiters is None for job in left)
        # After the futures, for a handler may block.
        self._report(batch, outcome, retried)
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
            self.answers = []  # errors hold frames, and these the processor
            core.rest()
        for job, answer in zip(jobs, outcome.answers, strict=True):
            # The payload of a job that somebody else ended is theirs: they may not have told its event yet.
            if job.verdict is answer:
                job.payload = None

    def _report(self, batch: Batch[Any], outcome: Outcome, retried: list[Retried]) -> None:
        """What an operator should know: never a line per job, and one each for the begin and the end of an outage."""
        if outcome.back_after is not None:
            line = "the processor answers again, after %.1f s; %d jobs waited"
            _log.warning(line, outcome.back_after, outcome.waited)
        if outcome.away and outcome.error is not None:
            line = "the processor does not answer (%s); jobs are tried again until their deadlines"
            _log.warning(line, reason(self.core.processor, outcome.error))
        if retried:
            cause = "single jobs failed" if outcome.error is None else type_name(outcome.error)
            line = "batch %s: %s; %d jobs are tried again in %.2f s"
            _log.info(line, batch.id, cause, len(retried), retried[0][2])
        elif outcome.error is not None and not self._comes_back(outcome):
            self._report_failure(batch, outcome.error)
        if outcome.late:
            line = "batch %s: %d results came after their jobs had an outcome; dropped"
            _log.info(line, batch.id, outcome.late)

    def _report_failure(self, batch: Batch[Any], error: BaseException) -> None:
        if is_unknown(error):
            line = "batch %s: the outcome of its %d jobs is unknown (%s)"
            _log.error(line, batch.id, len(batch), type_name(error))
            return
        why = reason(self.core.processor, error)
        with self.core.lock:
            is_due = self.core.complaints.is_due(why, self.core.clock())
        if is_due:
            _log.error("batch %s failed: %s (said once a minute)", batch.id, why)

    def _count_unheard(self, left: list[Job], outcome: Outcome) -> None:
        """Where the holder of a future has ended it, the answer is as late as one after a deadline."""
        unheard = [job for job in left if job.verdict is not None and not job.future._says(job.verdict)]
        if unheard:
            own = {id(answer) for answer in outcome.answers}
            late = sum(id(job.verdict) in own for job in unheard)
            outcome.late += late
            with self.core.lock:
                self.core.counters.late_results += late

    def _decide(self, batch: Batch[Any], outcome: Outcome) -> list[Retried]:
        """Write the verdicts; return the jobs to retry, with error and delay."""
        core = self.core
        retried: list[Retried] = []
        # One delay for the whole batch: what failed together comes back together.
        error = outcome.error
        away = error is not None and self._comes_back(outcome) and is_away(core.processor, error)
        delay = core.options.retry.delay(batch.attempt) if core.options.retry is not None else 0.0
        groups = {} if outcome.error is None else self._groups(batch, outcome.answers)
        delays = {group.batch_id: self._delay(group) for group in groups.values()}
        with core.lock:
            now = outcome.ended = core.clock()
            self._count(outcome, now)
            if away:
                outcome.away = core.outage.begin(outcome.began)
            else:
                outcome.back_after, outcome.waited = core.outage.end(now), len(core.outstanding)
            if outcome.error is None and not outcome.alone:
                outcome.late = core.complete_all(self.jobs, outcome.answers)
            else:
                for job, answer in zip(self.jobs, outcome.answers, strict=True):
                    if job.verdict is not None:
                        outcome.late += 1
                    elif isinstance(answer, Again):
                        group = groups.get(answer.batch_id)
                        wait = delay if group is None else delays[group.batch_id]
                        self._postpone(job, answer, now + wait, group)
                        retried.append((job, answer.error, wait))
                    else:
                        core.end(job, answer)
            if retried and groups:
                self._await(groups)
            core.counters.late_results += outcome.late
            core.counters.retries += len(retried)
            if retried:
                core.ring_worker()
            outcome.backlog = len(core.outstanding) - len(core.intake.heap)
            core.after_ends()
        return retried

    @staticmethod
    def _comes_back(outcome: Outcome) -> bool:
        return any(isinstance(answer, Again) for answer in outcome.answers)

    def _groups(self, batch: Batch[Any], answers: Sequence[Answer]) -> dict[str | None, Undecided]:
        """The batches that come back, by id; what is retried job by job is in none."""
        before = self.jobs[0].undecided
        members: dict[str, list[int]] = {}
        for i, answer in enumerate(answers):
            if isinstance(answer, Again) and answer.batch_id is not None:
                members.setdefault(answer.batch_id, []).append(i)
        groups: dict[str | None, Undecided] = {}
        for batch_id, positions in members.items():
            again = answers[positions[0]]
            assert isinstance(again, Again)
            is_same = isinstance(before, Undecided) and before.batch_id == batch_id
            since = before.since if is_same else batch.attempt if batch_id != batch.id else 0  # type: ignore[attr-defined]
            jobs, payloads = [self.jobs[i] for i in positions], tuple([batch[i] for i in positions])
            groups[batch_id] = Undecided(jobs, payloads, batch_id, batch.attempt, not again.undecided, since)
        return groups

    def _delay(self, group: Undecided) -> float:
        """A batch that was split off waits as one that failed for the first time."""
        retry = self.core.options.retry
        return 0.0 if retry is None else retry.delay(max(1, group.attempt - group.since))

    def _await(self, groups: Mapping[str | None, Undecided]) -> None:
        """Under the lock. Not one whose jobs all have an outcome, which was never postponed."""
        for group in groups.values():
            waiting = [job for job in group.jobs if job.undecided is group]
            if waiting:
                self.core.intake.wait_until(waiting[0].due, group)

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
                facts = (job.payload, job.future._job_id, job.attempts, batch.id, cause, delay)
                self._say(JobRetrying(*facts, batcher=listeners.name))
        failed = 0
        for job, answer in zip(self.jobs, outcome.answers, strict=True):
            if job.verdict is not answer:
                continue  # retried, or ended by somebody else, who tells it
            if job.verdict[2] is not None:
                failed += 1
                if self in core.workers:
                    tell_failed(listeners, job, ended, batch.id, began)
            elif listeners.want(JobCompleted):
                age, waited = ended - job.submitted, began - job.submitted
                result = job.verdict[1]
                done = (job.payload, job.future._job_id, job.attempts, batch.id, result, age, waited)
                self._say(JobCompleted(*done, batcher=listeners.name))
        held = (batch.id, len(batch), batch.attempt, batch.trigger)
        seconds = ended - began
        if outcome.error is None:
            self._say(BatchCompleted(*held, failed, seconds, batcher=listeners.name))
        else:
            self._say(BatchFailed(*held, outcome.error, seconds, batcher=listeners.name))

    def _say(self, event: Event) -> None:
        if self in self.core.workers:  # a child forked inside a callback or a listener tells nothing of this batch
            tell_contained(self.core.listeners, event)

    # Recovery, after an exception from outside hit this thread's own lines.

    def recover(self) -> None:
        swept = self.sweep()
        for job in swept:
            self._resolve(job)
        for job in swept:
            tell_failed(self.core.listeners, job, self.core.clock())
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
            if job.verdict is not None and (id(job.verdict) in own or type(job.verdict[2]) is WorkerDied)
        ]

    def _resolve(self, job: Job) -> None:
        conclude(job)
        run_callbacks(job.future)
