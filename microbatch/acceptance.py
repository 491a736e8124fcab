"""Acceptance, on the submitting thread: a job is accepted under the lock, or not at all.

A caller who finds the batcher full waits for its turn on a token of its own, until there is room, or its time is up.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from .collector import NEVER
from .core import Core
from .errors import BatcherClosed, QueueFull, ThreadsUnavailable
from .interpreter import Token
from .job import Job, JobFuture


def admit(core: Core, job: Job, submit_timeout: float, job_id: str | None) -> JobFuture[Any]:
    """Accept *job*, waiting for a place if need be; a taken *job_id* gives the future it has."""
    with core.lock:
        if core.closed:
            raise refuse_closed(core, 1)
        if job_id is not None:
            taken = core.registry.taken(job_id, job.submitted)
            if taken is not None:
                return taken
        if len(core.outstanding) < core.bound:
            sequence = next(core.sequence)
            future: JobFuture[Any] = job.future
            job.sequence = future._sequence = sequence
            # Wake-ups first, acceptance last: an interrupt in between leaves somebody awake for nothing,
            # the other way round an accepted job would sleep.
            if job.deadline < core.next_check:
                core.alarm.put()
                core.next_check = job.deadline
            if sequence >= core.wake_at or job.deadline < core.wake_before:
                core.bell.put()
                core.wake_at = NEVER
                core.wake_before = -NEVER
            if core.pinned is None:
                core.pin()
            try:
                core.put(job)
            except queue.Full:
                pass
            else:
                # A signal handler may have closed the batcher inside `put`.
                if not core.closed:
                    # THE acceptance: what is queued and not outstanding is skipped.
                    core.outstanding[sequence] = job
                    if core.pinned is None:
                        core.pin()  # inside `put` something else may have been the last
                    if job_id is not None:
                        core.registry.live[job_id] = future
                    return future
                raise refuse_closed(core, 1)
    if not _wait_for_places(core, 1, submit_timeout, lambda: _accept_all(core, [job], job_id)):
        return admit(core, job, 0.0, job_id)
    return job.future


def admit_all(core: Core, jobs: list[Job], submit_timeout: float) -> None:
    """Accept all *jobs* or none. `ValueError` if they are more than could ever be."""
    if len(jobs) > core.bound:
        with core.lock:
            core.counters.rejections["too_many"] += len(jobs)
        raise ValueError(
            f"{len(jobs)} jobs can never fit at once into max_outstanding={core.bound}: "
            "use map(), which takes any number, or raise max_outstanding"
        )
    _wait_for_places(core, len(jobs), submit_timeout, lambda: _accept_all(core, jobs, None))


def _accept_all(core: Core, jobs: list[Job], job_id: str | None) -> bool | None:
    """Under the lock. True when accepted, None when *job_id* was taken meanwhile, False when there is no room."""
    if job_id is not None and core.registry.taken(job_id, core.clock()) is not None:
        return None
    if len(core.outstanding) + len(jobs) > core.bound or not core.intake.store.fits(len(jobs)):
        return False
    accepted = {}
    core.pin()
    try:
        for job in jobs:
            job.sequence = job.future._sequence = next(core.sequence)
            core.ring_supervisor(job.deadline)
            core.ring_worker()
            core.put(job)
            accepted[job.sequence] = job
    except queue.Full:
        # Those that went in lie there without being outstanding, and may be put again.
        core.intake.doubles = True
        return False
    if core.closed:
        raise refuse_closed(core, len(jobs))
    core.outstanding.update(accepted)
    if job_id is not None:
        core.registry.live[job_id] = jobs[0].future
    return True


def _wait_for_places(core: Core, need: int, timeout: float, accept: Callable[[], bool | None]) -> bool:
    """Try *accept* until it says something, waiting for places in between; False if it said None."""
    began = core.clock()
    give_up = began + timeout
    token = Token()
    waiter = (need, token)
    hopeless = core.must_not_wait() or core.on_own_thread()
    may_wait = timeout > 0 and core.options.when_full == "block" and not hopeless
    in_line = False
    try:
        while True:
            here = core.here
            with core.lock:
                if core.closed:
                    raise refuse_closed(core, need)
                accepted = accept()
                if accepted is not False:
                    # Not left to `finally`: an interruption there would leave a place kept for nobody.
                    _unblock(core, waiter)
                    return accepted is not None
                left = give_up - core.clock()
                if not may_wait or left <= 0:
                    raise _refuse_full(core, need, timeout if may_wait else 0.0)
                if not in_line:
                    core.blocked.append(waiter)
                    in_line = True
                    core.counters.blocked_submits += 1
                if core.intake.dead and len(core.outstanding) + need <= core.bound:
                    # The queue's own bound: the dead in it give up their places only when they are swept.
                    core.ring_supervisor()
            # In a child that a signal handler forked in between there is room, and nobody who would say so.
            if core.here is here:
                token.take(left)
    finally:
        # A wake-up that this thread cannot use any more is passed on.
        with core.lock:
            _unblock(core, waiter)
            core.wake_blocked()
            if in_line:
                now = core.clock()
                core.counters.blocked_seconds += now - began


def _unblock(core: Core, waiter: tuple[int, Token]) -> None:
    try:
        core.blocked.remove(waiter)
    except ValueError:
        pass


def refuse_without_threads(core: Core, need: int) -> ThreadsUnavailable:
    """Count *need* jobs that nobody could process; the error for them."""
    with core.lock:
        core.counters.rejections["threads"] += need
    return ThreadsUnavailable("no thread can be started: the job was not accepted")


def refuse_closed(core: Core, need: int) -> BatcherClosed:
    """Count *need* jobs that come too late; the error for them."""
    with core.lock:
        core.counters.rejections["closed"] += need
    return BatcherClosed("the batcher is shut down: the job was not accepted")


def _refuse_full(core: Core, need: int, waited: float) -> QueueFull:
    """Under the lock: the same for *need* jobs without a place."""
    waits = f" for {waited:g} s" if waited else ""
    by_queue = len(core.outstanding) + need <= core.bound
    core.counters.rejections["queue" if by_queue else "full"] += need
    return QueueFull(
        f"no room for {need} more job{'s' if need > 1 else ''}{waits}: {len(core.outstanding)} outstanding of "
        f"max_outstanding={core.bound}{', and the queue has a bound of its own' if by_queue else ''}; "
        "nothing was accepted. Slow down, or raise the bound"
    )
