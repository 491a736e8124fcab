"""What became of a job that was not written, in words that quote no value, no SQL and no address."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

import psycopg

from microbatch.errors import MicrobatchError, OutcomeUnknown
from microbatch.processors.postgres import BatchRolledBack
from microbatch.processors.postgres.columns import column_of

CONFLICT = "conflict"
REFUSED = "refused"
NOT_WRITTEN = "not-written"
KEY_REUSED = "idempotency-key-reused"
LOST = "lost"
UNKNOWN = "unknown"

HTTP_STATUS = {
    CONFLICT: HTTPStatus.CONFLICT,
    REFUSED: HTTPStatus.UNPROCESSABLE_ENTITY,
    NOT_WRITTEN: HTTPStatus.SERVICE_UNAVAILABLE,
    KEY_REUSED: HTTPStatus.UNPROCESSABLE_ENTITY,
    LOST: HTTPStatus.SERVICE_UNAVAILABLE,
    UNKNOWN: HTTPStatus.GATEWAY_TIMEOUT,
}

_CONFLICTS = ("23505", "23P01")
# Data, constraints, triggers that RAISE, WITH CHECK OPTION: the next try ends the same way.
_REFUSALS = ("22", "23", "27", "44", "P0")


@dataclass(frozen=True, slots=True)
class Failure:
    """The `result` of a failed job; *error* is one of the words above."""

    error: str
    message: str
    sqlstate: str | None = None
    constraint: str | None = None
    column: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Without a column where none is known."""
        return {name: value for name, value in asdict(self).items() if name != "column" or value is not None}


class NotCompleted(MicrobatchError):
    """The status store says of a job that it is not to be written; carries why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of(error: BaseException) -> Failure:
    """What to tell about *error*."""
    if isinstance(error, NotCompleted):
        return error.failure
    if isinstance(error, OutcomeUnknown):
        return Failure(UNKNOWN, "The row may have been written or not: ask for the job's status before another try.")
    if isinstance(error, BatchRolledBack) and isinstance(error.__cause__, psycopg.Error):
        return Failure(NOT_WRITTEN, "Another job of the batch was refused, and nothing was written: try again.")
    if isinstance(error, psycopg.Error) and (refusal := _refusal(error)) is not None:
        return refusal
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    return Failure(NOT_WRITTEN, "The row could not be written in time, and nothing was: try again.", state)


def _refusal(error: psycopg.Error) -> Failure | None:
    state, constraint, column = error.sqlstate, error.diag.constraint_name, column_of(error)
    if state is None:
        if isinstance(error, psycopg.OperationalError):
            return None
        return Failure(REFUSED, "The job cannot be sent to the database.", column=column)
    if state in _CONFLICTS:
        return Failure(CONFLICT, f"The database has such a row: {_named(state)}.", state, constraint, column)
    if state[:2] in _REFUSALS:
        return Failure(REFUSED, f"The database refused the row: {_named(state)}.", state, constraint, column)
    return None


def _named(state: str) -> str:
    """`check violation` for 23514: the server's own message may quote values."""
    try:
        name = psycopg.errors.lookup(state).__name__
    except KeyError:
        return f"SQLSTATE {state}"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
