"""Which future an id means: outstanding jobs, and a bounded history of finished ones."""

from __future__ import annotations

from typing import Any

import pytest

from microbatch.errors import OutcomeUnknown
from microbatch.job import JobFuture
from microbatch.registry import Registry


def finished(error: BaseException | None = None) -> JobFuture[Any]:
    future: JobFuture[Any] = JobFuture()
    if error is None:
        future.set_result("done")
    else:
        future.set_exception(error)
    return future


def test_an_outstanding_job_is_found_whatever_the_history() -> None:
    registry, future = Registry(0, 1.0), JobFuture[Any]()
    registry.live["a"] = future
    assert registry.find("a", 1e9) is future
    assert registry.find("b", 0.0) is None


def test_a_finished_job_is_remembered_for_its_time_to_live() -> None:
    registry, future = Registry(10, 5.0), finished()
    registry.live["a"] = future
    registry.finish("a", future, 100.0)
    assert registry.live == {}
    assert registry.find("a", 104.9) is future
    assert registry.find("a", 105.0) is None


def test_the_history_is_bounded_and_the_oldest_leave_first() -> None:
    registry = Registry(3, 1e9)
    futures = {str(n): finished() for n in range(1000)}
    for job_id, future in futures.items():
        registry.live[job_id] = future
        registry.finish(job_id, future, 0.0)
    assert [job_id for job_id in futures if registry.find(job_id, 0.0)] == ["997", "998", "999"]
    assert len(registry._finished) == 3


def test_expired_entries_leave_without_being_asked_for() -> None:
    registry = Registry(1000, 1.0)
    for n in range(100):
        registry.finish(str(n), finished(), n / 10)
    assert len(registry._finished) <= 11


def test_no_history_remembers_nothing() -> None:
    registry, future = Registry(0, 100.0), finished()
    registry.live["a"] = future
    registry.finish("a", future, 0.0)
    assert registry.find("a", 0.0) is None


def test_an_id_that_is_finished_twice_counts_once_and_as_the_last_one() -> None:
    registry, first, second = Registry(2, 10.0), finished(), finished()
    registry.finish("a", first, 0.0)
    registry.finish("b", first, 1.0)
    registry.finish("a", second, 2.0)
    registry.finish("c", first, 3.0)
    assert registry.find("a", 3.0) is second
    assert registry.find("b", 3.0) is None


@pytest.mark.parametrize(
    ("error", "is_taken"),
    [(None, True), (OutcomeUnknown("?"), True), (ValueError("bad"), False)],
    ids=["completed", "unknown", "failed"],
)
def test_an_id_is_free_again_only_where_nothing_can_have_happened(error: BaseException | None, is_taken: bool) -> None:
    registry, future = Registry(10, 10.0), finished(error)
    registry.finish("a", future, 0.0)
    assert registry.taken("a", 1.0) is (future if is_taken else None)
    assert registry.find("a", 1.0) is future


def test_the_id_of_a_cancelled_job_is_free_and_that_of_a_pending_one_is_not() -> None:
    registry = Registry(10, 10.0)
    pending, cancelled = JobFuture[Any](), JobFuture[Any]()
    cancelled.cancel()
    registry.live["pending"] = pending
    registry.finish("cancelled", cancelled, 0.0)
    assert registry.taken("pending", 0.0) is pending
    assert registry.taken("cancelled", 0.0) is None
    assert registry.taken("never seen", 0.0) is None
