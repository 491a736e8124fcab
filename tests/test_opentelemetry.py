"""Traces and metrics for OpenTelemetry, with its own SDK as the reader."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from microbatch import MicroBatcher, RetryPolicy, WorkerDied
from microbatch.instrumentation import opentelemetry
from microbatch.instrumentation.opentelemetry import instrument
from microbatch.judge import Judge
from microbatch.processors.postgres import PostgresProcessor
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock

PATIENCE = 30.0


class Watched:
    """Providers that keep what they are told."""

    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = self.traces.get_tracer("test")
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def instrument(self, batcher: MicroBatcher[Any, Any]) -> None:
        instrument(batcher, tracer_provider=self.traces, meter_provider=self.meters)

    @contextmanager
    def request(self, name: str = "request") -> Iterator[trace.SpanContext]:
        with self.tracer.start_as_current_span(name) as span:
            yield span.get_span_context()

    def batches(self) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name.endswith(" batch")]

    def numbers(self) -> dict[tuple[Any, ...], Any]:
        """By name and the values of the attributes but the batcher's; count and sum of a histogram."""
        data: Any = self.reader.get_metrics_data()
        found = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            for point in metric.data.data_points:
                labels = [value for label, value in sorted(point.attributes.items()) if label != "batcher"]
                value = (point.count, point.sum) if hasattr(point, "bucket_counts") else point.value
                found[(metric.name.removeprefix("microbatch."), *labels)] = value
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(opentelemetry, "_TOGETHER", -1.0)
    made = Watched()
    yield made
    made.traces.shutdown()
    made.meters.shutdown()


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


# Traces.


def test_a_batch_is_a_span_linked_to_the_span_of_each_submitter(watched: Watched) -> None:
    gate = threading.Event()
    current: list[Any] = []

    def process(batch: Any) -> None:
        assert gate.wait(PATIENCE)
        current.append(trace.get_current_span().get_span_context().span_id)

    callers: list[int] = []
    with MicroBatcher[int, None](process, name="payments") as batcher:
        watched.instrument(batcher)
        batcher.submit(0)  # outside of any span
        for n in range(3):
            with watched.request() as span:
                batcher.submit(n)
                callers.append(span.span_id)
        with watched.request() as span:
            batcher.submit_many([7, 8, 9])
            callers.append(span.span_id)
        gate.set()
    spans = watched.batches()
    assert [span for batch in spans for span in linked(batch)] == callers
    assert current == [batch.context.span_id for batch in spans]
    assert {span.name for span in spans} == {"payments batch"}
    assert all(span.parent is None for span in spans)
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_span_says_what_its_batch_was(watched: Watched) -> None:
    clock = ManualClock()

    def process(batch: Any) -> list[Any]:
        clock.advance(0.25)
        return [job if job != "bad" else ValueError("a secret") for job in batch]

    batcher = InlineBatcher[str, Any](process, clock=clock, max_batch_size=3)
    watched.instrument(batcher)
    with batcher.hold():
        batcher.submit("a")
        batcher.submit("bad", job_id="mine")
        batcher.submit("c").add_done_callback(lambda future: clock.advance(5.0))
    (span,) = watched.batches()
    attributes = dict(span.attributes or {})
    assert attributes.pop("microbatch.batch.id")
    assert attributes == {
        "microbatch.batcher": "microbatch",
        "microbatch.batch.size": 3,
        "microbatch.batch.attempt": 1,
        "microbatch.batch.trigger": "size",
        "microbatch.batch.failed": 1,
    }
    assert span.end_time is not None
    assert span.start_time is not None
    assert span.end_time - span.start_time == 250_000_000
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("microbatch.job.failed", {"microbatch.job.id": "mine", "error.type": "ValueError"})
    ]
    assert span.status.status_code is trace.StatusCode.UNSET
    assert "secret" not in span.to_json()


def test_each_attempt_has_a_span_and_a_failed_one_an_error_status(watched: Watched) -> None:
    batcher = InlineBatcher(FaultyProcessor([OSError("a secret")], retryable=(OSError,)))
    watched.instrument(batcher)
    with watched.request() as caller:
        batcher.submit(1)
    first, second = watched.batches()
    assert (first.status.status_code, first.status.description) == (trace.StatusCode.ERROR, "OSError")
    assert (first.attributes or {})["error.type"] == "OSError"
    assert (second.attributes or {})["microbatch.batch.attempt"] == 2
    assert second.status.status_code is trace.StatusCode.UNSET
    assert linked(first) == linked(second) == [caller.span_id]
    assert "secret" not in first.to_json()


def test_a_processor_that_cannot_be_opened_leaves_a_span(watched: Watched) -> None:
    processor = FaultyProcessor[int, int]()
    processor.open = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    batcher = InlineBatcher(processor)
    watched.instrument(batcher)
    assert isinstance(batcher.submit(1).exception(), ZeroDivisionError)
    (span,) = watched.batches()
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "ZeroDivisionError")


def test_workers_side_by_side_keep_their_spans_apart(watched: Watched) -> None:
    meeting = threading.Barrier(3)
    current: dict[int, int] = {}

    def process(batch: Any) -> None:
        current[batch[0]] = trace.get_current_span().get_span_context().span_id
        meeting.wait(PATIENCE)

    with MicroBatcher[int, None](process, max_batch_size=1, max_concurrent_batches=3) as batcher:
        watched.instrument(batcher)
        callers = {}
        for n in range(3):
            with watched.request() as span:
                batcher.submit(n)
                callers[n] = span.span_id
    by_span = {span.context.span_id: linked(span) for span in watched.batches()}
    assert {n: by_span[span_id] for n, span_id in current.items()} == {n: [callers[n]] for n in range(3)}


def test_P6_the_span_of_a_batch_that_a_shutdown_does_not_wait_for_ends(watched: Watched) -> None:
    entered, gate = threading.Event(), threading.Event()

    def stuck(batch: Any) -> None:
        entered.set()
        gate.wait(PATIENCE)

    batcher = MicroBatcher[int, None](stuck)
    watched.instrument(batcher)
    batcher.submit(1)
    assert entered.wait(PATIENCE)
    assert batcher.shutdown(timeout=0).finished
    gate.set()
    (span,) = watched.batches()
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "not waited for")


def test_an_interrupted_worker_leaves_no_span_open_nor_current(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Judge.results
    interrupts = [SystemExit()]
    current: list[int] = []

    def results(judge: Judge, *arguments: Any) -> Any:
        if interrupts and threading.current_thread().name.startswith("interrupted-"):
            raise interrupts.pop()
        return plain(judge, *arguments)

    def process(batch: Any) -> None:
        current.append(trace.get_current_span().get_span_context().span_id)

    monkeypatch.setattr(Judge, "results", results)
    with MicroBatcher[int, None](process, name="interrupted") as batcher:
        watched.instrument(batcher)
        assert isinstance(batcher.submit(1).exception(PATIENCE), WorkerDied)
        assert batcher.submit(2).exception(PATIENCE) is None
    first, second = watched.batches()
    assert first.status.description == "not waited for"
    assert second.status.status_code is trace.StatusCode.UNSET
    assert current == [first.context.span_id, second.context.span_id]
    assert second.parent is None


@pytest.mark.database
def test_a_refused_row_has_its_sqlstate_in_the_span_and_not_its_values(watched: Watched, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("CREATE TABLE t (n int CHECK (n < 1000))")
    with MicroBatcher[Any, Any](PostgresProcessor(database, "INSERT INTO t VALUES (%(n)s)")) as batcher:
        watched.instrument(batcher)
        good, bad = batcher.submit_many([{"n": 7}, {"n": 987654}])
        assert good.exception(PATIENCE) is None
        assert isinstance(bad.exception(PATIENCE), psycopg.errors.CheckViolation)
    (span,) = watched.batches()
    assert [dict(event.attributes or {}) for event in span.events] == [
        {"error.type": "psycopg.errors.CheckViolation", "db.response.status_code": "23514"}
    ]
    assert "987654" not in span.to_json()


def test_submitters_of_a_batcher_without_tracing_leave_nothing_behind() -> None:
    batcher = InlineBatcher(FaultyProcessor())
    assert vars(batcher.submit(1)).keys() <= {"_owner", "_sequence", "_state", "_result", "_exception"}


# Metrics.


def test_the_numbers_are_those_of_the_snapshot_and_of_events(watched: Watched) -> None:
    clock = ManualClock()

    def slow(batch: Any) -> list[Any]:
        clock.advance(0.5)
        return [ValueError() if job == "bad" else job for job in batch]

    batcher = InlineBatcher[str, Any](slow, clock=clock, max_outstanding=3)
    watched.instrument(batcher)
    with batcher.hold():
        batcher.submit_many(["a", "bad"])
        batcher.submit("cancelled").cancel()
        clock.advance(1.0)
        held = watched.numbers()
    with pytest.raises(ValueError, match="never fit"):
        batcher.submit_many("abcd")
    after = watched.numbers()
    assert (held["jobs_outstanding",], held["jobs_queued",], held["oldest_job_age",]) == (2, 2, 1.0)
    assert {key[1]: value for key, value in after.items() if key[0] == "jobs"} == {
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
        "unknown": 0,
    }
    assert {key[1]: value for key, value in after.items() if key[0] == "jobs_rejected"} == {
        "full": 0,
        "queue": 0,
        "too_many": 4,
        "threads": 0,
        "closed": 0,
    }
    assert (after["jobs_submitted",], after["jobs_isolated",], after["jobs_outstanding",]) == (3, 1, 0)
    assert after["batches", "completed", "idle"] == 1
    assert (after["batch_size",], after["batch_process",]) == ((1, 2), (1, 0.5))
    assert after["job_queue_wait",] == (2, 2.0)
    assert after["job_latency", "completed"] == after["job_latency", "failed"] == (1, 1.5)


def test_retried_batches_are_counted_as_failed_and_jobs_wait_once(watched: Watched) -> None:
    batcher = InlineBatcher(FaultyProcessor([OSError()], retryable=(OSError,)), retry=RetryPolicy())
    watched.instrument(batcher)
    batcher.submit(1)
    found = watched.numbers()
    assert (found["batches", "failed", "idle"], found["batches", "completed", "retry"]) == (1, 1)
    assert found["retries",] == 1
    assert ("job_queue_wait",) not in found


def test_a_histogram_has_bounds_for_seconds(watched: Watched) -> None:
    batcher = InlineBatcher(FaultyProcessor())
    watched.instrument(batcher)
    batcher.submit(1)
    data: Any = watched.reader.get_metrics_data()
    by_name = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    latency = by_name["microbatch.job_latency"]
    assert latency.unit == "s"
    assert latency.data.data_points[0].explicit_bounds[:3] == (0.001, 0.0025, 0.005)
    assert by_name["microbatch.batch_size"].unit == "{job}"


def test_what_a_forgotten_batcher_counted_stays_and_its_name_is_free(watched: Watched) -> None:
    for jobs in (2, 3):
        batcher = MicroBatcher[int, int](FaultyProcessor())
        watched.instrument(batcher)
        batcher.submit_many(range(jobs))
        core = weakref.ref(batcher._core)
        del batcher
        give_up = time.monotonic() + PATIENCE
        while core() is not None:
            assert time.monotonic() < give_up
            gc.collect()
            time.sleep(0.01)
    found = watched.numbers()
    assert (found["jobs", "completed"], found["jobs_submitted",]) == (5, 5)
    assert ("jobs_outstanding",) not in found


def test_a_second_call_changes_nothing_and_a_second_batcher_needs_a_name(watched: Watched) -> None:
    batcher = InlineBatcher(FaultyProcessor())
    watched.instrument(batcher)
    watched.instrument(batcher)
    with pytest.raises(ValueError, match="another batcher named 'microbatch' is instrumented already"):
        watched.instrument(InlineBatcher(FaultyProcessor()))
    batcher.submit(1)
    found = watched.numbers()
    assert (found["jobs_submitted",], found["batch_size",]) == (1, (1, 1))
    assert len(watched.batches()) == 1


def test_numbers_that_are_collected_together_are_of_one_snapshot(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opentelemetry, "_TOGETHER", PATIENCE)
    batcher = InlineBatcher(FaultyProcessor())
    watched.instrument(batcher)
    taken: list[int] = []
    stats = batcher._core.stats
    monkeypatch.setattr(batcher._core, "stats", lambda: taken.append(1) or stats())  # type: ignore[func-returns-value]
    watched.numbers()
    assert len(taken) == 1


def test_without_a_provider_nothing_is_kept_and_nothing_fails() -> None:
    batcher = InlineBatcher(FaultyProcessor([None, ValueError()]), name="without a provider")
    instrument(batcher)
    assert batcher.submit(1).exception() is None
    assert isinstance(batcher.submit(2).exception(), ValueError)
    assert batcher.shutdown().finished


def test_without_opentelemetry_the_error_is_the_pip_command() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import microbatch.instrumentation.opentelemetry"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert 'MissingExtra: pip install "opentelemetry-api>=1.30"' in done.stderr
