"""The library's loggers: every line begins with the name of the batcher that it is about.

A processor does not know who calls it, so the name belongs to the thread: a batcher's own threads carry it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import MutableMapping
from typing import Any


class _Here(threading.local):
    name = "microbatch"


_here = _Here()


def name_thread(name: str) -> str:
    """From now on what this thread logs is about the batcher *name*; returns the name that it had."""
    before, _here.name = _here.name, name
    return before


# Python 3.10 counts the frames of `logging` itself, later ones do not.
_BEHIND_THIS = 2 if sys.version_info >= (3, 11) else 3


class Contained(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic since Python 3.11 only
    """A logger that never raises: a handler that does, or an exception that cannot be printed, costs the line."""

    def __init__(self, logger: str) -> None:
        super().__init__(logging.getLogger(logger), {})

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            super().log(level, msg, *args, **{"stacklevel": _BEHIND_THIS, **kwargs})
        except BaseException as failure:
            # On the main thread it may be the user's.
            if type(failure) is KeyboardInterrupt and threading.current_thread() is threading.main_thread():
                raise
            if kwargs.pop("exc_info", None):
                self.log(level, f"{msg} (its traceback cannot be written)", *args, **kwargs)


class Log(Contained):
    """A logger of this library, for the batcher *name*; without one for the thread's."""

    def __init__(self, logger: str, name: str | None = None) -> None:
        super().__init__(logger)
        self._name = name

    def of(self, name: str) -> Log:
        """The same logger for the batcher *name*, on a thread that is not its own."""
        return Log(self.logger.name, name)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        name = self._name or _here.name
        # A message without a placeholder has no arguments, and then nothing is escaped.
        return f"{name.replace('%', '%%') if '%' in msg else name}: {msg}", kwargs
