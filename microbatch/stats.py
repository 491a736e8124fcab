"""Counters, and the snapshots that users see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .job import QUEUED, Job

TRIGGERS = ("size", "idle", "linger", "flush", "retry", "shutdown")
REASONS = ("full", "queue", "too_many", "threads", "closed")


@dataclass(frozen=True, slots=True)
class Stats:
    """A consistent snapshot. Counts are since construction (in a forked child: since the fork); times are seconds.

    Attributes:
        submitted: jobs accepted; always the sum of completed, failed, cancelled, unknown and outstanding.
        rejected: jobs that an open batcher refused; `rejections` says why.
        retries: attempts after the first.
        isolated: jobs that failed alone, by the processor's word, in a batch that went on.
        late_results: results that came after their job had an outcome, and were dropped.
        outstanding: accepted jobs without an outcome: queued, running or waiting for a retry.
        queued: those of them that no worker has taken.
        oldest_age: age of the oldest outstanding job, 0.0 when there is none.
        batches: batches handed to the processor; `batch_jobs` / `batches` is the mean size.
        triggers: batches by the reason why they closed.
        consecutive_failures: batches that failed since the last one that did not.
        last_success: seconds since the last batch that did not fail, None before the first.
        queue_wait_seconds: sum over jobs of the time from submit to the first hand-over.
        process_seconds: sum over batches of the time inside the processor.
        rejections: jobs refused, by reason: `full` (`max_outstanding`), `queue` (its own bound), `too_many` (for one
            `submit_many`), `threads` (`ThreadsUnavailable`), `closed` (`BatcherClosed`, which `rejected` leaves out).
        blocked_submits: calls of `submit` and its kin that had to wait for a place.
        blocked_seconds: sum over those of their wait, once it is over.
    """

    submitted: int
    completed: int
    failed: int
    cancelled: int
    unknown: int
    rejected: int
    retries: int
    isolated: int
    late_results: int
    outstanding: int
    queued: int
    oldest_age: float
    batches: int
    batch_jobs: int
    triggers: Mapping[str, int]
    consecutive_failures: int
    last_success: float | None
    queue_wait_seconds: float
    process_seconds: float
    rejections: Mapping[str, int]
    blocked_submits: int
    blocked_seconds: float


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """What became of the jobs.

    Attributes:
        completed, failed, cancelled, unknown: jobs with that outcome since construction.
        undelivered: the jobs themselves that the timeout cut off; their futures carry `BatcherClosed` (no trace) or
            `OutcomeUnknown`.
        finished: every job has its outcome and the last event is out.
    """

    completed: int
    failed: int
    cancelled: int
    unknown: int
    undelivered: tuple[Any, ...]
    finished: bool


class Counters:
    """The running numbers, changed under the batcher's lock only.

    `counters.x += 1` makes no call, so neither a signal handler nor a finaliser can run in its middle.
    """

    __slots__ = (
        "batch_jobs",
        "batches",
        "blocked_seconds",
        "blocked_submits",
        "cancelled",
        "completed",
        "consecutive_failures",
        "failed",
        "isolated",
        "last_success",
        "late_results",
        "process_seconds",
        "queue_wait_seconds",
        "rejections",
        "retries",
        "triggers",
        "unknown",
    )

    def __init__(self) -> None:
        self.completed = self.failed = self.cancelled = self.unknown = 0
        self.retries = self.isolated = self.late_results = self.blocked_submits = 0
        self.batches = self.batch_jobs = self.consecutive_failures = 0
        self.queue_wait_seconds = self.process_seconds = self.blocked_seconds = 0.0
        self.last_success: float | None = None
        self.triggers = dict.fromkeys(TRIGGERS, 0)
        self.rejections = dict.fromkeys(REASONS, 0)

    def ended(self) -> int:
        """Jobs that have an outcome."""
        return self.completed + self.failed + self.cancelled + self.unknown

    def rejected(self) -> int:
        """Jobs that were refused by an open batcher."""
        return sum(self.rejections.values()) - self.rejections["closed"]


def snapshot(c: Counters, jobs: Sequence[Job], now: float) -> Stats:
    """What *c* says at the instant *now*, with the outstanding *jobs*."""
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
