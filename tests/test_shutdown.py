"""What waits when `shutdown` begins is processed all the same (P6)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest

from microbatch import Batch, JobCancelled, JobRetrying, MicroBatcher, RetryPolicy
from microbatch.core import Core
from microbatch.life import start_threads


def test_P6_a_job_that_waits_for_a_retry_when_shutdown_begins_is_tried_again() -> None:
    waits = threading.Event()
    attempts: list[int] = []

    def fail_once(batch: Batch[str]) -> list[str]:
        attempts.append(batch.attempt)
        if len(attempts) == 1:
            raise ConnectionError("the link is lost")
        return list(batch)

    retry = RetryPolicy(backoff=0.5, backoff_max=0.5, retry_on=ConnectionError)
    batcher = MicroBatcher[str, str](fail_once, retry=retry, delivery_timeout=5.0)
    batcher.on(JobRetrying, lambda event: waits.set())
    future = batcher.submit("job")
    assert waits.wait(5)

    report = batcher.shutdown()

    assert (future.result(0), report.completed, report.finished) == ("job", 1, True)
    assert attempts == [1, 2]


class SlowlyStarting(MicroBatcher[str, str]):
    """Its threads are on their way until they are let in."""

    def _drive(self) -> tuple[Callable[[], float], Callable[[Core], None]]:
        return time.monotonic, lambda core: None

    def let_threads_in(self) -> None:
        start_threads(self._core)


@pytest.mark.parametrize("waits", [False, True])
def test_P1_what_a_shutdown_cancels_is_told_though_no_thread_has_begun_yet(waits: bool) -> None:
    batcher = SlowlyStarting(lambda batch: list(batch))
    told: list[Any] = []
    batcher.on(JobCancelled, told.append)
    future = batcher.submit("job")
    future.add_done_callback(told.append)
    shutdown = threading.Thread(target=batcher.shutdown, args=(waits,), kwargs={"cancel_futures": True})
    shutdown.start()
    give_up = time.monotonic() + 5.0
    while not future.cancelled():
        assert time.monotonic() < give_up
        time.sleep(0.001)

    batcher.let_threads_in()

    assert not wait([future], 5.0).not_done
    assert batcher.shutdown().finished
    assert told[0] is future
    assert [event.job for event in told[1:]] == ["job"]
    shutdown.join(5.0)
    assert not shutdown.is_alive()
