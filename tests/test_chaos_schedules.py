"""Every order with one preemption, and that a race which somebody puts in is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chaos.schedules import SCENARIOS, explore

from microbatch import BatcherClosed, QueueFull, batcher
from microbatch.core import Core
from microbatch.job import QUEUED


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_promise_holds_in_every_order(name: str) -> None:
    count, problems, complete = explore(SCENARIOS[name], seconds=60.0)

    assert not problems
    assert complete
    assert count > 50


def look_at_the_flag_before_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = batcher.admit

    def racy(core: Core, job: Any, submit_timeout: float, job_id: str | None) -> Any:
        if core.closed:
            raise BatcherClosed("closed")
        core.counters.ended()  # a line of the library between the look and the lock
        with core.lock:
            closed, core.closed = core.closed, False
            try:
                return admit(core, job, submit_timeout, job_id)
            finally:
                core.closed = closed

    monkeypatch.setattr(batcher, "admit", racy)


def look_at_the_bound_before_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = batcher.admit

    def racy(core: Core, job: Any, submit_timeout: float, job_id: str | None) -> Any:
        if len(core.outstanding) >= core.options.max_outstanding:
            raise QueueFull("full")
        core.counters.ended()
        with core.lock:
            bound, core.bound = core.bound, 99
            try:
                return admit(core, job, submit_timeout, job_id)
            finally:
                core.bound = bound

    monkeypatch.setattr(batcher, "admit", racy)


def look_at_the_place_before_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Core._cancel

    def racy(self: Core, future: Any, sequence: int, ticket: object) -> bool:
        job = self.outstanding.get(sequence)
        if job is None or job.place != QUEUED:
            return False
        self.counters.ended()
        with self.lock:
            job.place, job.attempts = QUEUED, 0
            return cancel(self, future, sequence, ticket)

    monkeypatch.setattr(Core, "_cancel", racy)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a flag before the lock": (look_at_the_flag_before_the_lock, "submit, end of a shutdown"),
    "a bound before the lock": (look_at_the_bound_before_the_lock, "submit, submit when full"),
    "a place before the lock": (look_at_the_place_before_the_lock, "cancel, take"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_race_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks, scenario = BROKEN[name]
    breaks(monkeypatch)

    assert explore(SCENARIOS[scenario], preemptions=2, seconds=90.0, most=1)[1]
