"""The life of threads in a process: started before the first acceptance, drained at interpreter exit."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import Empty, SimpleQueue

from .collector import NEVER
from .core import Core, cores
from .interpreter import call_before_threads_end
from .job import JobFuture
from .supervisor import CLOSE_SECONDS, finish, supervise
from .worker import work

_log = logging.getLogger("microbatch")

# After its deadline a shutdown waits so much longer for the supervisor to end what is left.
_GRACE = 0.5


def start_threads(core: Core) -> None:
    """Start what is missing. Outside every lock: a finaliser that submits may run inside `Thread.start`.

    The threads claim their places themselves, so two starters at once, or an interrupted one, leave nothing
    behind but a surplus thread that ends at once.

    Raises:
        RuntimeError: no thread can be started, and there is none yet.
    """
    missing = core.options.max_concurrent_batches - len(core.workers)
    try:
        if core.supervisor is None or not core.supervisor.thread.is_alive():
            _start(core, supervise, "supervisor")
        for number in range(missing):
            _start(core, work, f"worker-{len(core.workers) + number}")
    except RuntimeError:
        if not core.workers:
            raise


def _start(core: Core, target: object, role: str) -> None:
    name = f"{core.options.name}-{role}"
    threading.Thread(target=target, args=(core,), name=name, daemon=True).start()  # type: ignore[arg-type]


def wait_for_all(futures: list[JobFuture[object]], timeout: float | None) -> bool:
    """Whether all *futures* are resolved within *timeout* seconds."""
    give_up = NEVER if timeout is None else time.monotonic() + timeout
    for future in futures:
        if not future.done():
            try:
                future.exception(None if timeout is None else max(0.0, give_up - time.monotonic()))
            except FutureTimeoutError:
                return False
            except CancelledError:
                pass
    return True


def wait_for_finish(core: Core, timeout: float | None) -> bool:
    """Wait until the shutdown is complete, a little past *timeout* for those it ends there."""
    token: SimpleQueue[None] = SimpleQueue()
    with core.lock:
        if core.finished:
            return True
        core.closers.append(token)
    if not finish_without_threads(core):
        try:
            token.get(timeout=None if timeout is None else min(timeout + _GRACE, threading.TIMEOUT_MAX))
        except Empty:
            pass
    return core.finished


def finish_without_threads(core: Core) -> bool:
    """Complete the shutdown on this thread if the batcher never had one of its own."""
    with core.lock:
        if core.supervisor is not None or core.outstanding or core.workers:
            return False
    finish(core)
    return True


def _exit_bound(core: Core) -> float:
    timeout = core.options.delivery_timeout
    return CLOSE_SECONDS if timeout is None else timeout


def _busy() -> list[Core]:
    return [core for core in list(cores) if core.outstanding]


def _flush_before_threads_end() -> None:
    """The early hook: other threads may still submit, so it only flushes. A `multiprocessing` child has no other."""
    waiting = [(core, core.flush_open_batch()) for core in _busy()]
    began = time.monotonic()
    for core, futures in waiting:
        wait_for_all(futures, max(0.0, began + _exit_bound(core) - time.monotonic()))


def _close_at_exit() -> None:
    """The late hook: nothing submits any more."""
    busy = _busy()
    began = time.monotonic()
    open_cores = [core for core in list(cores) if not core.finished]
    for core in open_cores:
        core.close(core.clock() + _exit_bound(core))
    for core in open_cores:
        finished = wait_for_finish(core, max(0.0, began + _exit_bound(core) - time.monotonic()))
        if core in busy:
            left = len(core.undelivered)
            _log.info(
                "%s drained at exit: %s",
                core.options.name,
                "complete" if finished and not left else f"{left} jobs left",
            )


call_before_threads_end(_flush_before_threads_end)
atexit.register(_close_at_exit)
