from __future__ import annotations

import logging
import subprocess
import sys
import threading
from typing import Any

import pytest

import microbatch
from microbatch import (
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRetrying,
    JobSubmitted,
    MicroBatcher,
    OutcomeUnknown,
    RetryPolicy,
)
from microbatch.events import Event
from microbatch.logs import Log, name_thread
from microbatch.processors.postgres.log import tell
from microbatch.testing import FaultyProcessor, InlineBatcher


class Away(Exception):
    pass


@pytest.mark.parametrize("name", ["payments", "100%", "%s %d"])
@pytest.mark.parametrize(("message", "arguments"), [("plain", ()), ("the %s of %d", ("first", 2))])
def test_a_line_begins_with_the_name(
    name: str, message: str, arguments: tuple[object, ...], caplog: pytest.LogCaptureFixture
) -> None:
    Log("microbatch.worker", name).warning(message, *arguments)

    (record,) = caplog.records
    assert record.getMessage() == f"{name}: {message % arguments}"
    assert (record.name, record.filename) == ("microbatch.worker", "test_logs.py")


def test_a_thread_has_the_name_of_its_batcher(caplog: pytest.LogCaptureFixture) -> None:
    def log() -> None:
        name_thread("payments")
        tell(logging.WARNING, "on it")

    thread = threading.Thread(target=log)
    thread.start()
    thread.join()
    tell(logging.WARNING, "elsewhere")

    assert [record.getMessage() for record in caplog.records] == ["payments: on it", "microbatch: elsewhere"]


def noisy(batcher: MicroBatcher[str, Any]) -> None:
    """Whatever the library has a line for."""

    def fails(*_: object) -> None:
        raise ValueError("listener")

    for event in (JobSubmitted, JobCompleted, JobFailed, JobRetrying, JobCancelled):
        batcher.on(event, fails)
    for job in ("retried", "unknown", "no result", "done"):
        batcher.submit(job).exception(10)
    batcher.shutdown()


SCRIPT = (Away("first"), None, OutcomeUnknown("who knows"), lambda batch: [])


@pytest.mark.parametrize("kind", [MicroBatcher, InlineBatcher])
def test_every_line_of_a_batcher_begins_with_its_name(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "microbatch")

    class Telling(FaultyProcessor[str, str]):
        def process(self, batch: Any) -> Any:
            tell(logging.WARNING, "batch %s", batch.id)
            return super().process(batch)

        def close(self) -> None:
            raise ValueError("closing")

    noisy(kind(Telling(SCRIPT, retryable=(Away,)), name="payments", retry=RetryPolicy(backoff=0.01)))

    lines = [record.getMessage() for record in caplog.records if record.name.startswith("microbatch")]
    assert [line for line in lines if not line.startswith("payments: ")] == []
    for part in ("batch ", "listener", "unknown", "tried again", "closing"):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize("kind", [MicroBatcher, InlineBatcher])
def test_every_event_has_the_name_of_its_batcher(kind: Any) -> None:
    batcher = kind(FaultyProcessor(SCRIPT, retryable=(Away,)), name="payments", retry=RetryPolicy(backoff=0.01))
    told: list[Event] = []
    types = [each for each in vars(microbatch).values() if isinstance(each, type) and issubclass(each, Event)]
    for event in types:
        batcher.on(event, told.append)
    noisy(batcher)
    batcher = kind(FaultyProcessor(), name="payments", linger=10)
    batcher.on(JobCancelled, told.append)
    if kind is InlineBatcher:
        with batcher.hold():
            assert batcher.submit("cancelled").cancel()
    else:
        assert batcher.submit("cancelled").cancel()
    batcher.shutdown()

    assert {type(event) for event in told} == set(types)
    assert {event.batcher for event in told} == {"payments"}


def test_a_warning_reaches_a_program_that_configures_nothing() -> None:
    program = """
import logging, microbatch
def fails(event): raise ValueError("seen")
with microbatch.MicroBatcher(lambda batch: list(batch), name="payments") as batcher:
    batcher.on(microbatch.JobCompleted, fails)
    batcher.execute(1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert done.stderr.startswith("payments: listener")
    assert "ValueError: seen" in done.stderr
