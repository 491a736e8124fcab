"""What only this processor raises."""

from __future__ import annotations

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
