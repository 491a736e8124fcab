"""What follows a job's end, outside the lock: its future is concluded, callbacks run, listeners are told.

On the batcher's own threads nothing that a stranger raises passes, a KeyboardInterrupt neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .events import BatchStarted, JobCancelled, JobFailed, Listeners
from .foreign import batch_id_of
from .interpreter import CANCELLED_AND_NOTIFIED, FINISHED
from .job import Job, JobFuture, JobStatus
from .logs import Log
from .protocols import Batch

_log = Log("microbatch")
_CANCELLED = JobStatus.CANCELLED


def conclude(job: Job, blocking: bool = True) -> bool | None:
    """Let the future say what the verdict says; None if it must be tried again. Not under the lock."""
    assert job.verdict is not None
    status, result, error = job.verdict
    if status is _CANCELLED:
        # The hand-shake that `concurrent.futures.wait` counts on: cancelled *and notified*.
        return job.future._conclude(CANCELLED_AND_NOTIFIED, None, None, blocking)
    return job.future._conclude(FINISHED, result, error, blocking)


def run_callbacks(future: JobFuture[Any]) -> None:
    try:
        future._run_callbacks()
    except KeyboardInterrupt:
        _log.exception("exception calling a callback for %r", future)


def tell_contained(listeners: Listeners, event: Any) -> None:
    try:
        listeners.tell(event)
    except KeyboardInterrupt:
        _log.of(listeners.name).exception("a listener failed on %s", type(event).__name__)


def tell_started(listeners: Listeners, batch: Batch[Any], jobs: Sequence[Job]) -> None:
    origins = tuple(job.future._origin for job in jobs if job.future._origin is not None)
    tell_contained(
        listeners, BatchStarted(batch.id, len(batch), batch.attempt, batch.trigger, origins, batcher=listeners.name)
    )


def tell_failed(
    listeners: Listeners, job: Job, ended: float, batch_id: str | None = None, began: float | None = None
) -> None:
    """Tell of a job that failed or is unknown; *began* is when its batch did, if a batch's end ended it."""
    error = job.verdict[2] if job.verdict is not None else None
    if error is None or not listeners.want(JobFailed):
        return
    named = batch_id_of(error)
    batch_id = batch_id if named is None else named
    age = ended - job.submitted
    waited = None if began is None else began - job.submitted
    facts = (job.payload, job.future._job_id, job.attempts, batch_id, error, age, waited)
    tell_contained(listeners, JobFailed(*facts, batcher=listeners.name))


def tell_cancelled(listeners: Listeners, job: Job, now: float) -> None:
    """On the cancelling thread as well, and there a KeyboardInterrupt is the caller's."""
    if listeners.want(JobCancelled):
        age = now - job.submitted
        listeners.tell(JobCancelled(job.payload, job.future._job_id, age, batcher=listeners.name))
