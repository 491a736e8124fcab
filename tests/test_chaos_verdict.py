"""Each violation that can be planted is seen, in its own column and in no other."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import psycopg
import pytest
from chaos.verdict import COLUMNS, TOLD, VIOLATIONS, Kind, Outcome, Verdict, code_of, id_and_key, judge, outcome_of

from microbatch import BatcherClosed, DeliveryTimeout, OutcomeUnknown, WorkerDied
from microbatch.testing import InlineBatcher

BAD = "23514"


def done(identity: int, key: str) -> Outcome:
    return Outcome(Kind.COMPLETED, (identity, key))


def clean() -> tuple[dict[Any, str | None], list[tuple[Any, Any]], dict[Any, Outcome]]:
    """One job of every kind, and nothing wrong."""
    accepted = {"a": None, "b": None, "bad": BAD, "late": None, "off": None, "gone": None, "dead": None}
    rows = [(1, "a"), (2, "b"), (3, "gone")]
    outcomes = {
        "a": done(1, "a"),
        "b": done(2, "b"),
        "bad": Outcome(Kind.FAILED, error=BAD),
        "late": Outcome(Kind.FAILED, error="DeliveryTimeout"),
        "off": Outcome(Kind.CANCELLED),
        "gone": Outcome(Kind.UNKNOWN),
        "dead": Outcome(Kind.KILLED),
    }
    return accepted, rows, outcomes


def test_a_clean_run_has_no_violation_and_tells_the_rest() -> None:
    verdict = judge(*clean())

    assert not verdict.violations()
    assert (verdict.unknown, verdict.expired, verdict.killed) == (["gone"], ["late"], ["dead"])
    assert verdict.jobs == 7
    assert str(verdict) == "7 jobs: unknown 1, expired 1, killed 1"


PLANTED: dict[str, tuple[str, Any]] = {
    "completed and not there": ("lost", lambda accepted, rows, outcomes: rows.remove((1, "a"))),
    "completed and there twice": ("doubled", lambda accepted, rows, outcomes: rows.append((9, "a"))),
    "unknown and there twice": ("doubled", lambda accepted, rows, outcomes: rows.append((9, "gone"))),
    "killed and there twice": ("doubled", lambda accepted, rows, outcomes: rows.extend([(8, "dead"), (9, "dead")])),
    "the key of another": ("crossed", lambda accepted, rows, outcomes: outcomes.update(a=done(1, "b"))),
    "the identity of another": ("crossed", lambda accepted, rows, outcomes: outcomes.update(a=done(2, "a"))),
    "an identity that nobody has": ("crossed", lambda accepted, rows, outcomes: outcomes.update(a=done(7, "a"))),
    "no outcome": ("unresolved", lambda accepted, rows, outcomes: outcomes.pop("a")),
    "an open future": ("unresolved", lambda accepted, rows, outcomes: outcomes.update(a=Outcome(Kind.UNRESOLVED))),
    "failed and there": ("false_failure", lambda accepted, rows, outcomes: rows.append((9, "bad"))),
    "too late and there": ("false_failure", lambda accepted, rows, outcomes: rows.append((9, "late"))),
    "cancelled and there": ("false_failure", lambda accepted, rows, outcomes: rows.append((9, "off"))),
    "another error than its own": (
        "wrong_error",
        lambda accepted, rows, outcomes: outcomes.update(bad=Outcome(Kind.FAILED, error="23502")),
    ),
    "a bad job that completes": (
        "wrong_error",
        lambda accepted, rows, outcomes: (rows.append((9, "bad")), outcomes.update(bad=done(9, "bad"))),
    ),
    "a neighbour's error": (
        "innocent",
        lambda accepted, rows, outcomes: (rows.remove((1, "a")), outcomes.update(a=Outcome(Kind.FAILED, error=BAD))),
    ),
    "a row of nobody": ("stranger", lambda accepted, rows, outcomes: rows.append((9, "nobody"))),
    "a row that was refused": ("stranger", lambda accepted, rows, outcomes: accepted.pop("gone")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_stands_in_its_column_alone(name: str) -> None:
    column, plant = PLANTED[name]
    run = clean()
    plant(*run)

    violations = judge(*run).violations()

    assert list(violations) == [column]
    assert len(violations[column]) == 1


def test_every_column_of_violations_is_planted_once() -> None:
    assert {column for column, _ in PLANTED.values()} == set(VIOLATIONS)
    assert set(VIOLATIONS) | set(TOLD) == set(COLUMNS)


def test_which_errors_excuse_a_job_can_be_said() -> None:
    accepted, rows, outcomes = {"a": None}, [], {"a": Outcome(Kind.FAILED, error="DeliveryTimeout")}

    assert judge(accepted, rows, outcomes).expired == ["a"]
    assert judge(accepted, rows, outcomes, frozenset()).violations() == {"innocent": ["a"]}


def test_verdicts_add_up() -> None:
    total = Verdict()
    for _ in range(2):
        accepted, rows, outcomes = clean()
        total += judge(accepted, rows[1:], outcomes)

    assert total.violations() == {"lost": ["a", "a"]}
    assert (total.jobs, total.counts()["unknown"]) == (14, 2)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (psycopg.errors.CheckViolation("x"), Kind.FAILED, "23514"),
        (psycopg.DataError("x"), Kind.FAILED, "DataError"),
        (DeliveryTimeout("x"), Kind.FAILED, "DeliveryTimeout"),
        (BatcherClosed("x"), Kind.FAILED, "BatcherClosed"),
        (OutcomeUnknown("x"), Kind.UNKNOWN, "OutcomeUnknown"),
        (WorkerDied("x"), Kind.UNKNOWN, "WorkerDied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_is_read_from_its_future(error: Exception, kind: Kind, code: str) -> None:
    future = Future[Any]()
    future.set_exception(error)

    assert outcome_of(future) == Outcome(kind, error=code)
    assert code_of(error) == code


def test_the_other_ends_are_read_from_futures() -> None:
    batcher = InlineBatcher[Any, Any](lambda batch: [{"id": 1, "key": job} for job in batch])
    with batcher.hold():
        held, off = batcher.submit("a"), batcher.submit("b")
        assert outcome_of(held).kind is Kind.UNRESOLVED
        off.cancel()

    assert outcome_of(off) == Outcome(Kind.CANCELLED)
    assert outcome_of(held) == Outcome(Kind.COMPLETED)
    assert outcome_of(held, id_and_key) == done(1, "a")
