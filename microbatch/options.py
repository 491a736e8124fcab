"""The options of a batcher: checked at once and against each other, or read from the environment."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .queues import MemoryQueue
from .retry import RetryPolicy

# Stands for what the batcher was constructed with.
DEFAULT: Any = type("Default", (), {"__repr__": lambda self: "the batcher's default"})()


@dataclass(frozen=True, slots=True)
class Options:
    """See `MicroBatcher`."""

    max_batch_size: int = 100
    linger: float = 0.0
    max_concurrent_batches: int = 1
    max_outstanding: int = 10_000
    when_full: str = "block"
    submit_timeout: float = 5.0
    delivery_timeout: float | None = 20.0
    retry: RetryPolicy | None = field(default_factory=RetryPolicy)
    queue: Any = MemoryQueue
    history: int = 10_000
    history_ttl: float = 300.0
    name: str = "microbatch"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.retry is not None and not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy or None, not {self.retry!r}")
        if self.delivery_timeout is not None and self.linger >= self.delivery_timeout:
            raise ValueError(
                f"linger={self.linger!r} must be below delivery_timeout={self.delivery_timeout!r}: "
                "a job that lingers that long would never be processed"
            )

    def without_strangers(self) -> Options:
        """The same without the functions of the user's that it may hold."""
        retry = self.retry
        if type(retry) is RetryPolicy and retry.retry_on is not None:
            retry = replace(retry, retry_on=None)
        return replace(self, retry=retry, queue=MemoryQueue)


def whole(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")


def seconds(name: str, value: object, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 <= value <= threading.TIMEOUT_MAX or (positive and value == 0):
        raise ValueError(
            f"{name} must be {'more than 0' if positive else '0 or more'} seconds"
            f" and at most {threading.TIMEOUT_MAX:.0f}, not {value!r}"
        )


def _choice(name: str, value: object) -> None:
    if value not in ("block", "raise"):
        raise ValueError(f"{name} must be 'block' or 'raise', not {value!r}")


def _life(name: str, value: object) -> None:
    if value is not None:
        seconds(name, value, positive=True)


def _word(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if not value:
        raise ValueError(f"{name} must not be empty; leave it out for 'microbatch'")


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "max_batch_size": partial(whole, least=1),
    "linger": seconds,
    "max_concurrent_batches": partial(whole, least=1),
    "max_outstanding": partial(whole, least=1),
    "when_full": _choice,
    "submit_timeout": seconds,
    "delivery_timeout": _life,
    "history": partial(whole, least=0),
    "history_ttl": partial(seconds, positive=True),
    "name": _word,
}


def check_submit(
    job_id: str | None,
    priority: int,
    submit_timeout: float,
    delivery_timeout: float | None,
    *,
    ordered: bool,
) -> None:
    """Refuse what one `submit` may not say; *ordered* is whether the queue keeps an order."""
    if job_id is not None and not isinstance(job_id, str):
        raise TypeError(f"job_id must be a string, not {job_id!r}")
    if job_id == "":
        raise ValueError("job_id must not be empty; leave it out for one made by the library")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, not {priority!r}")
    if priority and not ordered:
        raise ValueError(
            f"priority={priority!r} needs a queue that keeps an order; this one does not. "
            "Use MemoryQueue (the default), or give yours `ordered = True` if it sorts its items"
        )
    if submit_timeout is not DEFAULT:
        seconds("submit_timeout", submit_timeout)
    if delivery_timeout is not DEFAULT:
        _life("delivery_timeout", delivery_timeout)


def _number(text: str) -> float:
    return float(text)


_SCALARS: dict[str, Callable[[str], Any]] = {
    "max_batch_size": int,
    "linger": _number,
    "max_concurrent_batches": int,
    "max_outstanding": int,
    "when_full": str,
    "submit_timeout": _number,
    "delivery_timeout": _number,
    "history": int,
    "history_ttl": _number,
    "name": str,
}
_RETRY: dict[str, Callable[[str], Any]] = {
    "retry_max_attempts": int,
    "retry_backoff": _number,
    "retry_backoff_max": _number,
}
_NONE_ALLOWED = ("delivery_timeout", "retry_max_attempts", "retry")
_OTHER_WORDS = {
    "batch_size": "max_batch_size",
    "size": "max_batch_size",
    "timeout": "linger",
    "interval": "linger",
    "frequency": "linger",
    "batch_timeout": "linger",
    "batch_interval": "linger",
    "batch_frequency": "linger",
    "workers": "max_concurrent_batches",
    "max_queue": "max_outstanding",
    "queue_size": "max_outstanding",
    "max_retries": "retry_max_attempts",
    "retries": "retry_max_attempts",
}


def options_from_env(prefix: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options that the environment names. `none` is None, an empty variable is unset.

    Raises:
        ValueError: a value that cannot be, or a name that is nearly an option's; both name the variable.
    """
    known: dict[str, Callable[[str], Any]] = {**_SCALARS, **_RETRY, "retry": str}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix) or not text.strip():
            continue
        option = variable[len(prefix) :].lower()
        if variable == prefix + option.upper() and option in known:
            found[option] = _parse(variable, option, text.strip(), known[option])
        else:
            _refuse_near_miss(variable, option, prefix, known)
    retry = {name[len("retry_") :]: found.pop(name) for name in _RETRY if name in found}
    if "retry" in found:
        if retry:
            raise ValueError(f"{prefix}RETRY=none contradicts the other {prefix}RETRY_… variables; unset one")
    elif retry:
        found["retry"] = _policy(prefix, retry)
    return found


def _parse(variable: str, option: str, text: str, convert: Callable[[str], Any]) -> Any:
    if text.lower() == "none" and option in _NONE_ALLOWED:
        return None
    if option == "retry":
        raise ValueError(f"{variable}={text!r}: only 'none' is possible; see {variable}_MAX_ATTEMPTS and its kin")
    try:
        value = convert(text)
    except ValueError:
        kind = "a whole number" if convert is int else "a number"
        raise ValueError(f"{variable}={text!r} is not {kind}") from None
    if option in _CHECKS:
        _CHECKS[option](variable, value)
    return value


def _policy(prefix: str, numbers: dict[str, Any]) -> RetryPolicy:
    try:
        return RetryPolicy(**numbers)
    except ValueError as error:
        given = ", ".join(f"{prefix}RETRY_{name.upper()}={value!r}" for name, value in numbers.items())
        raise ValueError(f"{given}: {error}") from None


def _refuse_near_miss(variable: str, option: str, prefix: str, known: Mapping[str, object]) -> None:
    meant = option if option in known else _OTHER_WORDS.get(option)
    if meant is None:
        squeezed = {name.replace("_", ""): name for name in known}
        close = difflib.get_close_matches(option.replace("_", ""), squeezed, n=1, cutoff=0.8)
        meant = squeezed[close[0]] if close else None
    if meant is not None:
        raise ValueError(f"{variable} is no option; did you mean {prefix}{meant.upper()}?")
