"""Histories on virtual time, each from its seed; and that the simulator sees what it is there to see."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chaos.simulator import Violation, simulate, virtual_time
from chaos.verdict import Verdict

from microbatch import OutcomeUnknown, supervisor
from microbatch.core import Core
from microbatch.judge import Judge
from microbatch.supervisor import Supervisor

SEEDS = 400


@pytest.fixture(autouse=True)
def _virtual_time() -> Iterator[None]:
    with virtual_time():
        yield


def test_every_promise_holds_in_every_history() -> None:
    total, faults = Verdict(), 0
    for seed in range(SEEDS):
        verdict, hits = simulate(seed)
        total += verdict
        faults += hits

    assert not total.violations()
    assert total.jobs > 10 * SEEDS
    assert faults > SEEDS
    assert total.unknown
    assert total.expired


def test_a_seed_is_a_history() -> None:
    first: list[str] = []
    second: list[str] = []
    other: list[str] = []
    for seed, story in ((7, first), (7, second), (8, other)):
        simulate(seed, story=story)

    # Batches have random ids.
    assert [re.sub(r"\b[0-9a-f]{8}-", "", line) for line in first] == [
        re.sub(r"\b[0-9a-f]{8}-", "", line) for line in second
    ]
    assert len(first) > 50
    assert first != other


def lose_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "ring_worker", lambda self: None)


def swap_results(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Judge.results

    def swapped(self: Judge, batch: Any, jobs: Any, values: Any) -> Any:
        answers, alone, error = results(self, batch, jobs, values)
        return answers[::-1], alone, error

    monkeypatch.setattr(Judge, "results", swapped)


def retry_in_new_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "_undecided", lambda self, error: False)
    decided = Judge._decided_and_retryable
    monkeypatch.setattr(
        Judge,
        "_decided_and_retryable",
        lambda self, error: (
            self._ask(self._is_retryable, error) if isinstance(error, OutcomeUnknown) else decided(self, error)
        ),
    )


def forget_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "overdue", lambda core, jobs, now: None)


def forget_who_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "_bury_dead_workers", lambda self: None)


def never_abandon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "abandon_all", lambda core: None)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "lost wake-ups": (lose_wake_ups, "P8"),
    "results that are swapped": (swap_results, "crossed"),
    "retries under a new id": (retry_in_new_batches, "doubled"),
    "forgotten deadlines": (forget_deadlines, "does not come to rest"),
    "a shutdown without an end": (never_abandon, "does not come to rest"),
    "a dead worker that nobody buries": (forget_who_died, "--seed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_library_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, says = BROKEN[name]
    breaks(monkeypatch)

    assert any(says in violation_of(seed) for seed in range(200))


def violation_of(seed: int) -> str:
    try:
        simulate(seed, 100)
    except Violation as violation:
        return str(violation)
    return ""
