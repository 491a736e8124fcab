"""What the commands share: a status line, aligned tables, orderly stops. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


class CommandError(Exception):
    """Ends a command with one line on standard error and this exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """Somebody pressed Ctrl-C, or sent SIGTERM: the command ends early, with the shell's status for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.status = 128 + number


def signal_name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """Counts SIGINT and SIGTERM inside `with`, so that no statement is torn in two by an exception.

    The command looks at `count` where it can stop. More signals than its *patience* raise `KeyboardInterrupt`
    wherever the program is. Outside the main thread nothing is installed, as Python allows it only there.
    """

    def __init__(self, patience: int) -> None:
        self.count = 0
        self.number = 0
        self._patience = patience
        self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` when a signal has come."""
        if self.count:
            raise Stopped(self.number)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, the first signal raises `Stopped` at once: for waits that nobody else ends."""
        try:
            self._may_raise = True
            self.check()
            yield
        finally:
            self._may_raise = False

    def until_stopped(self, items: Iterator[T]) -> Iterator[T]:
        """Hand out *items* until a signal comes, also while the next one is waited for (a silent pipe)."""
        try:
            while True:
                # A read that blocks is resumed after the handler unless the handler raises (PEP 475). Nothing
                # is lost by that: an item not handed out yet is one that was not read.
                self._may_raise = True
                # After that: a signal that came before it has raised nothing.
                if self.count:
                    return
                item = next(items, None)
                self._may_raise = False
                if item is None:
                    return
                yield item
        except Stopped:
            return
        finally:
            self._may_raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.number = self.number or number
        if self._may_raise:
            self._may_raise = False
            raise Stopped(number)
        if self.count > self._patience:
            raise KeyboardInterrupt


def say(text: str) -> None:
    """One line on standard error, if it still leads anywhere: nothing depends on its being read."""
    if sys.stderr is not None:
        _written(sys.stderr, text)


def answer(text: str) -> OSError | None:
    """Write *text* to standard output, and return what went wrong: its reader may be gone, or its disk full."""
    return None if sys.stdout is None else _written(sys.stdout, text)


def _written(stream: TextIO, text: str) -> OSError | None:
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What is left in its buffer would fail once more, at the interpreter's exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class StatusLine:
    """One line that is written over and over; nothing at all where *stream* is no terminal."""

    def __init__(self, stream: TextIO | None, interval: float = 0.1) -> None:
        self.live = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stream = stream
        self._interval = interval
        self._next = 0.0
        self._shown = False

    def due(self) -> bool:
        """True at most once per interval, and never without a terminal: ask before making up the text."""
        if not self.live or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval
        return True

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.live:
            # A line as wide as the terminal would wrap, and could not be written over.
            self._write(text[: shutil.get_terminal_size().columns - 1])
            self._shown = True

    def clear(self) -> None:
        """Leave an empty line behind, for what is printed next."""
        if self._shown:
            self._write("")
            self._shown = False

    def _write(self, text: str) -> None:
        assert self._stream is not None
        try:
            # Erased to its end (ESC [K): the terminal may have echoed ^C behind the text.
            self._stream.write(f"\r{text}\033[K")
            self._stream.flush()
        except OSError:  # the terminal is gone
            self.live = False


def bar(fraction: float, width: int = 20) -> str:
    filled = min(width, int(fraction * width))
    return "[" + "#" * filled + "." * (width - filled) + "]"


def table(rows: Iterable[tuple[str, ...]], indent: str = "  ") -> str:
    """Lines of aligned columns: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append((indent + "   ".join([first.ljust(widths[0]), *cells])).rstrip())
    return "\n".join(lines)
