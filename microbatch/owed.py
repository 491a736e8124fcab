"""Ends that no worker makes: by the supervisor past a deadline, by `shutdown(cancel_futures=True)`.

Whoever ends a job here owes the rest of its end: the supervisor concludes the future, and a thread of its own runs
callbacks and tells listeners, for they may block. `Core.owed` holds such a job until all that is done, so an
interruption in between loses nothing.
"""

from __future__ import annotations

import threading

from .collector import Undecided, is_undecided
from .core import CANCELLED_VERDICT, Core
from .errors import BatcherClosed, DeliveryTimeout, OutcomeUnknown
from .events import JobCancelled, JobFailed
from .job import HANDED_OVER, QUEUED, WAITING, Job, Verdict, status_of
from .logs import Log, name_thread
from .telling import conclude, run_callbacks, tell_cancelled, tell_failed

_log = Log("microbatch")

# So often an end is told that an interruption hits in the middle.
_ATTEMPTS = 3


def overdue(core: Core, jobs: list[Job], now: float) -> None:
    """Under the lock: end those of *jobs* whose deadline has passed."""
    ended = [job for job in jobs if job.deadline <= now and job.verdict is None]
    # Owed first: an interruption must not leave a job with a verdict that nobody concludes.
    core.owed.update(dict.fromkeys(ended, False))
    for job in ended:
        core.end(job, _failure(_deadline_error(core, job)))
        if job.place == QUEUED:
            core.buried()
    if ended:
        core.after_ends()


def _deadline_error(core: Core, job: Job) -> BaseException:
    age = job.deadline - job.submitted
    if job.place == HANDED_OVER:
        return OutcomeUnknown(
            f"the processor still held the job at its deadline, {age:g} s after submit",
            batch_id=batch_of(core, job),
        )
    if is_undecided(job):
        return _caused(
            OutcomeUnknown(
                f"the fate of the job's batch was still undecided at its deadline, {age:g} s after submit",
                batch_id=getattr(job.undecided, "batch_id", None),
            ),
            job.error,
        )
    tries = f"failed {job.attempts} times" if job.attempts else "was not handed to the processor"
    return _caused(DeliveryTimeout(f"the job {tries} within {age:g} s; it left no trace"), job.error)


def abandon_all(core: Core) -> None:
    """Under the lock, past the deadline of `shutdown`: end everything that is left, and keep it for the report."""
    for job in list(core.outstanding.values()):
        core.undelivered.append(job.payload)
        core.owed[job] = False
        if job.place == HANDED_OVER or is_undecided(job):
            error: BaseException = OutcomeUnknown(
                "the batcher's shutdown timed out while the processor held the job",
                batch_id=batch_of(core, job),
            )
        else:
            error = BatcherClosed("the batcher's shutdown timed out before the job was processed; it left no trace")
        core.end(job, _failure(_caused(error, job.error)))
    core.after_ends()


def cancel_all(core: Core) -> None:
    """For `shutdown(cancel_futures=True)`: end what no worker has. Callbacks may block, and so run elsewhere."""
    with core.lock:
        for job in list(core.outstanding.values()):
            if job.place not in (WAITING, QUEUED):
                continue
            core.owed[job] = False
            if not job.attempts:
                core.end(job, CANCELLED_VERDICT)
                job.future._mark_cancelled()
                core.buried()
                continue
            if is_undecided(job):
                error: BaseException = OutcomeUnknown(
                    "the batcher was shut down before the fate of the job's batch was known",
                    batch_id=batch_of(core, job),
                )
            else:
                error = BatcherClosed("the batcher was shut down before another attempt; the job left no trace")
            core.end(job, _failure(_caused(error, job.error)))
        core.after_ends()
        core.ring_supervisor()


def batch_of(core: Core, job: Job) -> str | None:
    """The id of the batch that holds *job*, for its error."""
    if isinstance(job.undecided, Undecided):
        return job.undecided.batch_id
    for worker in list(core.workers):
        if job in worker.jobs:
            return worker.batch and worker.batch.id  # type: ignore[no-any-return]
    return None


def settle_owed(core: Core) -> bool:
    """On the supervisor: conclude the futures it ended; False if one must be tried again."""
    with core.lock:
        owed = _unconcluded(core)
    settled = True
    for job in owed:
        if conclude(job, blocking=False) is None:
            settled = False
        else:
            core.owed[job] = True
    _tell_apart(core)
    return settled


def _unconcluded(core: Core) -> list[Job]:
    owed = []
    for job, concluded in list(core.owed.items()):
        if job.verdict is None:
            del core.owed[job]  # interrupted before its end
        elif not concluded:
            owed.append(job)
    return owed


def _tell_apart(core: Core) -> None:
    """Have callbacks and listeners of jobs that no worker ended run on a thread of their own: they may block."""
    heard = core.listeners.want(JobFailed, JobCancelled)
    loud = False
    for job, concluded in list(core.owed.items()):
        if concluded and not heard and not job.future._done_callbacks:
            job.payload = None
            core.owed.pop(job, None)
        elif concluded:
            loud = True
    if loud and (core.teller is None):
        try:
            if core.inline:
                raise RuntimeError
            name = f"{core.options.name}-callbacks"
            threading.Thread(target=_tell_owed_apart, args=(core,), name=name, daemon=True).start()
        except RuntimeError:
            # No more threads: late callbacks are better than none.
            _tell_owed(core)


def _tell_owed_apart(core: Core) -> None:
    """That thread's function."""
    name_thread(core.options.name)
    _tell_owed(core)


def _tell_owed(core: Core) -> None:
    """A second one leaves at once."""
    ident = threading.get_ident()
    with core.lock:
        if core.teller is not None:
            return
        core.teller = threading.current_thread()
        borrowed = ident in core.own
        core.own.add(ident)
    try:
        _tell_all_owed(core)
    finally:
        if not borrowed:
            core.own.discard(ident)
        with core.lock:
            if core.teller is threading.current_thread():
                core.teller = None
            core.ring_supervisor()


def _tell_all_owed(core: Core) -> None:
    while untold := _untold(core):
        for job in untold:
            if not _tell_job(core, job):
                return


def _tell_job(core: Core, job: Job) -> bool:
    """Callbacks and event of *job*; False in a child forked inside of them: what is left is its parent's."""
    if job not in core.owed:
        return False
    # Counted before it is begun: one that fails every time must not keep this thread for ever.
    begun = core.owed[job] = core.owed.get(job, 1) + 1
    try:
        run_callbacks(job.future)
        if job not in core.owed:
            return False
        _tell_end(core, job)
    except BaseException:
        _log.of(core.options.name).exception(
            "telling the end of a job failed (%d of %d attempts)", begun - 1, _ATTEMPTS
        )
        if begun <= _ATTEMPTS:
            return True
    job.payload = None
    core.owed.pop(job, None)
    return True


def _untold(core: Core) -> list[Job]:
    with core.lock:
        untold = _concluded(list(core.owed.items()))
        if not untold:
            core.rest()
            core.teller = None  # under the lock, so that what comes now gets a new one
        return untold


def _tell_end(core: Core, job: Job) -> None:
    if job.verdict is not CANCELLED_VERDICT:
        tell_failed(core.listeners, job, core.clock())
        return
    try:
        tell_cancelled(core.listeners, job, core.clock())
    except KeyboardInterrupt:
        _log.of(core.options.name).exception("a listener failed on JobCancelled")


def _concluded(owed: list[tuple[Job, int]]) -> list[Job]:
    return [job for job, concluded in owed if concluded]


def _failure(error: BaseException) -> Verdict:
    return (status_of(error), None, error)


def _caused(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error
