"""The error family.

Every error here that is no `OutcomeUnknown` means that the job left no trace and may be submitted again.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence


class MicrobatchError(Exception):
    """Root of all errors that this library makes itself."""


class BatcherClosed(MicrobatchError, RuntimeError):
    """The batcher is shut down: the job was not accepted, or was accepted and never handed to the processor."""


class QueueFull(MicrobatchError, queue.Full):
    """`max_outstanding` jobs (or the queue's own `maxsize`) are reached: the job was not accepted."""


class ThreadsUnavailable(MicrobatchError, RuntimeError):
    """No thread can be started in this process, and the batcher has none yet: the job was not accepted.

    The limit of threads or of memory is reached, or the interpreter is ending.
    """


class DeliveryTimeout(MicrobatchError):
    """The job's `delivery_timeout` passed and it left no trace; `__cause__` is its last error, if it had one.

    Final. Deliberately no `TimeoutError`: that is what `result(timeout=…)` raises while the job goes on.
    """


class JobNotFound(MicrobatchError, LookupError):
    """No job with this id is outstanding or in the history of this process."""


class MissingExtra(MicrobatchError, ImportError):
    """An optional dependency is not installed; the message is the command that installs it."""


class OutcomeUnknown(MicrobatchError):
    """The job may have been done or not (never twice), and every way to find out was tried.

    A processor may raise it to say that the fate of its batch is undecided; if the processor's
    `is_retryable` says yes to it, the same batch is handed over again, unchanged and alone.

    Args:
        batch_id: the `id` of the batch that held the job, where there was one.
    """

    batch_id: str | None = None  # for a subclass whose `__init__` forgets this one

    def __init__(self, *args: object, batch_id: str | None = None) -> None:
        super().__init__(*args)
        self.batch_id = batch_id


class ProcessorContractError(OutcomeUnknown):
    """The processor answered with something else than one result per job."""


class ForkedError(OutcomeUnknown, RuntimeError):
    """This future was inherited through a fork; the parent process owns the job and finishes it there."""


class WorkerDied(OutcomeUnknown):
    """The worker thread was hit by an exception from outside while the processor held the job."""


_PARTS = "_microbatch_parts"


def in_parts(error: BaseException, parts: Sequence[tuple[str, int]]) -> None:
    """Have the batch that fails with *error* come back in *parts*, if it comes back.

    For processors of this library. A part is the id of a batch and how many jobs, in their order, it has. Each comes
    back alone; the jobs that ended meanwhile are left out, for the error says that nothing was written.
    """
    error.__dict__[_PARTS] = tuple(parts)


def parts_of(error: BaseException) -> tuple[tuple[str, int], ...]:
    """What `in_parts` said of *error*; empty where the jobs come back each for itself."""
    try:
        found = vars(error).get(_PARTS, ())
    except BaseException:  # an exception that is a stranger's may look after its attributes itself
        return ()
    return found if type(found) is tuple else ()
