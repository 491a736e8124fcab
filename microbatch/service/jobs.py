"""What the routes call: submit jobs, tell what became of them, stop."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from microbatch.batcher import MicroBatcher
from microbatch.errors import BatcherClosed, QueueFull
from microbatch.events import JobFailed
from microbatch.job import JobStatus
from microbatch.options import Options
from microbatch.stats import ShutdownReport

from .failures import LOST, Failure, failure_of
from .ids import Ids, JobId
from .known import Known, Request, Ticket, is_free
from .problems import Problem, not_found, unavailable
from .store import Entry, Store
from .table import Table
from .writer import COMPLETED, FAILED, Submission

_log = logging.getLogger("microbatch.service")

_GRACE = 5.0  # seconds that a job may be past its deadline before it counts as lost
_FAILING = 3  # batches in a row, after which no more jobs are taken while others find out
_LOST = Failure(LOST, "The job's process ended, or its answer was lost on the way; nothing was written: try again.")


@dataclass(frozen=True, slots=True)
class Answer:
    """One job as clients see it; *row* is JSON."""

    id: str
    status: str
    row: str | None = None
    failure: Failure | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in ("pending", "processing")


class Jobs:
    """Everything about jobs, for any number of request threads.

    Args:
        options: those of *batcher*.
        kept: seconds for which an outcome is told.
        most: jobs that one client may have outstanding.
    """

    def __init__(
        self,
        batcher: MicroBatcher[Submission, str],
        options: Options,
        table: Table,
        store: Store,
        ids: Ids,
        kept: float,
        most: int,
    ) -> None:
        self.batcher = batcher
        self.table = table
        self.store = store
        self._options = options
        self._ids = ids
        self._kept = kept
        self._most = most
        self._is_open = True
        self._known_by_process: dict[int, Known] = {}
        self._columns = tuple(table.given)
        batcher.on(JobFailed, self._note)

    def submit(
        self, rows: Sequence[tuple[str | None, ...]], client: str, key: str | None, body: Any
    ) -> list[Ticket | Answer]:
        """Accept one job per row, or none; those that *key* stands for already are given again.

        Raises:
            Problem: not accepted, and why.
        """
        if key is None:
            return list(self._accept(rows, client))
        digest, fingerprint = _digest(key.encode()), _digest(_canonical(body))
        request = self._known.reserve(digest, fingerprint, self._is_free)
        if request is not None:
            return list(_checked(request, fingerprint))
        try:
            keys = [_digest(digest + number.to_bytes(4, "big")) for number in range(len(rows))]
            stored = self._stored(keys, fingerprint)
            tickets = () if stored else self._accept(rows, client, keys, fingerprint)
        except BaseException:
            self._known.release(digest)
            raise
        if stored:
            self._known.release(digest)
            return list(stored)
        self._known.keep(digest, Request(fingerprint, tickets))
        return list(tickets)

    def wait(self, tickets: Sequence[Ticket | Answer], seconds: float) -> list[Answer]:
        """Their answers, as soon as all are over or the time is."""
        futures = [ticket.future for ticket in tickets if isinstance(ticket, Ticket)]
        wait(futures, timeout=seconds)
        answers: list[Answer] = []
        asks = True
        for ticket in tickets:
            answers.append(self._of_ticket(ticket, asks) if isinstance(ticket, Ticket) else ticket)
            # A store that does not answer for one job is not asked for the next.
            asks = asks and answers[-1].status != JobStatus.UNKNOWN.value
        return answers

    def status(self, text: str) -> Answer:
        """What is known of a job.

        Raises:
            Problem: there is none, or the database is needed and does not answer.
        """
        job_id = self._ids.read(text)
        if job_id is None:
            raise not_found()
        ticket = self._known.find(text) if job_id.is_own else None
        if ticket is not None:
            return self._of_ticket(ticket)
        entry = self._ask(lambda: self.store.find(text))
        if entry is not None:
            return _of_entry(entry)
        return self._without_entry(job_id)

    def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Stop taking jobs, and return when all have their outcome; blocks up to `delivery_timeout`, or *timeout*."""
        self._is_open = False
        report = self.batcher.shutdown(timeout=timeout)
        self.store.flush(_GRACE)
        return report

    def is_ready(self) -> bool:
        """Whether a job that comes now may be expected to be written; blocks up to 5 seconds."""
        if not self._is_open or self._is_database_away():
            return False
        try:
            self.store.ping()
        except Exception:
            return False
        return True

    # Submitting.

    @property
    def _known(self) -> Known:
        pid = os.getpid()
        known = self._known_by_process.get(pid)
        if known is None:
            fresh = Known(self._options.history, self._options.history_ttl)
            known = self._known_by_process.setdefault(pid, fresh)
        return known

    def _stored(self, keys: Sequence[bytes], fingerprint: bytes) -> list[Answer]:
        """What another process wrote under these keys; empty unless it is all."""
        entries = self._ask(lambda: self.store.find_keys(keys))
        if any(entry is not None and entry.fingerprint != fingerprint for entry in entries):
            raise _key_reused()
        return [_of_entry(entry) for entry in entries] if all(entries) else []

    def _is_free(self, request: Request) -> bool:
        return is_free(request, unknown_too=self.store.is_shared)

    def _accept(
        self,
        rows: Sequence[tuple[str | None, ...]],
        client: str,
        keys: Sequence[bytes] | None = None,
        fingerprint: bytes | None = None,
    ) -> tuple[Ticket, ...]:
        known = self._known
        submissions = [
            Submission(self._ids.new().text, self._columns, row, keys[number] if keys else None, fingerprint)
            for number, row in enumerate(rows)
        ]
        if not self._is_open:
            raise _shut_down()
        if self._is_database_away():
            raise _database_away()
        if not known.enter(client, len(rows), self._most):
            raise Problem(429, "too-many-jobs", f"This client has {self._most} jobs outstanding, or nearly so.", 1)
        try:
            futures = self._submit(submissions)
        except BaseException:
            known.leave(client, len(rows))
            raise
        tickets = tuple(Ticket(each.id, future, client) for each, future in zip(submissions, futures, strict=True))
        for ticket in tickets:
            known.add(ticket)
        return tickets

    def _submit(self, submissions: list[Submission]) -> list[Any]:
        try:
            if len(submissions) == 1:
                return [self.batcher.submit(submissions[0], job_id=submissions[0].id)]
            return list(self.batcher.submit_many(submissions))
        except (QueueFull, ValueError):  # the latter for more than could ever be outstanding
            raise unavailable("queue-full", "Too many jobs are outstanding: try again.") from None
        except BatcherClosed:
            raise _shut_down() from None

    def _is_database_away(self) -> bool:
        # With nothing outstanding the next job is what finds out.
        stats = self.batcher.stats()
        return stats.consecutive_failures >= _FAILING and stats.outstanding > 0

    # Telling.

    def _of_ticket(self, ticket: Ticket, asks: bool = True) -> Answer:
        status = ticket.future.status
        if ticket.future.done():
            self._known.finish(ticket)
        if status is JobStatus.COMPLETED:
            return Answer(ticket.id, COMPLETED, row=ticket.future.result())
        if status in (JobStatus.PENDING, JobStatus.PROCESSING):
            return Answer(ticket.id, status.value)
        failure = failure_of(_error_of(ticket))
        if status is JobStatus.UNKNOWN:
            return (self._settled(ticket.id) if asks else None) or Answer(ticket.id, status.value, failure=failure)
        return Answer(ticket.id, FAILED, failure=failure)

    def _settled(self, job_id: str) -> Answer | None:
        try:
            entry = self.store.settle(job_id, _LOST)
        except Exception:  # the database is away, so it stays unknown
            return None
        return None if entry is None else _of_entry(entry)

    def _without_entry(self, job_id: JobId) -> Answer:
        age = self._ids.age(job_id)
        if not self.store.is_shared or age > self._kept:
            raise not_found()
        timeout = self._options.delivery_timeout
        if timeout is None or age < timeout + _GRACE:
            return Answer(job_id.text, JobStatus.PENDING.value)
        entry = self._ask(lambda: self.store.settle(job_id.text, _LOST))
        if entry is None:
            raise not_found()
        return _of_entry(entry)

    def _ask(self, question: Any) -> Any:
        try:
            return question()
        except Exception as error:
            _log.warning("the status store does not answer: %s", type(error).__name__)
            raise _database_away() from None

    def _note(self, event: JobFailed) -> None:
        # An unknown job is noted, too: if it was not written by then, it never will be.
        failure = failure_of(event.error)
        self.store.note(event.job.id, _LOST if failure.error == "unknown" else failure)


def _of_entry(entry: Entry) -> Answer:
    if entry.status == COMPLETED:
        return Answer(entry.id, COMPLETED, row=entry.result)
    return Answer(entry.id, entry.status, failure=Failure(**json.loads(entry.result)))


def _error_of(ticket: Ticket) -> BaseException:
    if ticket.future.cancelled():
        return BatcherClosed("cancelled")
    return ticket.future.exception() or BatcherClosed("completed meanwhile")


def _checked(request: Request, fingerprint: bytes) -> tuple[Ticket, ...]:
    if request.fingerprint != fingerprint:
        raise _key_reused()
    if request.tickets is None:
        detail = "A request with this Idempotency-Key is being accepted at this moment: try again."
        raise Problem(409, "idempotency-key-in-use", detail, 1)
    return request.tickets


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, default=str).encode()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _key_reused() -> Problem:
    return Problem(422, "idempotency-key-reused", "Another body was sent under this Idempotency-Key.")


def _shut_down() -> Problem:
    return unavailable("shut-down", "The service takes no more jobs: it is shut down.", 60)


def _database_away() -> Problem:
    return unavailable("database-away", "The database does not answer: try again.", 5)
