"""`microbatch load`: a file into a table, in memory that does not grow with the file.

Every row is a job, `submit` blocks while enough of them are under way, and a job's callback counts its
outcome. A row that was read is committed, failed (no trace), unknown or refused (not fit to be sent).
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os.path import samestat
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from microbatch._database import Target, conninfo_of, find_table, one_line
from microbatch._outcomes import Rejects, Tally
from microbatch._rows import (
    BadInput,
    BadRow,
    CsvRows,
    JsonRows,
    Lines,
    Row,
    RowSource,
    looks_like_json,
    plural,
)
from microbatch._terminal import CommandError, StatusLine, StopSignals, answer, bar, say, signal_name, table
from microbatch.batcher import MicroBatcher
from microbatch.errors import QueueFull
from microbatch.processors.postgres import PostgresProcessor

_FORMATS = {".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_POLL = 0.2  # seconds between looks at signals while something else is waited for
_LAST_CALLS = 5.0  # seconds for the callbacks of rows that are given up
_LOG_INTERVAL = 5.0  # seconds between lines of the log


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The command line of `microbatch load`."""

    file: str
    table: str
    dsn: str | None = None
    format: str | None = None
    columns: tuple[str, ...] | None = None
    null: str | None = None
    encoding: str = "utf-8"
    rejects: str | None = None
    max_batch_size: int = 1000
    workers: int = 1
    delivery_timeout: float = 60.0


def load(options: LoadOptions) -> int:
    """Load the file and print what became of it; returns the exit status."""
    conninfo = conninfo_of(options.dsn)
    with StopSignals(patience=2) as stop, ExitStack() as stack:
        with stop.raising():
            binary = stack.enter_context(_open_input(options))
            source = _row_source(options, _decoded(binary, options.encoding), _Size(binary))
            target = find_table(conninfo, options.table, source.columns)
        rejects = Rejects(_open_rejects(options, binary))
        tally = Tally(target.columns, rejects)
        progress = Progress(binary, tally)
        run = _Run(options, tally, stop, progress)
        with rejects, shown_on(progress):
            run.feed(conninfo, target, source.read(target.json_columns))
        return run.report()


class Progress:
    """The line on standard error that shows how far the load is."""

    def __init__(self, binary: BinaryIO, tally: Tally) -> None:
        self.started = time.monotonic()
        self._line = StatusLine(sys.stderr)
        self._binary = binary
        self._size = _size_of(binary)
        self._tally = tally
        # Guards the terminal: workers log while the reading thread shows how far it is.
        self._lock = threading.RLock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def update(self) -> None:
        if self._line.due():
            with self._lock:
                self._line.show(self._text())

    def note(self, text: str) -> None:
        """Leave *text* on a line of its own."""
        with self._lock:
            self._line.clear()
            say(f"microbatch load: {text}")

    def clear(self) -> None:
        self._line.clear()

    def _text(self) -> str:
        tally, seconds = self._tally, max(self.seconds, 1e-9)
        bad = tally.failed + tally.unknown + tally.refused
        parts = [f"{tally.committed:,} rows", f"{tally.committed / seconds:,.0f} rows/s"]
        if bad:
            parts.append(f"{bad:,} not committed")
        if self._size:
            done = min(1.0, self._binary.tell() / self._size)
            parts.insert(0, f"{bar(done)} {done:4.0%}")
            parts.append(f"{clock(seconds * (1 - done) / done)} left" if done else "")
        return "  ".join(parts)


class _Size:
    """Whether a file is read to the end that it has now: it may be cut short meanwhile, in the middle of a row."""

    def __init__(self, binary: BinaryIO) -> None:
        self._binary = binary
        self._size = _size_of(binary)

    def check(self) -> None:
        """Call it where the file ends. Raises `OSError` if it was longer."""
        if self._size and min(self._binary.tell(), _size_of(self._binary)) < self._size:
            raise OSError(f"it has become shorter than the {self._size} bytes that it had")


class _LogLines(logging.Handler):
    """Shows the library's warnings, few enough to read while a server is away."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LOG_INTERVAL
            self._progress.note(record.getMessage())


@contextmanager
def shown_on(progress: Progress) -> Iterator[None]:
    logger, handler = logging.getLogger("microbatch"), _LogLines(progress)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Run:
    """One load under way."""

    def __init__(self, options: LoadOptions, tally: Tally, stop: StopSignals, progress: Progress) -> None:
        self._options = options
        self._tally = tally
        self._stop = stop
        self._progress = progress
        # While every worker has a batch in the database, the next ones fill up.
        self._max_outstanding = options.max_batch_size * (2 * options.workers + 1)
        self._seconds = 0.0
        self._trouble = ""

    def feed(self, conninfo: str, target: Target, rows: Iterator[Row | BadRow]) -> None:
        """Submit all *rows* and wait for their outcomes, or for the stop signals."""
        options = self._options
        batcher: MicroBatcher[tuple[str | None, ...], Any] = MicroBatcher(
            PostgresProcessor.insert_into(conninfo, target.table, target.columns, returning=None),
            max_batch_size=options.max_batch_size,
            max_concurrent_batches=options.workers,
            max_outstanding=self._max_outstanding,
            submit_timeout=_POLL,
            delivery_timeout=options.delivery_timeout,
            name="microbatch-load",
        )
        try:
            self._submit_all(batcher, rows)
        except (OSError, UnicodeError) as error:
            self._trouble = f"the input cannot be read any further: {one_line(error)}"
        finally:
            self._drain(batcher)
            self._seconds = self._progress.seconds
            self._progress.clear()

    def report(self) -> int:
        """Print the counts and say what is to be said about them; returns the exit status."""
        tally = self._tally
        for remark in self._remarks():
            self._progress.note(remark)
        rate = tally.committed / self._seconds if self._seconds else 0.0
        counts = [(name, str(getattr(tally, name))) for name in ("committed", "failed", "unknown", "refused")]
        figures = [("seconds", f"{self._seconds:.1f}"), ("rows/s", f"{rate:.0f}")]
        text = table([("rows read", str(tally.read)), *counts, *figures], indent="")
        if error := answer(text):
            self._progress.note(f"standard output does not take the counts ({one_line(error)})\n{text}")
        if self._stop.count:
            return 128 + self._stop.number
        return 0 if tally.all_committed and not self._broken else 1

    @property
    def _broken(self) -> bool:
        return bool(self._trouble or self._tally.rejects.error or self._tally.unsettled)

    def _submit_all(self, batcher: MicroBatcher[Any, Any], rows: Iterator[Row | BadRow]) -> None:
        for row in self._stop.until_stopped(rows):
            if isinstance(row, BadRow):
                self._tally.refuse(row)
            elif not self._submit(batcher, row):
                return  # not accepted, so it does not count as read
            self._progress.update()
            if self._is_stalled:
                self._trouble = f"gave up: no row arrives within {self._options.delivery_timeout:g} s"
                return

    @property
    def _is_stalled(self) -> bool:
        """Whether nothing that was under way arrived: what comes next would not, either."""
        return self._tally.undelivered_in_a_row >= self._max_outstanding

    def _submit(self, batcher: MicroBatcher[Any, Any], row: Row) -> bool:
        while not self._stop.count:
            try:
                future = batcher.submit(row.values)
            except QueueFull:
                self._progress.update()
            else:
                self._tally.accept(row, future)
                return True
        return False

    def _drain(self, batcher: MicroBatcher[Any, Any]) -> None:
        if self._stop.count:
            waiting = plural(self._tally.unsettled, "row")
            self._progress.note(f"no more rows are read; waiting for {waiting} (Ctrl-C again gives them up)")
        while not self._has_given_up and not batcher.flush(timeout=_POLL):
            self._progress.update()
        report = batcher.shutdown(timeout=0 if self._has_given_up else None)
        if not report.finished:
            batcher.shutdown(timeout=_LAST_CALLS)

    @property
    def _has_given_up(self) -> bool:
        return self._stop.count >= 2 or self._is_stalled

    def _remarks(self) -> Iterator[str]:
        tally = self._tally
        stopped = f"stopped by {signal_name(self._stop.number)}" if self._stop.count else self._trouble
        if stopped:
            yield f"{stopped}; the counts cover the rows up to line {tally.last_line}, none behind it was read"
        if tally.rejects.first:
            yield f"first error: {tally.rejects.first}"
        if tally.rejects.error:
            yield f"the rejects file is incomplete: {one_line(tally.rejects.error)}"
        if tally.unsettled:
            yield f"{plural(tally.unsettled, 'row')} without an outcome: this is an error in microbatch"


def _open_input(options: LoadOptions) -> BinaryIO:
    try:
        return open(0, "rb", closefd=False) if options.file == "-" else open(options.file, "rb")
    except OSError as error:
        raise CommandError(f"cannot read {options.file}: {error.strerror}") from None


def _size_of(binary: BinaryIO) -> int:
    """In bytes; 0 for what has no size, such as a pipe."""
    return os.fstat(binary.fileno()).st_size if binary.seekable() else 0


def _decoded(binary: BinaryIO, encoding: str) -> TextIO:
    try:
        if codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"  # skips a byte order mark where there is one
        # Bytes that do not decode are kept apart for their own row's sake, see `unreadable`.
        return io.TextIOWrapper(binary, encoding, "surrogateescape", newline="\n")
    except LookupError:
        raise CommandError(f"--encoding: there is no encoding {encoding!r}") from None


def _row_source(options: LoadOptions, text: TextIO, size: _Size) -> RowSource:
    lines = Lines(text, size.check)
    try:
        if _format(options, lines) == "jsonl":
            if options.null is not None:
                raise CommandError("--null is for CSV; JSON has its own null")
            return JsonRows(lines, options.columns)
        if options.columns is not None:
            raise CommandError("--columns is for JSON lines; a CSV file names its columns in the header")
        return CsvRows(lines, options.null or "")
    except (BadInput, OSError, UnicodeError) as error:
        raise CommandError(f"cannot read {options.file}: {one_line(error)}") from None


def _format(options: LoadOptions, lines: Lines) -> str:
    known = options.format or _FORMATS.get(Path(options.file).suffix.lower())
    return known or ("jsonl" if looks_like_json(lines) else "csv")


def _open_rejects(options: LoadOptions, binary: BinaryIO) -> TextIO | None:
    if options.rejects is None:
        return None
    try:
        path = Path(options.rejects)
        if path.is_file() and samestat(path.stat(), os.fstat(binary.fileno())):
            raise CommandError("--rejects would overwrite the file that is loaded")
        # A byte that did not decode becomes the escape \udcXX, which is JSON as well.
        return path.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CommandError(f"cannot write {options.rejects}: {error.strerror}") from None


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
