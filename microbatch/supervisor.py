"""The thread that keeps deadlines: it sleeps to the nearest one and is woken only by an earlier one.

It ends overdue jobs while a worker is stuck, replaces a dead worker, sweeps dead jobs out of the queue, and says
when a shutdown is complete. It never blocks on a future's condition and runs no stranger's code but a processor's
`abandon` and the listeners of the last event. With nothing outstanding it does not wake.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from .collector import NEVER
from .core import Core, tell_contained
from .events import BatcherShutDown

_log = logging.getLogger("microbatch.supervisor")

# A future that somebody is just entering `concurrent.futures.wait` with is tried again so much later.
_SOON = 0.01
# A look at every outstanding job may take so much of the time, no more, however many deadlines there are.
_SHARE = 0.1
# How long a shutdown waits for the processor's `close` where there is no `delivery_timeout` to go by.
CLOSE_SECONDS = 10.0


class Supervisor:
    """One per batcher; `check` does everything that is due and is also driven without a thread in tests."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.thread = threading.current_thread()
        self._close_by = NEVER

    def run(self) -> None:
        """Until the shutdown is complete. An exception from outside is logged and survived."""
        while True:
            try:
                while self.check():
                    self._sleep()
                return
            except BaseException:
                _log.exception("%s was interrupted; it goes on", self.thread.name)

    def check(self) -> bool:
        """Do what is due and set `next_check`; False when the batcher is finished."""
        core = self.core
        self._bury_dead_workers()
        with core.lock:
            began = core.clock()
            jobs = list(core.outstanding.values())
            if began >= core.abandon_at:
                core.abandon_all()
            else:
                core.overdue(jobs, began)
            if core.intake.dead > len(core.outstanding):
                core.intake.sweep()
            nearest = min((job.deadline for job in jobs if job.verdict is None), default=NEVER)
            now = core.clock()
            nearest = max(nearest, now + (now - began) / _SHARE)
            if core.outstanding:
                nearest = min(nearest, core.abandon_at)
            core.next_check = min(nearest, self._close_by)
        self._abandon()
        if not core.settle_owed():
            with core.lock:
                core.next_check = min(core.next_check, core.clock() + _SOON)
        return not self._finish()

    def _sleep(self) -> None:
        core = self.core
        left = core.next_check - core.clock()
        try:
            if left == NEVER:
                core.alarm.get()
            elif left > 0:
                core.alarm.get(timeout=min(left, threading.TIMEOUT_MAX))
            while True:
                core.alarm.get_nowait()
        except queue.Empty:
            pass

    def _bury_dead_workers(self) -> None:
        core = self.core
        dead = [worker for worker in list(core.workers) if not worker.thread.is_alive()]
        for worker in dead:
            swept = worker.sweep()
            with core.lock:
                core.owed += swept
                core.workers.remove(worker)
                core.ready = False
            _log.error("%s is dead; %d of its jobs are unknown", worker.thread.name, len(swept))
        if dead and not (core.closed and not core.outstanding):
            try:
                core.start_threads()
            except RuntimeError:
                _log.exception("no thread can be started in its place; its jobs end at their deadlines")

    def _abandon(self) -> None:
        """Tell a processor that nobody waits any more for the batch it holds."""
        core = self.core
        if core.processor.abandon is None:
            return
        for worker in list(core.workers):
            batch = worker.batch
            if batch is not None and worker.stuck() and not worker.abandoned:
                worker.abandoned = True
                try:
                    core.processor.abandon(batch)
                except BaseException:
                    _log.exception("abandoning batch %s failed", batch.id)

    def _finish(self) -> bool:
        """Complete the shutdown once every job has its outcome and the last event is out."""
        core = self.core
        with core.lock:
            if not core.closed or core.outstanding or core.owed:
                return core.finished
            now = core.clock()
            if self._close_by == NEVER:
                self._close_by = now + (core.options.delivery_timeout or CLOSE_SECONDS)
            busy = core.telling or any(not worker.stuck() for worker in core.workers)
            if busy and now < self._close_by:
                core.next_check = min(core.next_check, self._close_by)
                return False
        finish(core)
        return True


def finish(core: Core) -> None:
    """Tell the last event, once, and let go who waits for the shutdown."""
    with core.lock:
        if core.finishing:
            return
        core.finishing = True
        counters = core.counters
        event = BatcherShutDown(counters.completed, counters.failed, counters.cancelled, counters.unknown)
    try:
        tell_contained(core.listeners, event)
    finally:
        with core.lock:
            core.finished = True
            closers: list[Any] = core.closers
            for token in closers:
                token.put(None)


def supervise(core: Core) -> None:
    """The thread's function: claim the place, or leave if it is taken."""
    supervisor = Supervisor(core)
    with core.lock:
        if core.finished or (core.supervisor is not None and core.supervisor.thread.is_alive()):
            return
        core.supervisor = supervisor
        core.own.add(threading.get_ident())
        core.threads_ready()
    try:
        supervisor.run()
    finally:
        # The next submit starts another one, should it ever come to that.
        core.ready = False
        core.own.discard(threading.get_ident())
