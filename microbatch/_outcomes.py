"""What became of the rows of a load: the counts, and the rows that were not committed."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, TextIO

import psycopg

from microbatch._rows import BadRow, Row
from microbatch.errors import DeliveryTimeout, OutcomeUnknown
from microbatch.processors.postgres.columns import column_of


class Rejects:
    """The rejects file, if one is wanted: a JSON object for each row that was not committed.

    *error* is why it is incomplete, should it be: a full disk must not cost the counts.
    """

    def __init__(self, file: TextIO | None) -> None:
        self.first = ""
        self.error: OSError | None = None
        self._file = file
        # Guards the file and the two fields: the reading thread and every worker write.
        self._lock = threading.Lock()

    def __enter__(self) -> Rejects:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError as failure:
            self.error = self.error or failure

    def add(self, line: int, row: dict[str, str | None] | str, error: BaseException | str) -> None:
        entry = {"line": line, "row": row, **describe(error)}
        with self._lock:
            self.first = self.first or f"line {line}: {' '.join(entry['message'].split())}"
            try:
                if self._file is not None:
                    self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            except OSError as failure:
                self.error = self.error or failure


class Tally:
    """Counts rows; each that was read is in one of the four others when all is over."""

    def __init__(self, columns: tuple[str, ...], rejects: Rejects) -> None:
        self.rejects = rejects
        self.read = self.committed = self.failed = self.unknown = self.refused = 0
        self.last_line = 0
        self.undelivered_in_a_row = 0
        self._columns = columns
        # Guards the counters that callbacks move, as there may be several workers.
        self._lock = threading.Lock()

    @property
    def unsettled(self) -> int:
        with self._lock:
            return self.read - self.committed - self.failed - self.unknown - self.refused

    @property
    def all_committed(self) -> bool:
        return self.committed == self.read

    def accept(self, row: Row, future: Future[Any]) -> None:
        self.read += 1
        self.last_line = row.last_line
        future.add_done_callback(partial(self._settle, row))

    def refuse(self, row: BadRow) -> None:
        self.read += 1
        self.refused += 1
        self.last_line = row.last_line
        self.rejects.add(row.first_line, row.text, row.reason)

    def _settle(self, row: Row, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            values = dict(zip(self._columns, row.values, strict=True))
            self.rejects.add(row.first_line, values, error)
        with self._lock:
            if isinstance(error, (DeliveryTimeout, OutcomeUnknown)):
                self.undelivered_in_a_row += 1
            else:
                self.undelivered_in_a_row = 0
            if error is None:
                self.committed += 1
            elif isinstance(error, OutcomeUnknown):
                self.unknown += 1
            else:
                self.failed += 1


def describe(error: BaseException | str) -> dict[str, Any]:
    """Class, SQLSTATE, constraint, column and message of *error*; a plain string comes from the reader of the input."""
    if isinstance(error, str):
        return {"error": "BadRow", "sqlstate": None, "constraint": None, "column": None, "message": error}
    cause = error.__cause__
    message = str(error).strip() or type(error).__name__
    origin = error if isinstance(error, psycopg.Error) else cause
    return {
        "error": type(error).__name__,
        "sqlstate": getattr(origin, "sqlstate", None),
        "constraint": origin.diag.constraint_name if isinstance(origin, psycopg.Error) else None,
        "column": column_of(error),
        "message": message if cause is None else f"{message} ({type(cause).__name__}: {str(cause).strip()})",
    }
