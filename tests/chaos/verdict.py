"""The verdict over a run: what was accepted, what lies in the table and what the futures say, compared as sets.

Every job has a key of its own, and so has every row. A planted fault is known by the job's key: the SQLSTATE, or the
type where there is none. The table must have no constraint that would hide a double.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from microbatch import BatcherClosed, DeliveryTimeout, OutcomeUnknown

Key = Any


class Kind(Enum):
    """What became of a job, as far as its caller can see."""

    COMPLETED = "its future has a result"
    FAILED = "its future has an error that promises no trace"
    CANCELLED = "its future is cancelled"
    UNKNOWN = "its future has an OutcomeUnknown"
    UNRESOLVED = "its future has nothing, and it should"
    KILLED = "its process was killed before its future was resolved"


@dataclass(frozen=True, slots=True)
class Outcome:
    """*row* is the result of a completed job, as identity and key; *error* the code of a failed one."""

    kind: Kind
    row: tuple[Hashable, Key] | None = None
    error: str = ""


# Errors that any job may get, and that promise no trace: its time is over, or its batcher's.
EXPIRED = frozenset({DeliveryTimeout.__name__, BatcherClosed.__name__})


@dataclass
class Verdict:
    """The keys under each column. Every violation must be empty; the rest is told, and each level bounds it."""

    lost: list[Key] = field(default_factory=list)  # completed, and not in the table
    doubled: list[Key] = field(default_factory=list)  # more than once in the table
    crossed: list[Key] = field(default_factory=list)  # completed with somebody else's row
    unresolved: list[Key] = field(default_factory=list)  # accepted, and never an outcome
    false_failure: list[Key] = field(default_factory=list)  # failed or cancelled, and in the table all the same
    wrong_error: list[Key] = field(default_factory=list)  # a planted fault that ended in another way
    innocent: list[Key] = field(default_factory=list)  # a healthy job with somebody's error
    stranger: list[Key] = field(default_factory=list)  # in the table, and never accepted
    unknown: list[Key] = field(default_factory=list, metadata={"told": True})
    expired: list[Key] = field(default_factory=list, metadata={"told": True})
    killed: list[Key] = field(default_factory=list, metadata={"told": True})
    jobs: int = 0

    def violations(self) -> dict[str, list[Key]]:
        """What must be empty and is not, by column."""
        return {column: keys for column in VIOLATIONS if (keys := getattr(self, column))}

    def counts(self) -> dict[str, int]:
        return {column: len(getattr(self, column)) for column in COLUMNS}

    def __iadd__(self, other: Verdict) -> Verdict:
        for column in COLUMNS:
            getattr(self, column).extend(getattr(other, column))
        self.jobs += other.jobs
        return self

    def __str__(self) -> str:
        counts = ", ".join(f"{column} {count}" for column, count in self.counts().items() if count)
        return f"{self.jobs} jobs: {counts or 'nothing to tell'}"


_LISTS = [column for column in fields(Verdict) if column.name != "jobs"]
COLUMNS = tuple(column.name for column in _LISTS)
VIOLATIONS = tuple(column.name for column in _LISTS if not column.metadata)
TOLD = tuple(column.name for column in _LISTS if column.metadata)


def judge(
    accepted: Mapping[Key, str | None],
    rows: Iterable[tuple[Hashable, Key]],
    outcomes: Mapping[Key, Outcome],
    expired: frozenset[str] = EXPIRED,
) -> Verdict:
    """Compare the three.

    Args:
        accepted: each accepted job's key, and the error that is planted in it, if there is one.
        rows: the table, as pairs of identity and key.
        outcomes: by key; a job that is missing here is unresolved.
        expired: the errors that a job may get through no fault of its own.
    """
    stored: dict[Key, list[Hashable]] = {}
    for identity, key in rows:
        stored.setdefault(key, []).append(identity)
    verdict = Verdict(jobs=len(accepted))
    verdict.stranger = [key for key in stored if key not in accepted]
    verdict.doubled = [key for key, identities in stored.items() if len(identities) > 1 and key in accepted]
    unresolved = Outcome(Kind.UNRESOLVED)
    for key, planted in accepted.items():
        outcome = outcomes.get(key, unresolved)
        _JUDGES[outcome.kind](verdict, key, planted, outcome, stored.get(key, []), expired)
    return verdict


def _completed(
    verdict: Verdict, key: Key, planted: str | None, outcome: Outcome, stored: list[Hashable], expired: frozenset[str]
) -> None:
    if not stored:
        verdict.lost.append(key)
    if outcome.row is not None and (outcome.row[1] != key or (stored and outcome.row[0] not in stored)):
        verdict.crossed.append(key)
    if planted is not None:
        verdict.wrong_error.append(key)


def _failed(
    verdict: Verdict, key: Key, planted: str | None, outcome: Outcome, stored: list[Hashable], expired: frozenset[str]
) -> None:
    if stored:
        verdict.false_failure.append(key)
    if outcome.error in expired:
        verdict.expired.append(key)
    elif planted is None:
        verdict.innocent.append(key)
    elif outcome.error != planted:
        verdict.wrong_error.append(key)


def _cancelled(
    verdict: Verdict, key: Key, planted: str | None, outcome: Outcome, stored: list[Hashable], expired: frozenset[str]
) -> None:
    if stored:
        verdict.false_failure.append(key)


def _told(column: str) -> Callable[..., None]:
    def tell(verdict: Verdict, key: Key, *_: object) -> None:
        getattr(verdict, column).append(key)

    return tell


_JUDGES: dict[Kind, Callable[..., None]] = {
    Kind.COMPLETED: _completed,
    Kind.FAILED: _failed,
    Kind.CANCELLED: _cancelled,
    Kind.UNKNOWN: _told("unknown"),
    Kind.UNRESOLVED: _told("unresolved"),
    Kind.KILLED: _told("killed"),
}


def outcome_of(future: Any, row: Callable[[Any], tuple[Hashable, Key] | None] = lambda result: None) -> Outcome:
    """What *future* says at this moment; *row* reads identity and key out of its result."""
    if not future.done():
        return Outcome(Kind.UNRESOLVED)
    try:
        error = future.exception(0)
    except CancelledError:
        return Outcome(Kind.CANCELLED)
    if error is None:
        return Outcome(Kind.COMPLETED, row(future.result(0)))
    return Outcome(Kind.UNKNOWN if isinstance(error, OutcomeUnknown) else Kind.FAILED, error=code_of(error))


def code_of(error: BaseException) -> str:
    """Its SQLSTATE, or its type where it has none."""
    return getattr(error, "sqlstate", None) or type(error).__name__


def id_and_key(result: Any) -> tuple[Hashable, Key]:
    """For rows that come back as dicts."""
    return result["id"], result["key"]
