"""Traces and metrics for OpenTelemetry: `instrument(batcher)`.

A batch is a span of its own, current while the processor works, and linked to the span in which each of its jobs was
submitted: one batch has many callers, so it is nobody's child. Counters and gauges are observed in `stats()` when they
are collected; histograms are fed by events.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from microbatch.batcher import MicroBatcher
from microbatch.core import Core
from microbatch.errors import MissingExtra
from microbatch.events import (
    BatchCompleted,
    BatcherShutDown,
    BatchFailed,
    BatchStarted,
    JobFailed,
)
from microbatch.foreign import attribute, full_name, type_name
from microbatch.job import JobFuture
from microbatch.stats import Stats

from . import measures

try:
    from opentelemetry import context, metrics, trace
except ImportError as error:
    raise MissingExtra('pip install "opentelemetry-api>=1.30"') from error

# A collection asks for each number in turn: those that it asks for within so many seconds are of one snapshot.
_TOGETHER = 0.05


def instrument(
    batcher: MicroBatcher[Any, Any],
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> None:
    """Trace the batches of *batcher* and measure it, by default with the global providers. A second call does nothing.

    Starts no thread and holds no reference to *batcher*. What a batch writes into its span is types, SQLSTATEs and
    counts, never an error's text, which may quote a row.

    Raises:
        ValueError: another open batcher has the same name.
    """
    meter_provider = meter_provider or metrics.get_meter_provider()
    with _guard:
        export = _exports.get(meter_provider)
        if export is None:
            export = _exports[meter_provider] = _Export(meter_provider.get_meter("microbatch"))
        if export.watch(batcher):
            provider = tracer_provider or trace.get_tracer_provider()
            _Tracing(batcher._core, provider.get_tracer("microbatch")).listen(batcher)


# Guards what `instrument` changes.
_guard = threading.Lock()
_exports: weakref.WeakKeyDictionary[metrics.MeterProvider, _Export] = weakref.WeakKeyDictionary()


# Traces.


@dataclass(slots=True)
class _Open:
    """A span that has begun on a worker."""

    process: int
    batch_id: str
    span: trace.Span
    token: Any
    began: int
    failures: list[dict[str, str]] = field(default_factory=list)


class _Tracing:
    """A span for each batch, from its first event to its last, which come on one thread."""

    def __init__(self, core: Core, tracer: trace.Tracer) -> None:
        self._core = core
        self._name = f"{core.options.name} batch"
        self._tracer = tracer
        self._open: dict[int, _Open] = {}  # by worker thread

    def listen(self, batcher: MicroBatcher[Any, Any]) -> None:
        self._core.new_future = _traced_future
        batcher.on(BatchStarted, self._begin)
        batcher.on(JobFailed, self._job_failed)
        batcher.on(BatchCompleted, self._completed)
        batcher.on(BatchFailed, self._failed)
        batcher.on(BatcherShutDown, self._shut_down)

    def _begin(self, event: BatchStarted) -> None:
        self._drop_left_over()
        began = time.time_ns()
        span = self._start(event, began, event.origins)
        token = context.attach(trace.set_span_in_context(span))
        self._open[threading.get_ident()] = _Open(os.getpid(), event.batch_id, span, token, began)

    def _start(self, event: BatchStarted | BatchFailed, began: int, origins: Iterable[trace.SpanContext]) -> trace.Span:
        # Jobs that were submitted in one span are one link.
        linked = {(origin.trace_id, origin.span_id): origin for origin in origins}
        return self._tracer.start_span(
            self._name,
            context=context.Context(),
            links=[trace.Link(origin) for origin in linked.values()],
            attributes={
                "microbatch.batcher": self._core.options.name,
                "microbatch.batch.id": event.batch_id,
                "microbatch.batch.size": event.size,
                "microbatch.batch.attempt": event.attempt,
                "microbatch.batch.trigger": event.trigger,
            },
            start_time=began,
        )

    def _job_failed(self, event: JobFailed) -> None:
        here = self._open.get(threading.get_ident())
        if here is not None and here.batch_id == event.batch_id:
            job_id = {} if event.job_id is None else {"microbatch.job.id": event.job_id}
            here.failures.append({**job_id, **_facts(event.error)})

    def _completed(self, event: BatchCompleted) -> None:
        here = self._open.pop(threading.get_ident(), None)
        if here is not None:
            here.span.set_attribute("microbatch.batch.failed", event.failed)
            self._end(here, event.seconds)

    def _failed(self, event: BatchFailed) -> None:
        here = self._open.pop(threading.get_ident(), None)
        if here is None:
            # The processor could not be opened for it, so it never began.
            began = time.time_ns()
            here = _Open(os.getpid(), event.batch_id, self._start(event, began, ()), None, began)
        here.span.set_status(trace.StatusCode.ERROR, type_name(event.error))
        here.span.set_attributes(_facts(event.error))
        self._end(here, event.seconds)

    def _end(self, here: _Open, seconds: float) -> None:
        if here.token is not None:
            context.detach(here.token)
        # Callbacks come before the last event and are no part of the batch.
        end = here.began + int(seconds * 1e9)
        for facts in here.failures:
            here.span.add_event("microbatch.job.failed", facts, timestamp=end)
        here.span.end(end)

    def _drop_left_over(self) -> None:
        """What an interrupted worker, or the parent of a forked child, had begun on this thread."""
        here = self._open.pop(threading.get_ident(), None)
        if here is not None and here.process == os.getpid():
            context.detach(here.token)
            _give_up(here)

    def _shut_down(self, event: BatcherShutDown) -> None:
        """End the spans of batches that the shutdown did not wait for."""
        while self._open:
            _, here = self._open.popitem()
            if here.process == os.getpid():
                _give_up(here)


def _give_up(here: _Open) -> None:
    here.span.set_status(trace.StatusCode.ERROR, "not waited for")
    here.span.end()


def _traced_future(core: Core) -> JobFuture[Any]:
    future: JobFuture[Any] = JobFuture(core)
    origin = trace.get_current_span().get_span_context()
    if origin.is_valid:
        future._origin = origin
    return future


def _facts(error: BaseException) -> dict[str, str]:
    sqlstate = attribute(error, "sqlstate")
    facts = {"error.type": full_name(error)}
    return {**facts, "db.response.status_code": sqlstate} if type(sqlstate) is str else facts


# Metrics.


Totals = dict[tuple[str, str, str], float]  # by batcher, measure and label


class _Export:
    """The instruments of one meter provider, and the batchers that are observed."""

    def __init__(self, meter: metrics.Meter) -> None:
        # What batchers that are gone have counted, and those that are there. Replaced as a whole, so that none is
        # counted twice, and observing needs no lock, which a fork might leave locked.
        self._state: tuple[Totals, tuple[weakref.ref[_Watcher], ...]] = {}, ()
        self.batches = meter.create_counter(_named(measures.ENDED), measures.ENDED_UNIT, measures.ENDED_HELP)
        self.size, self.process, self.wait, self.latency = (
            meter.create_histogram(
                _named(kind.name), kind.unit, kind.help, explicit_bucket_boundaries_advisory=kind.bounds
            )
            for kind in (measures.BATCHES, measures.PROCESS, measures.WAIT, measures.LATENCY)
        )
        for create, observed in (
            (meter.create_observable_counter, measures.COUNTERS),
            (meter.create_observable_gauge, measures.GAUGES),
        ):
            for measure in observed:
                create(_named(measure.name), [self._observer(measure)], measure.unit, measure.help)

    def watch(self, batcher: MicroBatcher[Any, Any]) -> bool:
        """False if it is watched already."""
        core = batcher._core
        past, watchers = self._now()
        if any(watcher.core is core for watcher in watchers):
            return False
        measures.check_name(core, [watcher.core for watcher in watchers])
        watcher = _Watcher(core, self)
        watcher.listen(batcher)
        self._state = past, tuple(map(weakref.ref, (*watchers, watcher)))
        return True

    def retire(self, watcher: _Watcher) -> None:
        """Keep what *watcher* has counted: its batcher is shut down and may go."""
        with _guard:
            past, watchers = self._now()
            left = [other for other in watchers if other is not watcher]
            self._state = _plus(past, watcher.name, watcher.core.stats()), tuple(map(weakref.ref, left))

    def _now(self) -> tuple[Totals, list[_Watcher]]:
        past, references = self._state
        return past, [watcher for reference in references if (watcher := reference()) is not None]

    def _observer(self, measure: measures.Measure) -> Callable[[metrics.CallbackOptions], list[metrics.Observation]]:
        return lambda options: self._observe(measure)

    def _observe(self, measure: measures.Measure) -> list[metrics.Observation]:
        past, watchers = self._now()
        found = {key: number for key, number in past.items() if key[1] == measure.name}
        for watcher in watchers:
            for label, number in measure.read(watcher.stats()).items():
                key = watcher.name, measure.name, label
                found[key] = found.get(key, 0) + number
        return [
            metrics.Observation(number, {"batcher": name, measure.label: label} if label else {"batcher": name})
            for (name, _, label), number in found.items()
        ]


def _named(name: str) -> str:
    """The unit is no part of a name here."""
    return "microbatch." + name.removesuffix("_seconds").removesuffix("_jobs")


def _plus(past: Totals, name: str, stats: Stats) -> Totals:
    total = dict(past)
    for measure in measures.COUNTERS:
        for label, number in measure.read(stats).items():
            total[name, measure.name, label] = total.get((name, measure.name, label), 0) + number
    return total


class _Watcher(measures.Watcher):
    """Feeds the histograms of one batcher."""

    def __init__(self, core: Core, export: _Export) -> None:
        super().__init__(core)
        self._export = export
        self._here = {"batcher": self.name}
        self._snapshot: tuple[float, Stats] | None = None

    def stats(self) -> Stats:
        now, snapshot = time.monotonic(), self._snapshot
        if snapshot is None or now - snapshot[0] > _TOGETHER:
            self._snapshot = snapshot = now, self.core.stats()
        return snapshot[1]

    def latency(self, seconds: float, outcome: str) -> None:
        self._export.latency.record(seconds, {**self._here, "outcome": outcome})

    def wait(self, seconds: float) -> None:
        self._export.wait.record(seconds, self._here)

    def batch(self, size: int, seconds: float, trigger: str, outcome: str) -> None:
        self._export.size.record(size, self._here)
        self._export.process.record(seconds, self._here)
        self._export.batches.add(1, {**self._here, "trigger": trigger, "outcome": outcome})

    def shut_down(self) -> None:
        self._export.retire(self)
