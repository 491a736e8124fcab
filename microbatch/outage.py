"""How long the processor has been away, for one line in the log when it goes and one when it is back."""

from __future__ import annotations

from collections.abc import Callable

from .calling import Processor
from .foreign import type_name

_AGAIN = 60.0  # seconds until the same complaint is worth another line
_KINDS = 100  # of complaints that are remembered


class Outage:
    """Of one batcher; its methods are called under the lock. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._since: float | None = None

    def begin(self, now: float) -> bool:
        """An attempt that began *now* got no answer; whether it is the first one of its outage."""
        first = self._since is None
        if first:
            self._since = now
        return first

    def end(self, now: float) -> float | None:
        """An answer came: how many seconds the outage has lasted, None if there was none."""
        since, self._since = self._since, None
        return None if since is None else max(0.0, now - since)


class Complaints:
    """Which errors are worth a line: each kind once a minute."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}

    def is_due(self, kind: str, now: float) -> bool:
        """Whether *kind* is to be said at *now*."""
        if now < self._next.get(kind, now):
            return False
        if len(self._next) >= _KINDS:
            self._next.clear()
        self._next[kind] = now + _AGAIN
        return True


def is_away(processor: Processor, error: BaseException) -> bool:
    """Whether *error*, for which a batch is tried again, says that the processor gave no answer at all."""
    return bool(_ask(processor.is_unavailable, error, default=True))


def reason(processor: Processor, error: BaseException) -> str:
    """What the log may say of *error*: an exception's own text may quote a row, so the processor is asked."""
    text = _ask(processor.describe, error, default=None)
    return text if type(text) is str else type_name(error)


def _ask(question: Callable[[BaseException], object] | None, error: BaseException, default: object) -> object:
    if question is None:
        return default
    try:
        return question(error)
    except BaseException:  # a line in the log is not worth more
        return default
