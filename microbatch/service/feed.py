"""What the dashboard shows of one process: fed by events, bounded, and read as plain data."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from microbatch.batcher import MicroBatcher
from microbatch.events import BatchCompleted, BatchFailed, BatchStarted, JobCancelled, JobCompleted, JobFailed

from .failures import UNKNOWN, failure_of

HISTORY = 180  # seconds
LATEST = 20  # batches, and failures

# Latencies are counted in classes, each so much wider than the one below, so that those of several processes add up.
GROWTH = 1.1
FLOOR = 1e-4  # seconds: the upper bound of class 0

# A look at the queue takes longer the longer the queue is, so a worker looks so often at most.
_LOOK = 0.25


@dataclass(slots=True)
class Second:
    """What happened in a second; *latencies* are how many jobs by class."""

    completed: int = 0
    failed: int = 0
    unknown: int = 0
    cancelled: int = 0
    batches: int = 0
    jobs: int = 0
    largest: int = 0
    queued: int = 0
    outstanding: int = 0
    latencies: dict[int, int] = field(default_factory=dict)

    def see(self, queued: int, outstanding: int) -> None:
        self.queued = max(self.queued, queued)
        self.outstanding = max(self.outstanding, outstanding)


class Feed:
    """Listens to *batcher*; every method may be called from any thread, and none blocks.

    A forked child begins with an empty one.
    """

    def __init__(self, batcher: MicroBatcher[Any, Any], clock: Callable[[], float] = time.time) -> None:
        self._stats = batcher.stats
        self._clock = clock
        self._by_process: dict[int, _Process] = {}
        batcher.on(JobCompleted, self._job_completed)
        batcher.on(JobFailed, self._job_failed)
        batcher.on(JobCancelled, self._job_cancelled)
        batcher.on(BatchStarted, self._batch_started)
        batcher.on(BatchCompleted, self._batch_completed)
        batcher.on(BatchFailed, self._batch_failed)

    def read(self, since: float = 0.0) -> dict[str, Any]:
        """Everything from second *since* on, newest last; batches and failures newest first."""
        stats = self._stats()
        here, now = self._here(), self._clock()
        with here.lock:
            here.second(now).see(stats.queued, stats.outstanding)
            return {
                "process": here.id,
                "now": now,
                "stats": asdict(stats),
                "seconds": [{"at": at, **asdict(second)} for at, second in here.seconds.items() if at >= since],
                "batches": list(here.batches),
                "failures": list(here.failures),
            }

    def _here(self) -> _Process:
        pid = os.getpid()
        return self._by_process.get(pid) or self._by_process.setdefault(pid, _Process())

    def _job_completed(self, event: JobCompleted) -> None:
        here, now = self._here(), self._clock()
        with here.lock:
            second = here.second(now)
            second.completed += 1
            _count(second, event.seconds)

    def _job_failed(self, event: JobFailed) -> None:
        here, now, failure = self._here(), self._clock(), failure_of(event.error)
        with here.lock:
            second = here.second(now)
            if failure.error == UNKNOWN:
                second.unknown += 1
            else:
                second.failed += 1
            _count(second, event.seconds)
            told = {"at": now, "job": event.job.id, "batch": event.batch_id, "attempt": event.attempt}
            here.failures.appendleft({**told, **failure.as_json()})

    def _job_cancelled(self, event: JobCancelled) -> None:
        here, now = self._here(), self._clock()
        with here.lock:
            here.second(now).cancelled += 1

    def _batch_started(self, event: BatchStarted) -> None:
        here, now = self._here(), self._clock()
        with here.lock:
            here.second(now).see(0, event.size)
            if not here.may_look(now):
                return
        stats = self._stats()
        with here.lock:
            here.second(now).see(stats.queued, stats.outstanding)

    def _batch_completed(self, event: BatchCompleted) -> None:
        self._batch(event, event.failed, "completed")

    def _batch_failed(self, event: BatchFailed) -> None:
        self._batch(event, 0, "failed")

    def _batch(self, event: BatchCompleted | BatchFailed, failed: int, outcome: str) -> None:
        here, now = self._here(), self._clock()
        told = {"at": now, "id": event.batch_id, "size": event.size, "attempt": event.attempt}
        with here.lock:
            second = here.second(now)
            second.batches += 1
            second.jobs += event.size
            second.largest = max(second.largest, event.size)
            here.batches.appendleft(
                {**told, "trigger": event.trigger, "outcome": outcome, "failed": failed, "seconds": event.seconds}
            )


class _Process:
    """What one process knows; used under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.id = secrets.token_hex(4)
        self.seconds: OrderedDict[int, Second] = OrderedDict()
        self.batches: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self.failures: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self.looked = -math.inf

    def second(self, now: float) -> Second:
        """The one that is counted in; an older one is kept open where the clock was set back."""
        newest = next(reversed(self.seconds), None)
        at = int(now) if newest is None else max(int(now), newest)
        found = self.seconds.get(at)
        if found is None:
            found = self.seconds[at] = Second()
            while next(iter(self.seconds)) <= at - HISTORY:
                self.seconds.popitem(last=False)
        return found

    def may_look(self, now: float) -> bool:
        if 0 <= now - self.looked < _LOOK:
            return False
        self.looked = now
        return True


def _count(second: Second, seconds: float) -> None:
    number = max(0, math.ceil(math.log(max(seconds, FLOOR) / FLOOR, GROWTH)))
    second.latencies[number] = second.latencies.get(number, 0) + 1
