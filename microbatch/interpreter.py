"""Everything private that the library leans on, each with its guard and its fall-back.

===============================================  =======================================  ========================
private thing                                    why                                      fall-back
===============================================  =======================================  ========================
attributes and states of `Future` (see below)    a `Condition` nobody waits on is half    `JobFuture` keeps what it
                                                 of a future's price                      inherits
`threading._register_atexit`                     runs in `multiprocessing` children, and  `multiprocessing.util.
                                                 before threads can no longer be started  Finalize`
`_is_owned`, `_release_save`,                    a condition that *is* its lock is        a stdlib `Condition`
`_acquire_restore` of the C `RLock`              entered in C
===============================================  =======================================  ========================

`tests/test_interpreter.py` fails on an interpreter that changes one of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
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


_RLock: Any = type(threading.RLock())


def rlock_is_known() -> bool:
    """Whether the interpreter's `RLock` is the C type that a `Condition` can borrow from."""
    return _RLock.__module__ == "_thread" and all(
        hasattr(_RLock, name) for name in ("_is_owned", "_release_save", "_acquire_restore")
    )


if TYPE_CHECKING or not rlock_is_known():
    FutureCondition = threading.Condition
else:

    class FutureCondition(_RLock):  # type: ignore[no-redef]
        """A `Condition` that is its own lock.

        The stdlib's `Condition` is entered by a Python function: an exception raised there by a signal
        handler loses the lock for ever, and with it the worker that resolves the future. This one is entered in C.
        """

        __slots__ = ("_waiters",)

        def __init__(self) -> None:
            self._waiters: deque[Any] = deque()

        wait = threading.Condition.wait
        wait_for = threading.Condition.wait_for
        notify = threading.Condition.notify
        notify_all = threading.Condition.notify_all


def call_before_threads_end(function: Callable[[], None]) -> None:
    """Have *function* called at exit while threads still run, in `multiprocessing` children too."""
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        from multiprocessing.util import Finalize

        Finalize(None, function, exitpriority=100)
        return
    try:
        register(function)
    except RuntimeError:
        # The interpreter is going down already; the ordinary atexit hook is what is left.
        pass
