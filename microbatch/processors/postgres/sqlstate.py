"""What an error says about its batch, by SQLSTATE (PostgreSQL manual, appendix A)."""

from __future__ import annotations

import psycopg
import psycopg_pool

_RETRYABLE = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
    }
)
_CONNECTION_CLASS = "08"
_COMPLETION_UNKNOWN = "40003"


def is_retryable(error: BaseException) -> bool:
    """Whether the same batch may succeed when tried again: the link was lost, or others were in the way."""
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return _is_lost_link(error)
    return error.sqlstate in _RETRYABLE or error.sqlstate.startswith(_CONNECTION_CLASS)


def _is_lost_link(error: psycopg.Error) -> bool:
    # libpq's own failures come as OperationalError without SQLSTATE; psycopg uses the type for two others.
    others = (psycopg.errors.PipelineAborted, psycopg_pool.PoolClosed)
    return isinstance(error, psycopg.OperationalError) and not isinstance(error, others)


def is_refusal(error: BaseException) -> bool:
    """Whether the server itself said that the statement, be it COMMIT, was not carried out."""
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return False
    if error.sqlstate == _COMPLETION_UNKNOWN or error.sqlstate.startswith(_CONNECTION_CLASS):
        return False
    # FATAL and PANIC end the session, after a COMMIT perhaps.
    return error.diag.severity_nonlocalized == "ERROR"
