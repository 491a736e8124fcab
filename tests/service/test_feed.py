"""What the dashboard is told: the events of the last minutes, bounded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import pytest
from programs import run

from microbatch import RetryPolicy
from microbatch.service.feed import FLOOR, GROWTH, HISTORY, LATEST, Feed
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock


@dataclass
class Job:
    """As much of a submission as the feed looks at."""

    id: str = "some-id"


def answer(batch: Any) -> list[Any]:
    return [ValueError(job.id) if job.id.startswith("bad") else job for job in batch]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_800_000_000.0)


def fed(clock: ManualClock, *script: Any, **options: Any) -> tuple[InlineBatcher[Any, Any], Feed]:
    batcher = InlineBatcher[Any, Any](FaultyProcessor(script, retryable=(OSError,)), clock=clock, **options)
    return batcher, Feed(batcher, clock)


def test_each_second_has_what_happened_in_it(clock: ManualClock) -> None:
    batcher, feed = fed(clock, answer)
    with batcher.hold():
        batcher.submit_many([Job("good"), Job("bad"), Job("good")])
        batcher.submit(Job("cancelled")).cancel()
    clock.advance(2.0)
    batcher.submit(Job())
    first, second = feed.read()["seconds"]
    assert (first["at"], second["at"]) == (1_800_000_000, 1_800_000_002)
    assert {name: value for name, value in first.items() if value and name != "at"} == {
        "completed": 2,
        "failed": 1,
        "cancelled": 1,
        "batches": 1,
        "jobs": 3,
        "largest": 3,
        "outstanding": 3,
        "latencies": {0: 3},
    }
    assert (second["completed"], second["batches"], second["largest"]) == (1, 1, 1)


def test_only_the_seconds_that_are_asked_for_are_told(clock: ManualClock) -> None:
    batcher, feed = fed(clock)
    for _ in range(5):
        batcher.submit(Job())
        clock.advance(1.0)
    assert [second["at"] % 100 for second in feed.read(since=1_800_000_003.0)["seconds"]] == [3, 4, 5]


def test_a_latency_is_at_most_one_class_off(clock: ManualClock) -> None:
    for seconds in (0.0, 0.00005, 0.0011, 0.25, 19.0):
        batcher, feed = fed(clock, lambda batch, seconds=seconds: clock.advance(seconds))
        batcher.submit(Job())
        told = {number: jobs for each in feed.read()["seconds"] for number, jobs in each["latencies"].items()}
        ((number, jobs),) = told.items()
        bound = FLOOR * GROWTH**number
        assert jobs == 1
        assert seconds <= bound * 1.000001
        assert number == 0 or bound / GROWTH < seconds * 1.000001


def test_the_queue_is_seen_by_who_asks_and_by_the_batches(clock: ManualClock) -> None:
    batcher, feed = fed(clock, max_batch_size=2)
    with batcher.hold():
        batcher.submit_many([Job()] * 7)
        clock.advance(1.0)
        asked = feed.read()["seconds"][-1]
    begun = feed.read()["seconds"][-1]
    assert (asked["queued"], asked["outstanding"]) == (7, 7)
    assert (begun["queued"], begun["outstanding"]) == (7, 7)
    batcher, feed = fed(clock, max_batch_size=2)
    with batcher.hold():
        batcher.submit_many([Job()] * 7)
    assert [(second["queued"], second["outstanding"]) for second in feed.read()["seconds"]] == [(5, 7)]


def test_a_batch_is_seen_however_short_ago_somebody_looked(clock: ManualClock) -> None:
    batcher, feed = fed(clock)
    feed.read()
    batcher.submit_many([Job()] * 4)
    clock.advance(0.1)
    batcher.submit_many([Job()] * 6)
    assert [second["outstanding"] for second in feed.read()["seconds"]] == [6]


def test_a_failure_says_what_clients_are_told_and_quotes_nothing(clock: ManualClock) -> None:
    batcher, feed = fed(clock, answer)
    batcher.submit(Job("bad: a secret"))
    (failure,) = feed.read()["failures"]
    assert (failure["job"], failure["error"], failure["attempt"]) == ("bad: a secret", "not-written", 1)
    assert "secret" not in failure["message"]


def test_batches_say_how_they_ended(clock: ManualClock) -> None:
    batcher, feed = fed(clock, OSError(), answer, retry=RetryPolicy(max_attempts=2))
    batcher.submit_many([Job("bad"), Job("good")])
    last, first = feed.read()["batches"]
    assert (first["trigger"], first["outcome"], first["size"], first["attempt"]) == ("idle", "failed", 2, 1)
    assert (last["trigger"], last["outcome"], last["failed"], last["attempt"]) == ("retry", "completed", 1, 2)


def test_P5_the_feed_is_bounded(clock: ManualClock) -> None:
    batcher, feed = fed(clock, *[answer] * (HISTORY + 50))
    for number in range(HISTORY + 50):
        batcher.submit(Job(f"bad {number}"))
        clock.advance(1.0)
    told = feed.read()
    assert len(told["seconds"]) == HISTORY
    assert told["seconds"][-1]["at"] == int(clock.now)
    assert len(told["batches"]) == len(told["failures"]) == LATEST
    assert told["failures"][0]["job"] == f"bad {HISTORY + 49}"


def test_a_clock_that_is_set_back_breaks_nothing(clock: ManualClock) -> None:
    batcher, feed = fed(clock)
    wall = ManualClock(1_800_000_000.0)
    feed._clock = wall
    batcher.submit(Job())
    wall.now -= 3600
    batcher.submit(Job())
    (second,) = feed.read()["seconds"]
    assert (second["at"], second["completed"]) == (1_800_000_000, 2)


def test_it_can_be_sent_as_json(clock: ManualClock) -> None:
    batcher, feed = fed(clock, answer)
    batcher.submit(Job("bad"))
    told = json.loads(json.dumps(feed.read()))
    assert told["stats"]["failed"] == 1
    assert told["stats"]["triggers"]["idle"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_P7_a_forked_child_begins_with_an_empty_feed(tmp_path: Any) -> None:
    told = run(
        """
        from microbatch.service.feed import Feed

        batcher = MicroBatcher(lambda batch: None)
        feed = Feed(batcher)
        batcher.execute("the parent's")
        batcher.flush()
        own = feed.read()["process"]

        def look():
            told = feed.read()
            note("child", told["process"] != own, len(told["batches"]), told["stats"]["completed"])

        join(child(look))
        """,
        tmp_path,
    )
    told.assert_quiet()
    assert told.said("child") == ["True 0 0"]
