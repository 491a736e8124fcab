"""The user's processor: its methods, looked up once, and the call of the one that matters."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getattr_static
from typing import Any

from .foreign import type_name
from .protocols import Batch


class Processor:
    """The user's processor with its optional methods looked up once."""

    def __init__(self, given: Any) -> None:
        process = _attribute(given, "process")
        if process is None and callable(given) and not isinstance(given, type):
            process = given
        if not callable(process):
            raise TypeError(f"processor must have a method process(batch) or be a function, not {given!r}")
        self.process: Callable[[Any], Any] = process
        self.open: Callable[[], object] | None = _method(given, "open")
        self.close: Callable[[], object] | None = _method(given, "close")
        self.is_retryable: Callable[[BaseException], bool] | None = _method(given, "is_retryable")
        self.abandon: Callable[[Any], object] | None = _method(given, "abandon")
        self.is_unavailable: Callable[[BaseException], object] | None = _method(given, "is_unavailable")
        self.describe: Callable[[BaseException], object] | None = _method(given, "describe")


def _method(given: Any, name: str) -> Any:
    method = _attribute(given, name)
    if method is not None and not callable(method):
        raise TypeError(f"{name} of processor {given!r} must be a method, not {method!r}")
    return method


def _attribute(given: Any, name: str) -> Any:
    """None where it has none, also where its `__getattr__` says so with an error of its own."""
    try:
        return getattr(given, name, None)
    except Exception as error:
        if getattr_static(given, name, None) is None:
            return None
        raise TypeError(f"{name} of the processor, a {type_name(given)}, cannot be read: {type_name(error)}") from error


def call(process: Any, batch: Batch[Any]) -> tuple[Any, BaseException | None]:
    """What *process* returned, or what it raised.

    `map` runs it inside one C call: if an exception from outside arrives between its return and ours, the
    answer is in the list already and counts. A plain call would lose it and take a done batch for a failed one.
    """
    answer: list[Any] = []
    error: BaseException | None = None
    try:
        answer.extend(map(process, (batch,)))
    except BaseException as exc:
        error = exc
    if answer:
        return answer[0], None
    if error is None:
        # `map` takes a StopIteration for its own end.
        error = RuntimeError("the processor raised StopIteration")
    return None, error
