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
`_started` of a `Thread`, and what `threading`   a fork by a signal handler in the        what `Thread` has
calls it with in a child, `_at_fork_reinit`      middle of a thread's start
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
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import compress, repeat
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


# The conditions that a thread has locked, or is about to, by its ident; what an exception left there is not locked.
_Mine = dict[object, tuple[Any, FrameType]]
_Hold = tuple[FrameType, object, _Mine]
_mine: dict[int, _Mine] = {}


def holds_condition() -> bool:
    """Whether this thread is below a moment in which it has locked the condition of a future."""
    mine = _mine.get(threading.get_ident())
    return bool(mine) and _holds_any(mine)  # type: ignore[arg-type]


def _holds_any(mine: _Mine) -> bool:
    held = False
    for key, (condition, call) in list(mine.items()):
        if condition._is_owned() and not condition._free_if_lost():
            held = True
        elif _is_over(call):
            mine.pop(key, None)
    return held


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
            # The running call that it is locked for, once for each time; the object tells two of them apart. And the
            # conditions of the thread.
            self._holds: list[_Hold] = []

        def acquire(self, blocking: bool = True) -> bool:
            mine = _mine.setdefault(threading.get_ident(), {})
            hold, holds = (_caller(sys._getframe(1)), object(), mine), self._holds
            # Before it is locked: a signal handler may want to know as soon as it is.
            mine[hold[1]] = self, hold[0]
            # Locked and noted inside one call of C: no exception from outside gets in between.
            holds.extend(compress((hold,), map(_acquire, (self,), (False,))))
            if hold in holds or self._acquire_slowly(hold, blocking):
                return True
            del mine[hold[1]]
            return False

        def release(self, *exc_info: object) -> None:
            if not self._is_owned():
                raise RuntimeError("cannot release un-acquired lock")
            _, key, mine = self._holds[-1]
            # Struck out and released likewise.
            deque(map(_exit, (self,), map(self._holds.pop, (-1,))), 0)
            mine.pop(key, None)

        __enter__ = acquire
        __exit__ = release

        wait = threading.Condition.wait
        wait_for = threading.Condition.wait_for
        notify = threading.Condition.notify
        notify_all = threading.Condition.notify_all

        def _acquire_slowly(self, hold: _Hold, blocking: bool) -> bool:
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
            if not holds or not all(_is_over(call) for call, _, _ in holds):
                return False
            try:
                # Nothing can happen between the comparison and the release, so nobody else's hold is lost.
                if self._holds == holds:
                    self._release_save()
                    for hold in holds:
                        self._holds.remove(hold)
                        hold[2].pop(hold[1], None)
            except RuntimeError:
                pass  # Another thread has freed it.
            return True


def free_in_child(condition: Any) -> Any:
    """In a forked child: *condition*, free but for this thread; another one if it is None, or cannot be freed."""
    if condition is None:
        return FutureCondition()
    if condition.acquire(False):
        condition.release()
        return condition
    try:
        # Held by a thread that does not exist here; this one may be waiting for it.
        condition._release_save()
        condition._holds.clear()
    except (AttributeError, RuntimeError):
        return FutureCondition()
    return condition


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


class WaitersBell(Bell):
    """The `Event` of a call of `wait` or `as_completed`. Before it sleeps it asks those whose futures it waits for."""

    __slots__ = ("before",)

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Callable[[float | None], None]] = []

    def wait(self, timeout: float | None = None) -> bool:
        if not self._rung:
            for ask in self.before[:]:
                ask(timeout)
        return super().wait(timeout)


class Waiters(list[Any]):
    """The calls of `wait` and `as_completed` that wait for a future: each gets a bell for its `Event`.

    *before_wait* is asked before one of them sleeps, and may raise.
    """

    def __init__(self, before_wait: Callable[[float | None], None] | None = None) -> None:
        super().__init__()
        self._before_wait = before_wait

    def append(self, waiter: Any) -> None:
        if type(getattr(waiter, "event", None)) is threading.Event:
            waiter.event = WaitersBell()
        before = getattr(getattr(waiter, "event", None), "before", None)
        if before is not None and self._before_wait is not None and self._before_wait not in before:
            before.append(self._before_wait)
        super().append(waiter)


class Started(Bell):
    """A thread's own `Event` that says it runs, in a place where a signal handler may fork.

    In the child that thread does not exist, and who has started it must not wait for it for ever. `threading` renews
    there the locks of every thread that it knows, also of those that are still to be started.
    """

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        super().__init__()
        self._runs = False

    def is_set(self) -> bool:
        return self._runs

    def set(self) -> None:
        self._runs = True
        super().set()

    def _at_fork_reinit(self) -> None:
        super().set()


def start_thread(thread: threading.Thread) -> None:
    """Start it; neither an interruption nor a fork in the middle lets anything wait for ever."""
    if type(getattr(thread, "_started", None)) is threading.Event and threading.Event.__module__ == "threading":
        thread._started = Started()  # type: ignore[attr-defined]
    thread.start()


# Called before the locks of one process are looked at in another one: a lock that is waited for too long is another
# thread's in the child, and given up there.
_FORK_PATIENCE = 1.0
_release = _RLock.release


def take_all(locks: Iterable[Any]) -> list[Any]:
    """Lock *locks*, RLocks all of them, before a fork; those that come free in time. For `let_go`."""
    taken: list[Any] = []
    for lock in locks:
        # Taken and noted inside one call of C, as above.
        taken.extend(compress((lock,), map(lock.acquire, (True,), (_FORK_PATIENCE,))))
    return taken


def let_go(taken: list[Any]) -> None:
    deque(map(_release, map(taken.pop, repeat(-1, len(taken)))), 0)


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
