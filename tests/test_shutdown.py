"""What waits when `shutdown` begins is processed all the same (P6)."""

from __future__ import annotations

import threading

from microbatch import Batch, JobRetrying, MicroBatcher, RetryPolicy


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
