"""The thread that keeps deadlines: it sleeps to the nearest one and is woken only by an earlier one.

It ends overdue jobs while a worker is stuck, replaces a dead worker, sweeps dead jobs out of the queue, and says
when a shutdown is complete. It never blocks on a future's condition and runs no stranger's code but a processor's
`abandon` and the listeners of the last event. With nothing outstanding it does not wake.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import thread_time
from typing import Any

from .collector import NEVER
from .core import Core, DeathWatch
from .events import BatcherShutDown
from .logs import Log, name_thread
from .owed import abandon_all, overdue, settle_owed
from .telling import tell_contained

_log = Log("microbatch.supervisor")

# A future that somebody is just entering `concurrent.futures.wait` with is tried again so much later.
_SOON = 0.01
# Looks at every outstanding job may take so much of a processor, no more, however many deadlines there are ...
_SHARE = 0.1
# ... but for this no deadline is late by more.
_LATEST = 0.25
# How long a shutdown waits for the processor's `close` where there is no `delivery_timeout` to go by.
CLOSE_SECONDS = 10.0


class Supervisor:
    """One per batcher; `check` does everything that is due and is also driven without a thread in tests."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.thread = threading.current_thread()
        self.gone = False
        self._close_by = NEVER

    def claim(self) -> bool:
        """Take the place; False if it is taken, or if the shutdown is complete."""
        core = self.core
        with core.lock:
            if not core.finished and not core.supervised():
                core.supervisor = self
                core.own.add(threading.get_ident())
                core.threads_ready()
        return core.supervisor is self

    def run(self) -> None:
        """Until the shutdown is complete. An exception from outside is logged and survived."""
        while True:
            try:
                # A `for`: on every interpreter its jump back lies inside the `try`.
                for _ in iter(self._round, False):
                    pass
                return
            except BaseException:
                self.core.supervisor_setbacks.add()
                self._recover()
                _log.exception("%s was interrupted; it goes on", self.thread.name)
                self.core.supervisor_setbacks.pause()

    def _round(self) -> bool:
        # In a child forked on this thread another one has the place, or will have it.
        if not self.check() or self.core.supervisor is not self:
            return False
        self.core.supervisor_setbacks.forget()
        self._sleep()
        return True

    def _recover(self) -> None:
        core = self.core
        with core.lock:
            # A sweep may have been interrupted with a job in its hands.
            core.intake.rebuild(lambda: list(core.outstanding.values()))
            core.ring_worker()
        if core.finishing:
            _let_go(core)

    def check(self) -> bool:
        """Do what is due and set `next_check`; False when the batcher is finished."""
        core = self.core
        self._bury_dead_workers()
        with core.lock:
            core.next_check = NEVER  # so that what a finaliser submits in the middle of this rings
            now, spent = core.clock(), thread_time()
            jobs = list(core.outstanding.values())
            if jobs and now >= core.abandon_at:
                abandon_all(core)
            else:
                overdue(core, jobs, now)
            if core.intake.dead > (0 if core.blocked else len(core.outstanding)):
                core.intake.sweep()
                core.wake_blocked()
            nearest = min((job.deadline for job in jobs if job.verdict is None), default=NEVER)
            pause = min((thread_time() - spent) / _SHARE, _LATEST)
            nearest = max(nearest, core.clock() + pause)
            if core.outstanding:
                nearest = min(nearest, core.abandon_at)
            core.next_check = min(nearest, self._close_by)
        self._abandon()
        if not settle_owed(core):
            with core.lock:
                core.next_check = min(core.next_check, core.clock() + _SOON)
        return not self._finish()

    def _sleep(self) -> None:
        core = self.core
        core.alarm.take(core.next_check - core.clock())

    def _bury_dead_workers(self) -> None:
        core = self.core
        dead = [worker for worker in list(core.workers) if worker.gone]
        for worker in dead:
            swept = worker.sweep()
            with core.lock:
                core.owed.update(dict.fromkeys(swept, False))
                core.workers.remove(worker)
        if dead or core.short:
            core.replace_dead()
        for worker in dead:
            _log.error("%s is dead; another one takes its place", worker.thread.name)

    def _abandon(self) -> None:
        """Tell a processor that nobody waits any more for the batch it holds."""
        core = self.core
        belongings = core.pinned
        if belongings is None or belongings.processor.abandon is None:
            return
        for worker in list(core.workers):
            batch = worker.batch
            if batch is not None and worker.stuck() and not worker.abandoned:
                worker.abandoned = True
                try:
                    belongings.processor.abandon(batch)
                except BaseException:
                    _log.exception("abandoning batch %s failed", batch.id)

    def _finish(self) -> bool:
        """Complete the shutdown once every job has its outcome and every other event is out."""
        return finish(self.core, self._may_finish)

    def _may_finish(self) -> bool:
        """Under the lock."""
        core = self.core
        if not core.closed or core.outstanding or not all(core.owed.values()):
            return False
        now = core.clock()
        if self._close_by == NEVER:
            self._close_by = now + (core.options.delivery_timeout or CLOSE_SECONDS)
        unrest = core.owed or core.cancelling or core.unclosed()
        busy = unrest or any(not worker.stuck() for worker in core.workers)
        if busy and now < self._close_by:
            # The end of a `cancel` rings nobody: an interruption could swallow it.
            again = now + _SOON if core.cancelling else self._close_by
            core.next_check = min(core.next_check, again)
            return False
        return True


def finish(core: Core, may_finish: Callable[[], bool]) -> bool:
    """Tell the last event, once, and let go who waits for the shutdown; False if it is too early.

    Whether it is, and that it begins, is one section under the lock: a worker that comes back later tells nothing.
    """
    begun = False
    try:
        with core.lock:
            if core.finishing or not may_finish():
                return core.finishing
            counters = core.counters
            ends = (counters.completed, counters.failed, counters.cancelled, counters.unknown)
            event = BatcherShutDown(*ends, batcher=core.options.name)
            begun = core.finishing = True
        tell_contained(core.listeners, event)
    finally:
        if begun:
            _let_go(core)
    return True


def _let_go(core: Core) -> None:
    with core.lock:
        core.finished = True
        closers: list[Any] = core.closers
        for token in closers:
            token.put()


def supervise(core: Core, watch: DeathWatch) -> None:
    """The thread's function: claim the place, or leave if it is taken."""
    name_thread(core.options.name)
    try:
        supervisor = watch.holder = Supervisor(core)
        if supervisor.claim():
            core.supervisor_setbacks.pause()
            supervisor.run()
            # The next submit starts another one, should it ever come to that.
            core.ready = False
        watch.left = True
    except BaseException:
        _log.exception("%s died", threading.current_thread().name)
    finally:
        core.own.discard(threading.get_ident())
        watch.report()
        if core.short and (core.outstanding or core.owed):
            # Nobody else may be free to see to it: the workers may all be inside the processor.
            core.replace_dead()
