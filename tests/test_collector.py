"""The size-or-linger rule, with a clock that is a number and a queue that is a list."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from microbatch import MemoryQueue
from microbatch.collector import NEVER, Collected, Intake, Undecided, Wait, collect_batch
from microbatch.job import COMPLETED, QUEUED, TAKEN, WAITING, Job, JobFuture
from microbatch.queues import Store


class Desk:
    """An intake, and what the batcher does to it: accept, end, postpone."""

    def __init__(self) -> None:
        self.outstanding: dict[int, Job] = {}
        self.numbers = itertools.count(1)
        self.intake = Intake(Store(MemoryQueue()), self.outstanding)

    def accept(
        self, payload: Any, at: float = 0.0, *, priority: int = 0, deadline: float = NEVER, attempts: int = 0
    ) -> Job:
        job = Job(payload, JobFuture(), priority, at, deadline)
        job.sequence = next(self.numbers)
        job.attempts = attempts
        self.intake.store.put(job)
        self.outstanding[job.sequence] = job
        return job

    def end(self, job: Job) -> None:
        job.verdict = (COMPLETED, None, None)
        del self.outstanding[job.sequence]

    def postpone(self, payload: Any, due: float, at: float = 0.0) -> Job:
        job = Job(payload, JobFuture(), 0, at, NEVER)
        job.sequence = next(self.numbers)
        job.attempts, job.place, job.due = 1, WAITING, due
        self.outstanding[job.sequence] = job
        self.intake.wait_until(due, job)
        return job

    def collect(self, now: float, size: int = 3, linger: float = 0.0, **more: Any) -> tuple[str, list[Any]] | Wait:
        found = collect_batch(self.intake, now, max_batch_size=size, linger=linger, **more)
        if isinstance(found, Wait):
            return found
        for job in found.jobs:
            job.place = TAKEN
        return found.trigger, [job.payload for job in found.jobs]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_empty_queue_is_waited_for_without_end(desk: Desk) -> None:
    assert desk.collect(0.0) == Wait(NEVER, 1)


def test_P5_a_job_lingers_for_half_of_its_time_at_most(desk: Desk) -> None:
    desk.accept("patient", at=100.0, deadline=120.0)
    assert desk.collect(100.0, linger=9.0) == Wait(109.0, 2)
    desk.accept("hasty", at=101.0, deadline=105.0)
    assert desk.collect(101.0, linger=9.0) == Wait(103.0, 1)
    assert desk.collect(103.0, linger=9.0) == ("linger", ["patient", "hasty"])


def test_P8_a_lone_job_is_taken_at_once(desk: Desk) -> None:
    desk.accept("a")
    assert desk.collect(0.0) == ("idle", ["a"])


def test_a_batch_takes_what_has_queued_up_and_never_more_than_its_size(desk: Desk) -> None:
    for payload in "abcdefg":
        desk.accept(payload)
    assert [desk.collect(0.0) for _ in range(3)] == [
        ("size", ["a", "b", "c"]),
        ("size", ["d", "e", "f"]),
        ("idle", ["g"]),
    ]


def test_linger_counts_from_the_oldest_job(desk: Desk) -> None:
    desk.accept("a", at=10.0)
    assert desk.collect(10.0, linger=5.0) == Wait(15.0, 2)
    desk.accept("b", at=14.0)
    assert desk.collect(14.9, linger=5.0) == Wait(15.0, 1)
    assert desk.collect(15.0, linger=5.0) == ("linger", ["a", "b"])


def test_linger_counts_from_the_oldest_job_also_where_an_urgent_one_came_later(desk: Desk) -> None:
    desk.accept("old", at=10.0)
    desk.accept("urgent", at=14.0, priority=9)
    assert desk.collect(14.0, linger=5.0) == Wait(15.0, 1)
    assert desk.collect(15.0, linger=5.0) == ("linger", ["urgent", "old"])


def test_a_full_batch_does_not_linger(desk: Desk) -> None:
    for payload in "abc":
        desk.accept(payload)
    assert desk.collect(0.0, linger=5.0) == ("size", ["a", "b", "c"])


def test_a_flush_closes_the_batch_for_the_jobs_that_came_before_it_only(desk: Desk) -> None:
    desk.accept("before")
    assert desk.collect(0.0, linger=5.0, flushed=1) == ("flush", ["before"])
    desk.accept("after")
    assert desk.collect(0.0, linger=5.0, flushed=1) == Wait(5.0, 2)


def test_closing_closes_whatever_is_there(desk: Desk) -> None:
    desk.accept("a")
    assert desk.collect(0.0, linger=5.0, closing=True) == ("shutdown", ["a"])
    assert desk.collect(0.0, linger=5.0, closing=True) == Wait(NEVER, 1)


def test_urgent_jobs_go_first_and_in_their_order(desk: Desk) -> None:
    for payload, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5)):
        desk.accept(payload, priority=priority)
    assert desk.collect(0.0, size=4) == ("size", ["b", "d", "a", "c"])


def test_a_retry_waits_for_its_time_and_then_takes_company_along(desk: Desk) -> None:
    desk.postpone("again", due=7.0)
    assert desk.collect(6.9) == Wait(7.0, 1)
    assert desk.collect(7.0) == ("retry", ["again"])
    desk.postpone("again", due=8.0)
    desk.accept("new", at=8.0)
    assert desk.collect(8.0) == ("idle", ["again", "new"])


def test_a_retry_alone_does_not_linger(desk: Desk) -> None:
    desk.postpone("again", due=7.0, at=6.9)
    assert desk.collect(7.0, linger=100.0) == ("retry", ["again"])


def test_retries_are_taken_in_the_order_of_their_times_and_leave_room_to_no_more_than_a_batch(desk: Desk) -> None:
    for payload, due in (("c", 3.0), ("a", 1.0), ("d", 4.0), ("b", 2.0)):
        desk.postpone(payload, due)
    assert desk.collect(9.0) == ("size", ["a", "b", "c"])
    assert desk.collect(9.0) == ("retry", ["d"])


def test_lingering_ends_for_a_retry_that_comes_due(desk: Desk) -> None:
    desk.accept("new", at=0.0)
    desk.postpone("again", due=1.0)
    assert desk.collect(0.0, linger=5.0) == Wait(1.0, 2)


def test_P4_an_undecided_batch_comes_back_alone_and_unchanged(desk: Desk) -> None:
    first, second = desk.postpone("a", NEVER), desk.postpone("b", NEVER)
    desk.intake.heap.clear()
    whole = Undecided([first, second], ("a", "b"), "b-1", 1)
    desk.intake.wait_until(5.0, whole)
    desk.accept("new")
    desk.end(first)
    found = collect_batch(desk.intake, 5.0, max_batch_size=10, linger=0.0)
    assert found == Collected([first, second], "retry", whole)
    assert desk.collect(5.0) == ("idle", ["new"])


def test_an_undecided_batch_whose_jobs_all_ended_does_not_come_back(desk: Desk) -> None:
    job = desk.postpone("a", NEVER)
    desk.intake.heap.clear()
    desk.intake.wait_until(5.0, Undecided([job], ("a",), "b-1", 1))
    desk.end(job)
    assert desk.collect(6.0) == Wait(NEVER, 1)


def test_jobs_that_ended_or_expired_are_not_collected(desk: Desk) -> None:
    desk.end(desk.accept("cancelled"))
    desk.accept("expired", deadline=3.0)
    desk.accept("last moment", deadline=3.1)
    again = desk.postpone("again", due=2.0)
    desk.end(again)
    assert desk.collect(3.0) == ("idle", ["last moment"])


def test_a_job_that_ends_while_it_lingers_gives_up_its_place(desk: Desk) -> None:
    job = desk.accept("a")
    desk.accept("b", at=1.0)
    assert desk.collect(1.0, linger=5.0) == Wait(5.0, 1)
    desk.end(job)
    assert desk.collect(1.0, linger=5.0) == Wait(6.0, 2)


def test_P1_what_is_queued_and_was_never_accepted_is_skipped(desk: Desk) -> None:
    job = desk.accept("interrupted")
    desk.outstanding.clear()
    desk.accept("accepted")
    job.sequence = 99
    assert desk.collect(0.0) == ("idle", ["accepted"])


def test_the_order_can_be_made_anew_from_the_outstanding_jobs(desk: Desk) -> None:
    jobs = [desk.accept(payload) for payload in "abcd"]
    desk.postpone("later", due=9.0)
    undecided = desk.postpone("undecided", due=5.0)
    undecided.undecided = Undecided([undecided], ("undecided",), "b-1", 1)
    assert desk.collect(0.0, size=3) == ("size", ["a", "b", "c"])
    jobs[0].place = QUEUED
    desk.intake.heap.clear()
    desk.intake.rebuild(lambda: list(desk.outstanding.values()))
    desk.intake.rebuild(lambda: list(desk.outstanding.values()))
    assert desk.collect(0.0) == ("idle", ["a", "d"])
    found = collect_batch(desk.intake, 9.0, max_batch_size=3, linger=0.0)
    assert isinstance(found, Collected)
    assert found.undecided is undecided.undecided
    assert desk.collect(9.0) == ("retry", ["later"])
    assert desk.collect(9.0) == Wait(NEVER, 1)


def test_an_order_made_anew_hands_nothing_out_twice(desk: Desk) -> None:
    desk.accept("a")
    assert desk.collect(0.0, linger=5.0) == Wait(5.0, 2)
    desk.intake.rebuild(lambda: [*desk.outstanding.values()] * 2)
    assert desk.collect(5.0, linger=5.0) == ("linger", ["a"])


def test_sweeping_drops_the_dead(desk: Desk) -> None:
    for job in [desk.accept(n) for n in range(10)][::2]:
        desk.end(job)
    desk.intake.dead = 5
    desk.intake.sweep()
    assert (desk.intake.store.size(), desk.intake.dead) == (5, 0)
