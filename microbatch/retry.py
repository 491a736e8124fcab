"""When a failed job is tried again: decisions only, nothing here waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

# Not the generator of the `random` module: a worker that drew from it would change what a program that has seeded it
# goes on to see.
_draw = random.SystemRandom().random

RetryOn = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how late a failed job is tried again.

    The delay before attempt n+1 is drawn between 0 and `min(backoff_max, backoff * 2**(n-1))` seconds (full
    jitter). A failure is retried if the processor's `is_retryable` says so, or *retry_on* does.

    Args:
        max_attempts: attempts in all, the first included; None leaves the bound to `delivery_timeout`. A batch that is
            split to find the job that breaks its link has those that this takes.
        backoff: seconds.
        backoff_max: seconds.
        retry_on: exception types, or a predicate on the exception. An `OutcomeUnknown` is retried on the
            processor's own word only.
    """

    max_attempts: int | None = None
    backoff: float = 0.05
    backoff_max: float = 2.0
    retry_on: RetryOn | None = None

    def __post_init__(self) -> None:
        attempts = self.max_attempts
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int)):
            raise TypeError(f"max_attempts must be a whole number or None, not {attempts!r}")
        if attempts is not None and attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {attempts!r}; for no retries pass retry=None")
        for name, value in (("backoff", self.backoff), ("backoff_max", self.backoff_max)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, not {value!r}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or more finite seconds, not {value!r}")
        if self.backoff_max < self.backoff:
            raise ValueError(f"backoff_max={self.backoff_max!r} is below backoff={self.backoff!r}; raise it")
        if self.retry_on is not None and not _is_types(self.retry_on) and not callable(self.retry_on):
            raise TypeError(f"retry_on must be exception types or a predicate, not {self.retry_on!r}")

    def allows(self, attempts: int) -> bool:
        """Whether a job that failed *attempts* times may be tried once more."""
        return self.max_attempts is None or attempts < self.max_attempts

    def matches(self, error: BaseException) -> bool:
        """Whether `retry_on` covers *error*."""
        if self.retry_on is None:
            return False
        if _is_types(self.retry_on):
            return isinstance(error, self.retry_on)  # type: ignore[arg-type]
        return bool(self.retry_on(error))  # type: ignore[operator]

    def delay(self, attempts: int, draw: Callable[[], float] = _draw) -> float:
        """Seconds to wait after *attempts* failures."""
        # Past 2**60 the cap decides anyway, and a float would overflow.
        ceiling: float = min(self.backoff_max, self.backoff * 2 ** min(attempts - 1, 60))
        return ceiling * draw()


def _is_types(retry_on: object) -> bool:
    types = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    return bool(types) and all(isinstance(item, type) and issubclass(item, BaseException) for item in types)
