"""The life of threads in a process: started before the first acceptance, drained at interpreter exit."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError

from .collector import NEVER
from .core import Core, DeathWatch, living_cores
from .interpreter import Token, call_before_threads_end, in_multiprocessing_child, start_thread
from .job import Job
from .logs import Log
from .supervisor import CLOSE_SECONDS, finish, supervise
from .worker import work

_log = Log("microbatch")

# After its deadline a shutdown waits so much longer for the supervisor to end what is left.
_GRACE = 0.5
# A job that has lost its future is looked at again so much later.
_AGAIN = 0.01
# A thread that is just being started is looked at again so much later, so often.
_STARTING = 0.01
_LOOKS = 100
# So often a hook takes no notice of a signal handler that exits.
_EXITS = 100


def start_threads(core: Core) -> None:
    """Start what is missing. Outside every lock: a finaliser that submits may run inside `Thread.start`.

    The threads claim their places themselves, so two starters at once, or an interrupted one, leave nothing
    behind but a surplus thread that ends at once.

    Raises:
        RuntimeError: no thread can be started, and there is none yet.
    """
    missing = core.options.max_concurrent_batches - len(core.workers)
    try:
        if not core.supervised():
            _start(core, supervise, "supervisor")
        for number in range(missing):
            _start(core, work, f"worker-{len(core.workers) + number}")
    except RuntimeError:
        if not core.workers:
            raise


def _start(core: Core, target: object, role: str) -> None:
    name = f"{core.options.name}-{role}"
    start_thread(threading.Thread(target=target, args=(core, DeathWatch(core)), name=name, daemon=True))  # type: ignore[arg-type]


def wait_for_all(jobs: list[Job], timeout: float | None) -> bool:
    """Whether all *jobs* have an outcome and their futures are resolved, within *timeout* seconds."""
    give_up = NEVER if timeout is None else time.monotonic() + timeout
    for job in jobs:
        if not job.future.done():
            try:
                job.future.exception(None if timeout is None else max(0.0, give_up - time.monotonic()))
            except FutureTimeoutError:
                return False
            except CancelledError:
                pass
        # Where its holder has ended the future, the job goes on, and nothing tells of its end.
        while job.verdict is None:
            if (left := give_up - time.monotonic()) <= 0:
                return False
            Token().take(min(left, _AGAIN))
    return True


def wait_for_finish(core: Core, timeout: float | None) -> bool:
    """Wait until the shutdown is complete, a little past *timeout* for those it ends there."""
    give_up = NEVER if timeout is None else time.monotonic() + timeout + _GRACE
    token = Token()
    core.forget_own_cancels()
    with core.lock:
        if core.finished:
            return True
        core.closers.append(token)
    finish_without_threads(core)
    # Another thread may be doing so, and still in a listener.
    while not core.finished and (left := give_up - time.monotonic()) > 0:
        if core.short:
            # Nobody else may be left to see to it.
            core.replace_dead()
        token.take(left)
        # In a child that a signal handler forked meanwhile there is no one else.
        finish_without_threads(core)
    # Under the lock: whoever has completed the shutdown is out of there. The interpreter may stop that thread any
    # moment now, and a finaliser would wait for the lock for ever.
    with core.lock:
        return core.finished


def bound_of_shutdown(core: Core) -> float:
    """Seconds for a shutdown that has none, where jobs without a deadline may be tried again for ever."""
    retry = core.options.retry
    with core.lock:
        deadlines = [job.deadline for job in list(core.outstanding.values())]
    if retry is None or retry.max_attempts is not None or NEVER not in deadlines:
        return NEVER
    # Those that have a deadline end there, and not as undelivered ones.
    latest = max((deadline for deadline in deadlines if deadline != NEVER), default=-NEVER)
    return max(CLOSE_SECONDS, latest - core.clock() + _GRACE)


def finish_without_threads(core: Core) -> None:
    """Complete the shutdown on this thread if the batcher never had one of its own."""
    if core.supervisor is not None:
        return
    ident = threading.get_ident()
    borrowed = ident in core.own
    try:
        # For that time: a listener of the last event that closes again must not wait for itself.
        core.own.add(ident)
        finish(core, lambda: core.supervisor is None and not _needs_threads(core))
    finally:
        if not borrowed:
            core.own.discard(ident)


def _needs_threads(core: Core) -> bool:
    """Whether threads have something to do here, and so are at least on their way."""
    return bool(core.outstanding or core.workers or core.owed or core.cancelling)


# The end of this process, from the first hook on: since when, and who had jobs then. One bound serves both hooks.
_end_began: float | None = None
_had_jobs: weakref.WeakSet[Core] = weakref.WeakSet()


def _flush_before_threads_end() -> None:
    """The early hook: other threads may still submit, so it only flushes."""
    _whoever_exits(_flush)
    if in_multiprocessing_child():
        _close_after_other_threads()


def _whoever_exits(step: Callable[[], None]) -> None:
    """Take *step* to its end, or begin it again: a signal handler's SystemExit asks for nothing but the end of a
    process that is ending already. A KeyboardInterrupt passes, for it is the user's impatience.
    """
    for _ in range(_EXITS):
        try:
            step()
            return
        except SystemExit:
            pass


def _flush() -> None:
    waiting = [(core, core.flush_open_batch()) for core in _cores_at_end() if core.outstanding]
    for core, jobs in waiting:
        wait_for_all(jobs, _time_left(core))


def _close_after_other_threads() -> None:
    """Such a child ends without `atexit`, once the last thread that is no daemon has ended."""
    if not _other_threads():
        _close_at_exit()
        return
    started = Token()
    try:
        # By a thread that no Ctrl-C reaches: one that arrives inside `Thread.start` lets the new thread hang in there
        # for ever, and with it a process that waits for it.
        threading.Thread(target=_start_joiner, args=(started,), name="microbatch-exit", daemon=True).start()
        started.take(CLOSE_SECONDS)
    except RuntimeError:
        pass


def _start_joiner(started: Token) -> None:
    try:
        threading.Thread(target=_join_and_close, name="microbatch-exit", daemon=False).start()
    except RuntimeError:
        pass
    finally:
        started.put()


def _join_and_close() -> None:
    looks = _LOOKS
    while looks and (others := _other_threads()):
        for thread in others:
            try:
                thread.join()
            except RuntimeError:
                # It is just being started and cannot be waited for yet, or an interruption left it so for ever.
                threading.Event().wait(_STARTING)
                looks -= 1
    _close_at_exit()


def _other_threads() -> list[threading.Thread]:
    mine = (threading.main_thread(), threading.current_thread())
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in mine]


def _close_at_exit() -> None:
    """The late hook: nothing submits any more."""
    _whoever_exits(_close)


def _close() -> None:
    open_cores = [core for core in _cores_at_end() if not core.finished]
    for core in open_cores:
        core.close(core.clock() + _time_left(core))
    for core in open_cores:
        finished = wait_for_finish(core, max(0.0, core.abandon_at - core.clock()))
        left = len(core.undelivered)
        if left or not finished:
            _log.of(core.options.name).warning("%d jobs undelivered at exit", left)
        elif core in _had_jobs:
            _log.of(core.options.name).info("drained at exit")


def _cores_at_end() -> list[Core]:
    global _end_began
    if _end_began is None:
        _end_began = time.monotonic()
    found = []
    for core in living_cores():
        try:
            core.check_process()
        except Exception:
            _log.of(core.options.name).exception("it is of another process")
            continue
        found.append(core)
        if core.outstanding:
            _had_jobs.add(core)
    return found


def _time_left(core: Core) -> float:
    """What remains of the bound, which counts from the beginning of the end or from the last submit after it."""
    assert _end_began is not None
    timeout = core.options.delivery_timeout
    bound = CLOSE_SECONDS if timeout is None else timeout
    with core.lock:
        submits = [job.submitted for job in list(core.outstanding.values())]
    return max(0.0, max([_end_began, *submits]) + bound - time.monotonic())


call_before_threads_end(_flush_before_threads_end)
atexit.register(_close_at_exit)
