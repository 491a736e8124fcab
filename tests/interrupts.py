"""An exception at every point where the interpreter may raise one from a signal handler or another thread."""

from __future__ import annotations

import _weakrefset
import dis
import functools
import gc
import itertools
import opcode
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupt(BaseException):
    """Like a KeyboardInterrupt, and nobody else's."""


# The interpreter looks for something to raise after these instructions, and where a function begins. 3.10 does it
# after every jump that is taken.
_LOOKS = {
    number
    for name, number in opcode.opmap.items()
    if name.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD"))
    or (sys.version_info < (3, 11) and "JUMP" in name and name != "JUMP_FORWARD")
}
# ... and 3.10 does not before these, so that what was just entered or acquired can be protected.
_SHIELDED = {
    number
    for name, number in opcode.opmap.items()
    if sys.version_info < (3, 11) and name in ("SETUP_FINALLY", "SETUP_WITH", "BEFORE_ASYNC_WITH", "YIELD_FROM")
}


@functools.cache
def _protections(code: CodeType) -> list[tuple[int, int, int]]:
    """From, to and whereto of every `try` and `with`; 3.10 keeps them on a stack instead."""
    if sys.version_info < (3, 11):
        return []
    return [(entry.start, entry.end, entry.target) for entry in dis._parse_exception_table(code)]  # type: ignore[attr-defined]


def _protection(code: CodeType, offset: int) -> int | None:
    # The table is flat: each instruction stands in one entry at most, the innermost.
    return next((target for start, end, target in _protections(code) if start <= offset < end), None)


def _is_dropped(code: CodeType) -> bool:
    """Whether Python drops what it raises: finalisers and callbacks of weak references and collections, anywhere."""
    if code.co_name == "__del__":
        return True
    if code.co_filename in (weakref.__file__, _weakrefset.__file__):
        return code.co_name in ("_remove", "remove") or code is weakref.finalize.__call__.__code__
    return any(getattr(callback, "__code__", None) is code for callback in gc.callbacks)


def _without_a_trace(function: Callable[..., T]) -> Callable[..., T]:
    """What comes from outside leaves no frame behind; this one's looks like the interpreter's own."""
    nowhere = {**globals(), "__name__": "sys"}
    return FunctionType(function.__code__, nowhere, function.__name__)  # type: ignore[attr-defined, return-value]


class _Injector:
    """Raises `Interrupt` at the *n*-th such point of the calling thread, counted from 0."""

    def __init__(self, n: int) -> None:
        self._left = n
        self._last: dict[FrameType, int] = {}
        self._dropped: FrameType | None = None  # such a callback that is being run
        self.where = ""

    @_without_a_trace
    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            # Up to 3.12 an interruption right behind a handler's `acquire()` leaves its lock taken for ever, and every
            # thread that logs afterwards waits for it.
            if frame.f_globals.get("__name__") == "logging" or self._dropped is not None:
                return None
            if _is_dropped(frame.f_code):
                self._dropped = frame
                return self._until_it_returns
            # Python 3.13 takes the wish for opcodes only from a frame that is traced already.
            frame.f_trace = self
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        if event == "opcode":
            self._opcode(frame)
        elif event == "return":
            self._last.pop(frame, None)
        return self

    def _until_it_returns(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "return":
            self._dropped = None
        return self._until_it_returns

    @_without_a_trace
    def _opcode(self, frame: FrameType) -> None:
        code, offset = frame.f_code, frame.f_lasti
        before = self._last.get(frame)
        self._last[frame] = offset
        if code.co_code[offset] in _SHIELDED:
            return
        # The interpreter raises at the instruction after which it looks, a trace function only at the next one: where
        # that one is protected otherwise, it would be another experiment.
        if before is not None and (
            code.co_code[before] not in _LOOKS or _protection(code, before) != _protection(code, offset)
        ):
            return
        self._left -= 1
        if self._left == -1:
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            raise Interrupt(self.where)


def interrupted_everywhere(
    prepare: Callable[[], T], call: Callable[[T], object], step: int = 1
) -> Iterator[tuple[str, T]]:
    """Run *call* on what *prepare* makes again and again, interrupted *step* points later each time, until it ends.

    Yields, after each interruption, where it was and what was prepared. *call* must do the same every time.
    """
    for n in itertools.count(0, step):
        injector = _Injector(n)
        prepared = prepare()
        outer = sys.gettrace()
        # Python 3.12 traces opcodes only where a frame asked for it before `settrace`.
        sys._getframe().f_trace_opcodes = True
        # Nor does a collection, whose finalisers may be anybody's, fall into it.
        collects = gc.isenabled()
        gc.disable()
        sys.settrace(injector)
        try:
            call(prepared)
        except BaseException:
            # Sometimes it comes out as another: a `with` that was interrupted half-way fails to release its lock.
            if not injector.where:
                raise
        finally:
            sys.settrace(outer)
            if collects:
                gc.enable()
        if not injector.where:
            return
        yield injector.where, prepared


def bounded(call: Callable[[], object], seconds: float = 10.0) -> Any:
    """What *call* returns on a thread of its own; an AssertionError if it hangs."""
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert answer, "it hangs, or raised"
    return answer[0]
