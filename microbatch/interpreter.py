"""Everything private that the library leans on, each with its guard and its fall-back.

===============================================  =======================================  ========================
private thing                                    why                                      fall-back
===============================================  =======================================  ========================
attributes and states of `Future` (see below),   a `Condition` nobody waits on is half    `JobFuture` keeps what it
`event` and `finished_futures` of its waiters    of a future's price                      inherits
`threading._register_atexit`                     runs in `multiprocessing` children, and  `multiprocessing.util.
                                                 before threads can no longer be started  Finalize`
`_is_owned`, `_release_save` (by any thread),    a future that an interrupted `wait`      a stdlib `Condition`
`_acquire_restore` of the C `RLock`,             left locked would hang the worker
`sys._getframe`, `_waiters` of a `Condition`,
`clear` of a frame that is executed
`MADV_WIPEONFORK` of Linux, by its number        a call of the system for the pid is a    `os.getpid`
                                                 tenth of a submit
===============================================  =======================================  ========================

`tests/test_interpreter.py` fails on an interpreter that changes one of them.
"""

from __future__ import annotations

import mmap
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import compress
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

PENDING = "PENDING"
RUNNING = "RUNNING"
CANCELLED = "CANCELLED"
CANCELLED_AND_NOTIFIED = "CANCELLED_AND_NOTIFIED"
FINISHED = "FINISHED"

_FUTURE_ATTRIBUTES = {"_condition", "_state", "_result", "_exception", "_waiters", "_done_callbacks"}


def future_is_known() -> bool:
    """Whether `Future` keeps its state where `JobFuture` expects it."""
    future: Future[None] = Future()
    if set(vars(future)) != _FUTURE_ATTRIBUTES or vars(future)["_state"] != PENDING:
        return False
    future.set_running_or_notify_cancel()
    if vars(future)["_state"] != RUNNING:
        return False
    future.set_result(None)
    cancelled: Future[None] = Future()
    cancelled.cancel()
    before = vars(cancelled)["_state"]
    cancelled.set_running_or_notify_cancel()
    states = (vars(future)["_state"], before, vars(cancelled)["_state"])
    return states == (FINISHED, CANCELLED, CANCELLED_AND_NOTIFIED) and hasattr(Future, "_invoke_callbacks")


def stdlib_queue() -> ModuleType:
    """The stdlib's `queue`; a copy of it where other classes stand in the places of its own, as gevent has it.

    The library leans on the hooks of those classes. `Full` and `Empty` stay the ones that everybody catches.
    """
    if queue.Queue.__module__ == "queue":
        return queue
    from importlib.util import find_spec, module_from_spec

    spec = find_spec("queue")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(Full=queue.Full, Empty=queue.Empty)
    return module


_RLock: Any = type(threading.RLock())


def rlock_is_known() -> bool:
    """Whether the interpreter's `RLock` is the C type that a `Condition` can borrow from, and calls can be watched."""
    methods = ("_is_owned", "_release_save", "_acquire_restore")
    return (
        _RLock.__module__ == "_thread"
        and all(hasattr(_RLock, name) for name in methods)
        and hasattr(sys, "_getframe")
        and _is_over(_some_call())
        and not _is_over(sys._getframe())
    )


def _some_call() -> FrameType:
    return sys._getframe()


def _is_over(call: FrameType) -> bool:
    """Whether no thread is inside *call* any more; its local variables are dropped then."""
    # Not by a look at the threads' stacks: on Python 3.11 that is no safe thing while they run.
    try:
        call.clear()
    except RuntimeError:
        return False
    return True


# Who finds the condition locked looks after so many seconds whether it is still locked for somebody.
_FIRST_ROUND, _ROUND = 0.001, 0.05
_acquire, _exit = _RLock.acquire, _RLock.__exit__

if TYPE_CHECKING or not rlock_is_known():
    FutureCondition = threading.Condition
else:

    class FutureCondition(_RLock):  # type: ignore[no-redef]
        """A `Condition` that comes free when the function calls that locked it are over.

        `concurrent.futures.wait` and `as_completed` lock one future after the other, in Python code. An exception
        raised there by a signal handler leaves some locked for ever, and would hang the worker that resolves them.
        """

        __slots__ = ("_holds", "_waiters")

        def __init__(self) -> None:
            self._waiters: list[Any] = []
            # The running call that it is locked for, once for each time; the object tells two of them apart.
            self._holds: list[tuple[FrameType, object]] = []

        def acquire(self, blocking: bool = True) -> bool:
            hold, holds = (_caller(sys._getframe(1)), object()), self._holds
            # Locked and noted inside one call of C: no exception from outside gets in between.
            holds.extend(compress((hold,), map(_acquire, (self,), (False,))))
            return hold in holds or self._acquire_slowly(hold, blocking)

        def release(self, *exc_info: object) -> None:
            if not self._is_owned():
                raise RuntimeError("cannot release un-acquired lock")
            # Struck out and released likewise.
            deque(map(_exit, (self,), map(self._holds.pop, (-1,))), 0)

        __enter__ = acquire
        __exit__ = release

        wait = threading.Condition.wait
        wait_for = threading.Condition.wait_for
        notify = threading.Condition.notify
        notify_all = threading.Condition.notify_all

        def _acquire_slowly(self, hold: tuple[FrameType, object], blocking: bool) -> bool:
            holds, timeout = self._holds, _FIRST_ROUND if blocking else -1
            while True:
                holds.extend(compress((hold,), map(_acquire, (self,), (blocking,), (timeout,))))
                if hold in holds:
                    return True
                # Only now, for somebody else's moment with it is over before a round is.
                if self._free_if_lost():
                    continue
                if not blocking:
                    return False
                timeout = _ROUND

        def _free_if_lost(self) -> bool:
            holds = self._holds[:]
            if not holds or not all(_is_over(call) for call, _ in holds):
                return False
            try:
                # Nothing can happen between the comparison and the release, so nobody else's hold is lost.
                if self._holds == holds:
                    self._release_save()
                    for hold in holds:
                        self._holds.remove(hold)
            except RuntimeError:
                pass  # Another thread has freed it.
            return True


def _caller(frame: FrameType) -> FrameType:
    """For whom *frame* locks: an `__enter__` does it for the function with the `with`."""
    while frame.f_code.co_name == "__enter__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


class Bell:
    """An `Event` that an interrupt cannot break: `set` never blocks.

    The stdlib's is entered through a Python function, and an exception raised there by a signal handler leaves it
    locked for ever, and with it the worker that sets it.
    """

    __slots__ = ("_rung", "sleepers")

    def __init__(self) -> None:
        self._rung = False
        self.sleepers: list[Any] = []

    def is_set(self) -> bool:
        return self._rung

    def set(self) -> None:
        self._rung = True
        for sleeper in self.sleepers[:]:
            try:
                sleeper.release()
            except RuntimeError:
                pass  # woken already

    def clear(self) -> None:
        self._rung = False

    def wait(self, timeout: float | None = None) -> bool:
        sleeper = threading.Lock()
        sleeper.acquire()
        # Listed first, looked at second: whoever rings later finds it.
        self.sleepers.append(sleeper)
        try:
            if self._rung or timeout is None:
                return self._rung or sleeper.acquire()
            return sleeper.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX))
        finally:
            try:
                self.sleepers.remove(sleeper)
            except ValueError:
                pass


class _ByNumber:
    """A mark of this process by its number: a call of the system for every look."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _: int) -> bool:
        return self._pid == os.getpid()


# The number that Linux gives to it; the module's constant came with Python 3.14.
_WIPE_ON_FORK = 18


def process_mark() -> Any:
    """Something whose `[0]` is true in this process, and false in one that is forked from it."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (AttributeError, OSError, TypeError):
        return _ByNumber()
    try:
        # An emulated kernel may say yes to everything, and wipe nothing.
        page.madvise(-1)
        return _ByNumber()
    except (AttributeError, OSError):
        pass
    try:
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, OSError):
        return _ByNumber()
    page[0] = 1
    return page


class Token:
    """A wake-up for one sleeper: put before the sleep it is not lost, and a second one is the same one.

    Not a `SimpleQueue`: where the seconds of its `get` are over before it sleeps, it sleeps for ever (CPython 3.10 to
    3.13).
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()  # taken while there is no token
        self._lock.acquire()

    def is_put(self) -> bool:
        return not self._lock.locked()

    def put(self) -> None:
        """Never blocks; safe in finalisers and signal handlers."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # there is one already

    def take(self, seconds: float | None = None) -> bool:
        """Sleep until there is one, and take it; False if there is none within *seconds*."""
        if seconds is None or seconds > threading.TIMEOUT_MAX:
            return self._lock.acquire()
        return self._lock.acquire(timeout=max(seconds, 0.0))


class Waiters(list[Any]):
    """The calls of `wait` and `as_completed` that wait for a future: each gets a `Bell` for its `Event`."""

    def append(self, waiter: Any) -> None:
        if type(getattr(waiter, "event", None)) is threading.Event:
            waiter.event = Bell()
        super().append(waiter)


def call_before_threads_end(function: Callable[[], None]) -> None:
    """Have *function* called at exit while threads still run, in `multiprocessing` children too."""
    # Imported first, because hooks run in reverse: the one of this module forbids every executor new work, and the
    # processor may need one until everything is drained.
    import concurrent.futures.thread  # noqa: F401

    register = getattr(threading, "_register_atexit", None)
    if register is None:
        from multiprocessing.util import Finalize, register_after_fork

        def finalize(function: Callable[[], None]) -> None:
            Finalize(None, function, exitpriority=100)

        finalize(function)
        # A forked child begins with none.
        register_after_fork(function, finalize)
        return
    try:
        register(function)
    except RuntimeError:
        # The interpreter is going down already; the ordinary atexit hook is what is left.
        pass


def in_multiprocessing_child() -> bool:
    """Whether this process may end without `atexit`, as the forked ones do."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None
