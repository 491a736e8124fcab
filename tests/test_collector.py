"""The size-or-linger rule, with a clock that is a number and a queue that is a list."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from interrupts import interrupted_everywhere

from microbatch import MemoryQueue
from microbatch.collector import NEVER, Collected, Intake, Returning, Undecided, Wait, collect_batch
from microbatch.job import COMPLETED, HANDED_OVER, QUEUED, TAKEN, WAITING, Job, JobFuture
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


def test_P4_a_part_that_left_nothing_comes_back_alone_without_those_that_ended(desk: Desk) -> None:
    jobs = [desk.postpone(payload, NEVER) for payload in "abcd"]
    desk.intake.heap.clear()
    part = Undecided(jobs, ("a", "b", "c", "d"), "b-1.1", 1, left_nothing=True)
    for job in jobs:
        job.undecided = part
    desk.intake.wait_until(5.0, part)
    desk.accept("new")
    desk.end(jobs[0])
    jobs[1].deadline = 5.0
    jobs[2].place = HANDED_OVER
    found = collect_batch(desk.intake, 5.0, max_batch_size=10, linger=0.0)
    assert found == Collected([jobs[3]], "retry", part)
    assert desk.collect(5.0) == ("idle", ["new"])


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


# Callers who are expected back.


def woken(callers: int, backlog: int = 0, seconds: float = 0.010, now: float = 100.0) -> Returning:
    returning = Returning()
    returning.expect(callers, backlog, seconds, now, max_batch_size=10)
    return returning


def test_P8_nobody_waits_for_a_caller_who_is_alone_nor_for_nobody(desk: Desk) -> None:
    assert woken(1).jobs == woken(0, backlog=5).jobs == 0
    desk.accept("a", at=100.0)
    assert desk.collect(100.0, returning=woken(1)) == ("idle", ["a"])


def test_a_sleep_that_is_too_short_to_pay_is_left_out() -> None:
    assert woken(8, seconds=0.0003).jobs == 0
    assert woken(8, seconds=0.0004).jobs == 8


def test_the_batch_is_held_for_a_part_of_the_last_ones_time_and_not_for_long() -> None:
    assert 100.001 <= woken(8, seconds=0.010).until <= 100.005
    assert woken(8, seconds=30.0).until == 100.05


def test_those_who_come_back_go_together_with_what_has_queued_up(desk: Desk) -> None:
    returning = woken(2, backlog=1)
    assert returning.jobs == 3
    desk.accept("queued", at=99.0)
    assert desk.collect(100.0, size=10, returning=returning) == Wait(returning.until, 2)
    desk.accept("first", at=100.001)
    assert desk.collect(100.001, size=10, returning=returning) == Wait(returning.until, 1)
    desk.accept("second", at=100.002)
    assert desk.collect(100.002, size=10, returning=returning) == ("idle", ["queued", "first", "second"])


def test_an_empty_queue_is_waited_for_until_they_are_there(desk: Desk) -> None:
    returning = woken(2)
    assert desk.collect(100.0, returning=returning) == Wait(returning.until, 2)
    assert desk.collect(returning.until, returning=returning) == Wait(NEVER, 1)


def test_nobody_is_waited_for_who_would_not_fit(desk: Desk) -> None:
    returning = Returning()
    returning.expect(8, 1, 0.010, 100.0, max_batch_size=3)
    assert returning.jobs == 3
    desk.accept("a", at=99.0)
    assert desk.collect(100.0, size=3, returning=returning) == Wait(returning.until, 2)
    desk.accept("b", at=100.0)
    desk.accept("c", at=100.0)
    assert desk.collect(100.0, size=3, returning=returning) == ("size", ["a", "b", "c"])
    full = Returning()
    full.expect(8, 3, 0.010, 100.0, max_batch_size=3)
    assert full.jobs == 0


def test_a_held_batch_goes_by_priority_and_age(desk: Desk) -> None:
    returning = woken(3, backlog=1)
    desk.accept("old", at=99.0)
    assert isinstance(desk.collect(100.0, returning=returning), Wait)
    for priority, payload in enumerate(("urgent", "more urgent", "most urgent"), 1):
        desk.accept(payload, at=100.0, priority=priority)
    assert desk.collect(100.0, returning=returning) == ("size", ["most urgent", "more urgent", "urgent"])


def test_many_who_wait_for_a_retry_hold_nobody_up(desk: Desk) -> None:
    returning = woken(2, backlog=1)
    for number in range(3):
        desk.postpone(number, due=200.0)
    desk.accept("a", at=99.0)
    assert desk.collect(100.0, returning=returning) == ("idle", ["a"])


def test_whoever_stays_away_is_waited_for_no_longer(desk: Desk) -> None:
    returning = woken(2, backlog=1)
    desk.accept("a", at=99.0)
    assert desk.collect(returning.until, returning=returning) == ("idle", ["a"])


@pytest.mark.parametrize(
    ("more", "trigger"),
    [({"closing": True}, "shutdown"), ({"flushed": 1}, "flush")],
)
def test_P6_a_flush_and_the_end_wait_for_nobody(desk: Desk, more: dict[str, Any], trigger: str) -> None:
    desk.accept("a", at=100.0)
    assert desk.collect(100.0, returning=woken(8), **more) == (trigger, ["a"])


def test_P5_a_job_is_held_for_half_of_its_time_at_most(desk: Desk) -> None:
    returning = woken(8)
    desk.accept("hasty", at=100.0, deadline=100.002)
    held = desk.collect(100.0, size=10, returning=returning)
    assert isinstance(held, Wait)
    assert held.until == pytest.approx(100.001)
    assert desk.collect(100.0011, size=10, returning=returning) == ("idle", ["hasty"])


def test_a_retry_wakes_the_worker_while_it_holds_a_batch(desk: Desk) -> None:
    returning = woken(2, backlog=1)
    desk.accept("a", at=99.0)
    desk.postpone("again", due=100.0005)
    assert desk.collect(100.0, returning=returning) == Wait(100.0005, 2)


def test_P1_an_interrupted_look_at_who_returns_stops_no_later_batch() -> None:
    points = 0
    for where, returning in interrupted_everywhere(
        Returning, lambda returning: returning.expect(8, 1, 0.010, 100.0, max_batch_size=10)
    ):
        points += 1
        returning.came(1, 100.001)
        assert returning.jobs == 0, where
    assert points > 2


def rounds(returning: Returning, times: int, back: int, callers: int = 8, backlog: int = 0) -> int:
    """So many batches after each of which *back* of the *callers* come back in time; for how many it was held."""
    held = 0
    for number in range(times):
        now = 100.0 + number
        returning.expect(callers, backlog, 0.010, now, max_batch_size=10)
        held += returning.jobs > 0
        returning.came(backlog + back, returning.until)
    return held


def test_who_never_comes_back_is_soon_waited_for_no_more_and_tried_now_and_then() -> None:
    returning = Returning()
    assert rounds(returning, 20, back=0) <= 12
    assert 1 <= rounds(returning, 1000, back=0) <= 120


def test_those_who_come_back_are_waited_for_again() -> None:
    returning = Returning()
    rounds(returning, 50, back=0)
    rounds(returning, 200, back=8)
    assert rounds(returning, 100, back=8) == 100
    returning.expect(8, 0, 0.010, 500.0, max_batch_size=10)
    assert returning.jobs == 8


def test_those_of_them_who_come_back_are_counted() -> None:
    returning = Returning()
    rounds(returning, 10, back=6)
    returning.expect(8, 0, 0.010, 500.0, max_batch_size=10)
    assert returning.jobs in (6, 7)


def test_who_comes_long_after_the_wait_has_not_come_back() -> None:
    punctual, late = woken(8), woken(8)
    punctual.came(6, punctual.until)
    late.came(6, late.until + 10.0)
    punctual.expect(8, 0, 0.010, 200.0, max_batch_size=10)
    late.expect(8, 0, 0.010, 200.0, max_batch_size=10)
    assert (punctual.jobs, late.jobs) == (6, 4)
