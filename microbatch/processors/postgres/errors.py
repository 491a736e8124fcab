"""What only this processor raises."""

from __future__ import annotations

import sys
import threading

import psycopg

from microbatch.errors import MicrobatchError, OutcomeUnknown


class CommitUnknown(OutcomeUnknown):
    """COMMIT was called, its answer is missing, and whether it was carried out could not be found out.

    Args:
        lookup: a query whose answer may still say it, where there is one.
    """

    def __init__(self, *args: object, batch_id: str | None = None, lookup: str | None = None) -> None:
        super().__init__(*args, batch_id=batch_id)
        self.lookup = lookup


class Undecided(CommitUnknown):
    """The same, and another attempt may find out."""


class ServerSilent(psycopg.OperationalError):
    """The server did not answer in the time that the batch has."""


class BatchRolledBack(MicrobatchError):
    """Another job of the batch failed, and `on_job_error="fail_batch"`: nothing was written.

    Args:
        job: the one that failed, as it was submitted.
    """

    def __init__(self, *args: object, job: object = None) -> None:
        super().__init__(*args)
        self.job = job


class KeysTaken(psycopg.errors.UniqueViolation):
    """Others insert the keys by hand that this processor draws, faster than it draws them: no job's fault."""


class TableChanging(psycopg.OperationalError):
    """Each time that it was looked at, the table had changed before the batch was written: no job's fault."""


_OURS = frozenset(("microbatch", "psycopg", "psycopg_binary", "psycopg_c")) | sys.stdlib_module_names


def is_jobs_own(error: BaseException) -> bool:
    """Whether *error*, met while a job was read, comes from the job, and is no interruption of this thread.

    A lazy value may raise anything, `SystemExit` and `CancelledError` too. What another thread or a signal handler
    raises looks the same, but has no frame of the job's code behind it.
    """
    if isinstance(error, Exception):
        return True
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        return False
    return went_through_the_job(error)


def went_through_the_job(error: BaseException) -> bool:
    """Whether code that is neither ours nor psycopg's or Python's stands behind *error*."""
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] not in _OURS:
            return True
        trace = trace.tb_next
    return False
