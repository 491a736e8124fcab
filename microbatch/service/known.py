"""What one process knows of its own jobs: those under way, and a bounded number of the finished."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from microbatch.job import JobFuture, JobStatus


@dataclass(frozen=True, slots=True)
class Ticket:
    """One accepted job."""

    id: str
    future: JobFuture[str]
    client: str


@dataclass(frozen=True, slots=True)
class Request:
    """What was accepted under one key; *tickets* None while it is being accepted."""

    fingerprint: bytes
    tickets: tuple[Ticket, ...] | None


class Known:
    """Of one process and not of its children; every method may be called from any thread, and none blocks.

    Args:
        history: how many finished jobs, and how many keys, are remembered.
        ttl: for how many seconds.
    """

    def __init__(self, history: int, ttl: float) -> None:
        self._history = history
        self._ttl = ttl
        # Guards everything below.
        self._lock = threading.Lock()
        self._live: dict[str, Ticket] = {}
        self._finished: OrderedDict[str, tuple[float, Ticket]] = OrderedDict()
        self._requests: OrderedDict[bytes, tuple[float, Request]] = OrderedDict()
        self._clients: Counter[str] = Counter()

    def add(self, ticket: Ticket) -> None:
        """Remember a job, which is counted for its client already, from its acceptance on."""
        with self._lock:
            self._live[ticket.id] = ticket
        ticket.future.add_done_callback(lambda _: self.finish(ticket))

    def finish(self, ticket: Ticket) -> None:
        """Its future is done. Called by the future, and by whoever tells the client of it: the client may be back
        before the future's callbacks have their turn.
        """
        with self._lock:
            if self._live.pop(ticket.id, None) is None:
                return
            self._leave(ticket.client, 1)
            self._finished[ticket.id] = (time.monotonic() + self._ttl, ticket)
            while len(self._finished) > self._history:
                self._finished.popitem(last=False)

    def find(self, job_id: str) -> Ticket | None:
        with self._lock:
            _forget(self._finished, time.monotonic())
            found = self._finished.get(job_id)
            return self._live.get(job_id) or (found[1] if found else None)

    def reserve(self, key: bytes, fingerprint: bytes, is_free: Callable[[Request], bool]) -> Request | None:
        """What is known under *key* and not free; if that is nothing, the caller has to `keep` or `release` it."""
        with self._lock:
            now = time.monotonic()
            _forget(self._requests, now, self._is_over)
            found = self._requests.get(key)
            if found is not None and not is_free(found[1]):
                return found[1]
            self._requests.pop(key, None)
            self._requests[key] = (now + self._ttl, Request(fingerprint, None))
            return None

    def keep(self, key: bytes, request: Request) -> None:
        """What was accepted under a key that was reserved."""
        with self._lock:
            self._requests[key] = (time.monotonic() + self._ttl, request)
            self._requests.move_to_end(key)
            # A key whose job is under way stays: forgotten, the job could be accepted twice.
            while len(self._requests) > self._history and self._is_over(next(iter(self._requests.values()))[1]):
                self._requests.popitem(last=False)

    def release(self, key: bytes) -> None:
        """The key is free again."""
        with self._lock:
            self._requests.pop(key, None)

    def enter(self, client: str, jobs: int, most: int) -> bool:
        """Count *jobs* for a client, unless that makes more than *most*."""
        with self._lock:
            if self._clients[client] + jobs > most:
                return False
            self._clients[client] += jobs
            return True

    def leave(self, client: str, jobs: int) -> None:
        """Of what `enter` counted, so many were not accepted."""
        with self._lock:
            self._leave(client, jobs)

    def _leave(self, client: str, jobs: int) -> None:
        self._clients[client] -= jobs
        if not self._clients[client]:
            del self._clients[client]

    def _is_over(self, request: Request) -> bool:
        return request.tickets is not None and all(ticket.future.done() for ticket in request.tickets)


def _forget(entries: OrderedDict[Any, tuple[float, Any]], now: float, may_go: Any = lambda _: True) -> None:
    # Entries are in order of their expiry: all have the same time to live.
    while entries:
        key, (expires, item) = next(iter(entries.items()))
        if expires > now or not may_go(item):
            return
        del entries[key]


def is_free(request: Request, unknown_too: bool) -> bool:
    """Whether every job of it failed, so that the key can be used anew; *unknown_too* where that doubles nothing."""
    if request.tickets is None:
        return False
    free = (JobStatus.FAILED, JobStatus.CANCELLED, *((JobStatus.UNKNOWN,) if unknown_too else ()))
    return all(ticket.future.status in free for ticket in request.tickets)
