"""What an error means for its batch: one table by SQLSTATE (PostgreSQL manual, appendix A)."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, TypeVar

import psycopg
import psycopg_pool

from .errors import KeysTaken, TableChanging
from .refused import tells_for_good


class Kind(Enum):
    """What to do about an error; the value says it in words."""

    LINK = "the link is lost: connect again and retry"
    CONFLICT = "others were in the way: retry"
    LOCK = "waited too long: retry once, then isolate, so that only the job that waits fails"
    RESOURCES = "the server is short of something: retry"
    READ_ONLY = "not the primary (any more): connect again and retry"
    STALE = "a prepared statement is out of date: prepare it anew, once"
    PERMANENT = "the job or the statement is wrong: isolate, no retry"


class Entry(NamedTuple):
    """One line of the table; a code of two characters stands for its whole class."""

    code: str
    meaning: str
    kind: Kind


TABLE = (
    Entry("08", "connection exceptions", Kind.LINK),
    Entry("57P01", "admin_shutdown", Kind.LINK),
    Entry("57P02", "crash_shutdown", Kind.LINK),
    Entry("57P03", "cannot_connect_now", Kind.LINK),
    Entry("57P05", "idle_session_timeout", Kind.LINK),
    Entry("25P03", "idle_in_transaction_session_timeout", Kind.LINK),
    Entry("25P04", "transaction_timeout", Kind.LINK),
    Entry("40001", "serialization_failure", Kind.CONFLICT),
    Entry("40P01", "deadlock_detected", Kind.CONFLICT),
    Entry("55P03", "lock_not_available", Kind.LOCK),
    Entry("57014", "query_canceled", Kind.LOCK),
    Entry("53", "insufficient resources", Kind.RESOURCES),
    Entry("58030", "io_error", Kind.RESOURCES),
    Entry("25006", "read_only_sql_transaction", Kind.READ_ONLY),
    Entry("26000", "invalid_sql_statement_name", Kind.STALE),
)
_KINDS = {entry.code: entry.kind for entry in TABLE}
_COMPLETION_UNKNOWN = "40003"
_FEATURE_NOT_SUPPORTED = "0A000"
_MARK = "_microbatch_is_final"
_E = TypeVar("_E", bound=psycopg.Error)


def kind_of(error: BaseException) -> Kind:
    """What to do about *error*; `PERMANENT` for everything that is not in the table."""
    if not isinstance(error, psycopg.Error):
        return Kind.PERMANENT
    code = error.sqlstate
    if isinstance(error, (KeysTaken, TableChanging)):
        return Kind.CONFLICT
    if code is None:
        return Kind.LINK if _is_lost_link(error) else Kind.PERMANENT
    if code == _FEATURE_NOT_SUPPORTED and "cached plan" in str(error):
        return Kind.STALE
    return _KINDS.get(code) or _KINDS.get(code[:2], Kind.PERMANENT)


def is_listed(code: str) -> bool:
    """Whether the table says something else of *code* than that the job is wrong."""
    return code in _KINDS or code[:2] in _KINDS


def is_retryable(error: BaseException) -> bool:
    """Whether the same job may succeed when tried again: the link was lost, or others were in the way."""
    return kind_of(error) is not Kind.PERMANENT and not hasattr(error, _MARK)


def finally_failed(error: _E) -> _E:
    """*error*, not to be tried again: it is what a second attempt came to, or will come to."""
    setattr(error, _MARK, True)
    return error


def _is_lost_link(error: psycopg.Error) -> bool:
    # libpq's own failures come as OperationalError without SQLSTATE; psycopg uses the type for two others.
    others = (psycopg.errors.PipelineAborted, psycopg_pool.PoolClosed)
    return isinstance(error, psycopg.OperationalError) and not isinstance(error, others) and not tells_for_good(error)


def is_refusal(error: BaseException) -> bool:
    """Whether the server itself said that the statement, be it COMMIT, was not carried out."""
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return False
    if error.sqlstate == _COMPLETION_UNKNOWN or error.sqlstate.startswith("08"):
        return False
    # FATAL and PANIC end the session, after a COMMIT perhaps.
    return error.diag.severity_nonlocalized == "ERROR"
