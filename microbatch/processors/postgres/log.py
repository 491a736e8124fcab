"""The processor's lines in the log: without values of jobs, and without secrets."""

from __future__ import annotations

import logging
import re
import threading
import time
from types import TracebackType

import psycopg

from microbatch.logs import Log
from microbatch.outage import Complaints

_log = Log("microbatch.postgres")

# Classes whose primary message names objects of the database and never a value.
_HARMLESS = ("08", "0A", "25", "26", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58")
# The same for every job: names, rights, syntax.
_OF_CONFIGURATION = ("3F000", "42501", "42601", "42702", "42703", "42883", "42P01")
_complaints = Complaints()
_HERE = __name__.rpartition(".")[0]


def tell(level: int, message: str, *args: object) -> None:
    """Log one line. A handler that raises must not replace a batch's own error: it may be an "unknown"."""
    try:
        _log.log(level, message, *args)
    except Exception:
        pass


def complain(error: BaseException) -> None:
    """A line, once a minute, for a job's error that fails every job until somebody changes a name or a right."""
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    if state in _OF_CONFIGURATION and "row-level" not in str(error):
        said = describe(error)
        if _complaints.is_due(f"{threading.current_thread().name}: {said}", time.monotonic()):
            tell(logging.ERROR, "jobs fail: %s (said once a minute)", said)


def describe(error: BaseException, where: str = "") -> str:
    """Type, SQLSTATE and text of *error* on one line; *where* is added if the text does not name a server."""
    cause = error.__cause__
    if not isinstance(error, psycopg.Error) and isinstance(cause, psycopg.Error):
        error = cause  # of a batch whose fate is unknown
    state = getattr(error, "sqlstate", None) if isinstance(error, psycopg.Error) else None
    said = " ".join(filter(None, (type(error).__name__, state)))
    text = _text(error, state)
    places = [where] if where and "port" not in text else []
    return "; ".join([f"{said}: {text}" if text else said, *places])


def _text(error: BaseException, state: str | None) -> str:
    if isinstance(error, psycopg.Error):
        if state is None:
            # libpq's own, of the connection.
            return _line(str(error)) if isinstance(error, psycopg.OperationalError) else ""
        return _line(error.diag.message_primary or str(error)) if state.startswith(_HARMLESS) else ""
    return _line(str(error)) if _is_raised_here(error.__traceback__) else ""


def _is_raised_here(traceback: TracebackType | None) -> bool:
    """Whether the text is this package's own: a stranger's may hold anything."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__", "")).startswith(_HERE)


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
