"""The size-or-linger rule: which jobs form the next batch, and when it closes. No locks, no clock, no threads."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .job import QUEUED, WAITING, Job
from .queues import Store
from .returning import Returning

NEVER = float("inf")
# Jobs of refused submits that a stranger's queue may still hold.
_LEFTOVERS = 10_000


@dataclass(slots=True)
class Undecided:
    """A batch whose fate nobody knows yet: retried unchanged, alone, with its id.

    Where it *left_nothing*, that is known, and only its company is kept: the jobs that ended meanwhile stay away.
    *since* is the number of attempts that its jobs had before they were this batch.
    """

    jobs: list[Job]
    payloads: tuple[Any, ...]
    batch_id: str
    attempt: int
    left_nothing: bool = False
    since: int = 0

    def alive(self) -> bool:
        return any(job.verdict is None for job in self.jobs)

    def members(self, now: float) -> list[Job]:
        """Who comes back: everyone; where nothing was left, who may still be done and has gone nowhere else."""
        if not self.left_nothing:
            return self.jobs
        return [
            job
            for job in self.jobs
            if job.verdict is None and job.deadline > now and job.undecided is self and job.place == WAITING
        ]


def is_undecided(job: Job) -> bool:
    """Whether *job* may have been done by an attempt that is over."""
    return isinstance(job.undecided, Undecided) and not job.undecided.left_nothing


@dataclass(slots=True)
class Collected:
    """A closed batch. *undecided* is set when it is one that comes back."""

    jobs: list[Job]
    trigger: str
    undecided: Undecided | None = None


@dataclass(slots=True)
class Wait:
    """Nothing to close yet: sleep until the instant *until*, or until *jobs* more are queued."""

    until: float
    jobs: int


class Intake:
    """The jobs that no worker has: the queue, the batch being collected, and the heap of due times.

    Used under the batcher's lock. Truth is the dict of outstanding jobs; this is only their order, and can be
    rebuilt from it.
    """

    def __init__(self, store: Store, outstanding: Mapping[int, Job]) -> None:
        self.store = store
        self.outstanding = outstanding  # what is queued and not in it was never accepted, or has ended
        self.open: list[Job] = []
        self.heap: list[tuple[float, int, Job | Undecided]] = []
        self.dead = 0  # jobs that ended while they lay in the queue
        self.doubles = not store.trusted  # a job may come out of the queue twice

    def wait_until(self, due: float, item: Job | Undecided) -> None:
        """Keep a job or an undecided batch until its due time."""
        job = item if isinstance(item, Job) else item.jobs[0]
        heapq.heappush(self.heap, (due, job.sequence, item))

    def size(self) -> int:
        """How many jobs the queue says it has, as far as that can be."""
        said = self.store.size()
        return said if self.store.trusted else min(said, 2 * len(self.outstanding) + self.dead + _LEFTOVERS)

    def sweep(self) -> None:
        """Drop the dead from the queue."""
        self.dead = 0  # first: a stranger's queue that fails here is not asked again at once
        self.store.remove(lambda job: job.verdict is not None)

    def rebuild(self, outstanding: Callable[[], list[Job]]) -> None:
        """Restore the order after an interruption at an unknown point."""
        for _ in range(0, self.size(), 1000):
            self.store.take(1000)
        self.open, self.heap, self.dead = [], [], 0
        # Asked for only now: what a finaliser submits meanwhile may be listed twice, never not at all.
        self.doubles = True
        undecided: dict[int, Undecided] = {}
        for job in outstanding():
            if job.place == QUEUED:
                try:
                    self.store.put(job)
                except BaseException:
                    # Full: a job of the open batch had left the queue, and another one has its place there.
                    self.open.append(job)
            elif job.place == WAITING and isinstance(job.undecided, Undecided):
                undecided[id(job.undecided)] = job.undecided
            elif job.place == WAITING:
                self.wait_until(job.due, job)
        for batch in undecided.values():
            self.wait_until(min(job.due for job in batch.jobs if job.undecided is batch), batch)


def collect_batch(
    intake: Intake,
    now: float,
    *,
    max_batch_size: int,
    linger: float,
    closing: bool = False,
    flushed: int = 0,
    returning: Returning | None = None,
) -> Collected | Wait:
    """Close the next batch, or say how long to wait for it.

    A due retry goes first; then the queue fills the batch up. It closes when it is full, when the batcher is
    closing, when a job up to the sequence number *flushed* is in it, or when one of its jobs has lingered enough:
    at once by default, or when those who are *returning* are there.
    """
    if returning is not None and returning.until > now and not closing and not linger:
        held = _hold(intake, now, max_batch_size, flushed, returning)
        if held is not None:
            return held
    undecided = _pop_due(intake, now, max_batch_size)
    if undecided is not None:
        return Collected(undecided.members(now), "retry", undecided)
    _fill(intake, now, max_batch_size)
    due = intake.heap[0][0] if intake.heap else NEVER
    if not intake.open:
        return Wait(due, 1)
    trigger = _trigger(intake.open, now, max_batch_size, linger, closing, flushed)
    if trigger is None:
        until = min(lingers_until(job, linger) for job in intake.open)
        return Wait(min(due, until), max_batch_size - len(intake.open))
    # A stranger's queue may have given more than it was asked for.
    jobs, intake.open = intake.open[:max_batch_size], intake.open[max_batch_size:]
    return Collected(jobs, trigger)


def _hold(intake: Intake, now: float, max_batch_size: int, flushed: int, returning: Returning) -> Wait | None:
    """How long to wait for those who are *returning*; None if there is no reason to.

    Nothing is taken meanwhile, so that whoever comes goes by priority and age, as ever.
    """
    if not returning.jobs or len(intake.outstanding) >= max_batch_size:
        return None
    queued = [job for job in list(intake.outstanding.values()) if job.place == QUEUED]
    due = intake.heap[0][0] if intake.heap else NEVER
    until = min([returning.until, due, *[lingers_until(job, NEVER) for job in queued]])
    if len(queued) >= returning.jobs or until <= now or any(job.sequence <= flushed for job in queued):
        return None
    return Wait(until, returning.jobs - len(queued))


def _pop_due(intake: Intake, now: float, max_batch_size: int) -> Undecided | None:
    """Move due jobs into the open batch; an undecided batch is returned instead and goes alone."""
    while intake.heap and intake.heap[0][0] <= now and len(intake.open) < max_batch_size:
        item = intake.heap[0][2]
        if isinstance(item, Undecided):
            heapq.heappop(intake.heap)
            if item.alive() and item.members(now):
                return item
            continue
        if item.verdict is None:
            item.place = QUEUED
            intake.open.append(item)
        heapq.heappop(intake.heap)
    return None


def _fill(intake: Intake, now: float, max_batch_size: int) -> None:
    """Top the open batch up with living jobs; one past its deadline is left to the supervisor."""
    intake.open = _living(intake, intake.open, now)
    # A stranger's queue is asked for no more than it has: one that never gets empty would keep the lock.
    left = NEVER if intake.store.trusted else intake.size()
    while len(intake.open) < max_batch_size and left > 0:
        taken = intake.store.take(max_batch_size - len(intake.open))
        if not taken:
            return
        left -= len(taken)
        intake.open += _living(intake, taken, now)
        if intake.doubles:
            intake.open = list(dict.fromkeys(intake.open))


def _living(intake: Intake, jobs: list[Job], now: float) -> list[Job]:
    outstanding = intake.outstanding
    return [job for job in jobs if job.sequence in outstanding and job.place == QUEUED and job.deadline > now]


def _trigger(
    jobs: list[Job], now: float, max_batch_size: int, linger: float, closing: bool, flushed: int
) -> str | None:
    if len(jobs) >= max_batch_size:
        return "size"
    if closing:
        return "shutdown"
    if flushed and any(job.sequence <= flushed for job in jobs):
        return "flush"
    if all(job.attempts for job in jobs):
        return "retry"
    if not linger:
        return "idle"
    return "linger" if min(lingers_until(job, linger) for job in jobs) <= now else None


def lingers_until(job: Job, linger: float) -> float:
    """Half of a job's time is the processor's, however short it is."""
    return min(job.submitted + linger, (job.submitted + job.deadline) / 2)
