"""What listeners are told: frozen records in the past tense, and the list that tells them.

A listener that raises is logged with its traceback and changes nothing. A slow one delays the next batch,
never more. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .logs import Log

_log = Log("microbatch.events")


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. Listen to the concrete ones; in each of them *batcher* is the name of the one that tells."""


@dataclass(frozen=True, slots=True)
class JobSubmitted(Event):
    """A job was accepted. Told on the submitting thread; may come after `JobCompleted`."""

    job: Any
    job_id: str | None
    priority: int
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class JobRetrying(Event):
    """Attempt *attempt* of a job failed; it is tried again in *delay* seconds."""

    job: Any
    job_id: str | None
    attempt: int
    batch_id: str
    error: BaseException
    delay: float
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class JobCompleted(Event):
    """A job is done. *seconds* counts from submit to outcome, *waited* from submit to the begin of its last batch."""

    job: Any
    job_id: str | None
    attempt: int
    batch_id: str
    result: Any
    seconds: float
    waited: float = 0.0
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """A job failed for good, or its outcome is unknown (then *error* is an `OutcomeUnknown`).

    This is the dead-letter hook: it carries the job. *batch_id* is None when no batch ever held the job. *waited* is
    as in `JobCompleted`, None where it is not a batch's end that ended the job but a deadline, say.
    """

    job: Any
    job_id: str | None
    attempt: int
    batch_id: str | None
    error: BaseException
    seconds: float
    waited: float | None = None
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class JobCancelled(Event):
    """A queued job was cancelled. Told on the cancelling thread."""

    job: Any
    job_id: str | None
    seconds: float
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class BatchStarted(Event):
    """A batch of *size* jobs is about to be handed to the processor. Told on the worker's thread.

    *origins* is what tracing kept of the submits of its jobs, in their order; empty without tracing.
    """

    batch_id: str
    size: int
    attempt: int
    trigger: str
    origins: tuple[Any, ...] = ()
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class BatchCompleted(Event):
    """The processor answered; single jobs may have failed (*failed* of *size*). *seconds* is the time that it took."""

    batch_id: str
    size: int
    attempt: int
    trigger: str
    failed: int
    seconds: float
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class BatchFailed(Event):
    """The processor raised, or broke its contract."""

    batch_id: str
    size: int
    attempt: int
    trigger: str
    error: BaseException
    seconds: float
    batcher: str = "microbatch"


@dataclass(frozen=True, slots=True)
class BatcherShutDown(Event):
    """The last event: every job has its outcome.

    After it may come only `JobSubmitted`, what a slow listener or callback holds up for more than `delivery_timeout`
    after the last outcome, and a `JobCancelled` whose own callback waits for the shutdown.
    """

    completed: int
    failed: int
    cancelled: int
    unknown: int
    batcher: str = "microbatch"


E = TypeVar("E", bound=Event)


class Listeners:
    """Who listens to what the batcher *name* tells. Replaced as a whole on every change, so telling needs no lock."""

    def __init__(self, name: str = "microbatch") -> None:
        self.name = name
        self.by_type: dict[type[Event], tuple[Callable[[Any], object], ...]] = {}

    def add(self, event_type: type[E], listener: Callable[[E], object]) -> None:
        _check(event_type)
        if not callable(listener):
            raise TypeError(f"listener must be callable, not {listener!r}")
        self.by_type = {**self.by_type, event_type: (*self.by_type.get(event_type, ()), listener)}

    def remove(self, event_type: type[E], listener: Callable[[E], object]) -> None:
        """Forget *listener*, compared by equality (each access makes a new bound method)."""
        _check(event_type)
        kept = list(self.by_type.get(event_type, ()))
        if listener not in kept:
            raise ValueError(f"{listener!r} does not listen to {event_type.__name__}")
        kept.remove(listener)
        self.by_type = {**self.by_type, event_type: tuple(kept)}

    def want(self, *event_types: type[Event]) -> bool:
        """Whether it is worth making such an event."""
        by_type = self.by_type
        return bool(by_type) and any(by_type.get(event_type) for event_type in event_types)

    def tell(self, event: Event) -> None:
        """Call the listeners one by one. Only a KeyboardInterrupt on the caller's thread passes, at the end."""
        interrupt = None
        for listener in self.by_type.get(type(event), ()):
            try:
                listener(event)
            except KeyboardInterrupt as exc:
                interrupt = exc
            except BaseException:
                _log.of(self.name).exception("listener %r failed on %s", listener, type(event).__name__)
        if interrupt is not None:
            raise interrupt


def _check(event_type: object) -> None:
    if not (isinstance(event_type, type) and issubclass(event_type, Event) and event_type is not Event):
        raise TypeError(f"not an event type: {event_type!r}; use JobCompleted, JobFailed, BatchCompleted …")
