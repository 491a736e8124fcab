"""Job ids: which future an id means, for outstanding jobs and for a bounded history of finished ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from .job import JobFuture, JobStatus

Futures = dict[str, JobFuture[Any]]


class Registry:
    """Id to future, per process. Every method is called under the batcher's lock.

    Args:
        history: how many finished jobs are remembered; 0 remembers none.
        ttl: for how many seconds.
    """

    def __init__(self, history: int, ttl: float) -> None:
        self._history = history
        self._ttl = ttl
        self.live: Futures = {}
        self._finished: OrderedDict[str, tuple[float, JobFuture[Any]]] = OrderedDict()

    def find(self, job_id: str, now: float) -> JobFuture[Any] | None:
        future = self.live.get(job_id)
        if future is not None:
            return future
        self._forget_expired(now)
        entry = self._finished.get(job_id)
        return None if entry is None else entry[1]

    def taken(self, job_id: str, now: float) -> JobFuture[Any] | None:
        """The future that a new job with this id must share; after failed or cancelled the id is free."""
        future = self.find(job_id, now)
        if future is not None and future.done() and future.status in (JobStatus.FAILED, JobStatus.CANCELLED):
            return None
        return future

    def finish(self, job_id: str, future: JobFuture[Any], now: float) -> None:
        """Move an id to the history; the oldest ones leave."""
        # It may be another job's by now: the holder of a future can say that it failed before its job ended.
        if self.live.get(job_id) is future:
            del self.live[job_id]
        if self._history:
            self._finished.pop(job_id, None)
            self._finished[job_id] = (now + self._ttl, future)
            while len(self._finished) > self._history:
                self._finished.popitem(last=False)
        self._forget_expired(now)

    def _forget_expired(self, now: float) -> None:
        # Entries are in order of their expiry: all have the same time to live.
        while self._finished:
            job_id, (expires, _) = next(iter(self._finished.items()))
            if expires > now:
                return
            self._finished.pop(job_id, None)
