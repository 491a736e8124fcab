"""Write the good jobs of a batch in one transaction, each bad job with its own error.

Chunks first: a failed chunk is undone to its savepoint, and only its jobs are tried one by one. One savepoint is
alive at a time, and nothing waits for an answer in between: `ROLLBACK TO` after a chunk that worked undoes nothing,
since the savepoint was set anew behind it. Two flights, whatever the number of bad jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.pq.abc import PGresult

from .flight import Flight, is_error
from .session import Session
from .way import Way

CHUNK = 32

_SET = b"SAVEPOINT microbatch_job"
_FORGET = b"RELEASE microbatch_job"
_BACK = b"ROLLBACK TO microbatch_job"
_FRAME = 2  # commands behind a group: the release, and the savepoint for the next one

# A row may have met a later one that is tried before it: unique and exclusion violations.
_ORDER_MATTERS = ("23505", "23P01")


@dataclass(slots=True)
class Isolated:
    """The transaction is open and holds what *results* belong to; *errors* are the other jobs'."""

    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, psycopg.Error] = field(default_factory=dict)

    def order_mattered(self) -> bool:
        return any(error.sqlstate in _ORDER_MATTERS for error in self.errors.values())


def by_chunks(session: Session, way: Way, positions: Sequence[int]) -> Isolated:
    """Inside a fresh transaction: chunks of the jobs, then one by one the jobs of the chunks that failed."""
    chunks = [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]
    isolated = Isolated()
    failed: list[int] = []
    for chunk, answers in zip(chunks, _attempt(session, way, chunks), strict=True):
        if any(map(is_error, answers)):
            failed += chunk
        else:
            isolated.results |= way.read(chunk, answers[:-_FRAME])
    if failed:
        singly = one_by_one(session, way, failed)
        isolated.results |= singly.results
        isolated.errors = singly.errors
    return isolated


def one_by_one(session: Session, way: Way, positions: Sequence[int]) -> Isolated:
    """Inside a fresh transaction: every job behind a savepoint of its own."""
    singles = [[i] for i in positions]
    isolated = Isolated()
    for single, answers in zip(singles, _attempt(session, way, singles, each=True), strict=True):
        error = next(filter(is_error, answers), None)
        if error is None:
            isolated.results |= way.read(single, answers[:-_FRAME])
        else:
            isolated.errors[single[0]] = way.note(single[0], session.error(error))
    return isolated


def _attempt(
    session: Session, way: Way, groups: Sequence[Sequence[int]], *, each: bool = False
) -> list[list[PGresult]]:
    """The answers to each group's commands and to its frame; where one of them is an error, the group is undone."""
    _prepare(session)
    flight = session.flight(keep=False)
    flight.run(_SET)
    flight.sync()
    for group in groups:
        _queue(flight, way, group, each)
    flight.run(_FORGET)
    flight.sync()
    landed = flight.land()
    _check(session, landed[0])
    return landed[1:-1:2]


def _queue(flight: Flight, way: Way, group: Sequence[int], each: bool) -> None:
    way.send(flight, group, each=each)
    flight.run(_FORGET)
    flight.run(_SET)
    flight.sync()
    flight.run(_BACK)
    flight.sync()


def _prepare(session: Session) -> None:
    # Ahead of time: behind a failed job nothing can be prepared.
    if session.prepared is not None and (_BACK, ()) not in session.prepared.names:
        flight = session.flight()
        for command in (_SET, _FORGET, _BACK):
            flight.prepare(command)
        flight.sync()
        flight.land()


def _check(session: Session, answers: Sequence[PGresult]) -> None:
    for answer in answers:
        if is_error(answer):
            raise session.error(answer)
