"""What is measured, in one table for every tool: what is read from a snapshot, and what events are collected into."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from microbatch.batcher import MicroBatcher
from microbatch.core import Core, listeners_locks
from microbatch.events import BatchCompleted, BatcherShutDown, BatchFailed, JobCompleted, JobFailed
from microbatch.foreign import is_unknown
from microbatch.stats import TRIGGERS, Stats

OUTCOMES = ("completed", "failed", "cancelled", "unknown")
LATENCY_OUTCOMES = ("completed", "failed", "unknown")
BATCH_OUTCOMES = ("completed", "failed")

# From a local socket to the longest delivery timeouts.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0),
)
_SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a snapshot. *read* gives it by the value of *label*; "" where there is no label, {} for no number.

    *name* is as Prometheus wants it, without prefix and `_total`; *unit* as OpenTelemetry wants it.
    """

    name: str
    unit: str
    help: str
    read: Callable[[Stats], Mapping[str, float]]
    label: str = ""
    across: str = "livesum"  # how prometheus_client puts a gauge of several processes together


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many values of one kind, from events."""

    name: str
    unit: str
    help: str
    bounds: tuple[float, ...]
    label: str = ""


COUNTERS = (
    Measure("jobs_submitted", "{job}", "Jobs accepted.", lambda stats: {"": stats.submitted}),
    Measure(
        "jobs",
        "{job}",
        "Jobs by outcome.",
        lambda stats: {outcome: getattr(stats, outcome) for outcome in OUTCOMES},
        label="outcome",
    ),
    Measure("jobs_isolated", "{job}", "Jobs that failed alone.", lambda stats: {"": stats.isolated}),
    Measure("jobs_rejected", "{job}", "Jobs refused.", lambda stats: stats.rejections, label="reason"),
    Measure("retries", "{attempt}", "Attempts after a job's first.", lambda stats: {"": stats.retries}),
    Measure("late_results", "{result}", "Results dropped after a deadline.", lambda stats: {"": stats.late_results}),
    Measure("blocked_submits", "{call}", "Submits that met a full batcher.", lambda stats: {"": stats.blocked_submits}),
    Measure("blocked_seconds", "s", "How long those waited.", lambda stats: {"": stats.blocked_seconds}),
)

GAUGES = (
    Measure("jobs_outstanding", "{job}", "Accepted jobs without an outcome.", lambda stats: {"": stats.outstanding}),
    Measure("jobs_queued", "{job}", "Those that no worker has taken.", lambda stats: {"": stats.queued}),
    Measure(
        "oldest_job_age_seconds",
        "s",
        "Age of the oldest outstanding job.",
        lambda stats: {"": stats.oldest_age},
        across="livemax",
    ),
    Measure(
        "consecutive_failures",
        "{batch}",
        "Batches that failed since the last one that did not.",
        lambda stats: {"": stats.consecutive_failures},
        across="livemax",
    ),
    Measure(
        "last_success_timestamp_seconds",
        "s",
        "When a batch last did not fail.",
        lambda stats: {} if stats.last_success is None else {"": time.time() - stats.last_success},
        across="max",
    ),
)

BATCHES = Distribution("batch_size_jobs", "{job}", "Jobs in a batch.", _SIZES)
PROCESS = Distribution("batch_process_seconds", "s", "Time of a batch inside the processor.", _SECONDS)
WAIT = Distribution("job_queue_wait_seconds", "s", "From submit to the begin of the first batch.", _SECONDS)
LATENCY = Distribution("job_latency_seconds", "s", "From submit to outcome.", _SECONDS, label="outcome")

# Counted by events, for the snapshot does not know how a batch ended.
ENDED, ENDED_UNIT, ENDED_HELP = "batches", "{batch}", "Batches by trigger and outcome."
ENDED_LABELS = ("trigger", "outcome")
ENDS = tuple((trigger, outcome) for trigger in TRIGGERS for outcome in BATCH_OUTCOMES)


# Held while a value is written: the tools guard their values with locks that know nothing of forks, and a child that
# inherits one in another thread's hands would hang at its first value.
writing = threading.RLock()
listeners_locks.append(writing)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=writing.acquire, after_in_parent=writing.release, after_in_child=writing.release)


class Watcher:
    """Turns one batcher's events into values for a tool, which overrides the methods on top.

    They are called with `writing` held. The listeners keep it alive; it holds the core, never the batcher.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.name = core.options.name

    def latency(self, seconds: float, outcome: str) -> None:
        raise NotImplementedError

    def wait(self, seconds: float) -> None:
        raise NotImplementedError

    def batch(self, size: int, seconds: float, trigger: str, outcome: str) -> None:
        raise NotImplementedError

    def shut_down(self) -> None:
        """Every number is final. Without `writing`."""
        raise NotImplementedError

    def listen(self, batcher: MicroBatcher[Any, Any]) -> None:
        batcher.on(JobCompleted, self._completed)
        batcher.on(JobFailed, self._failed)
        batcher.on(BatchCompleted, lambda event: self._batch(event, "completed"))
        batcher.on(BatchFailed, lambda event: self._batch(event, "failed"))
        batcher.on(BatcherShutDown, lambda event: self.shut_down())

    def _completed(self, event: JobCompleted) -> None:
        with writing:
            self.latency(event.seconds, "completed")
            if event.attempt == 1:
                self.wait(event.waited)

    def _failed(self, event: JobFailed) -> None:
        with writing:
            self.latency(event.seconds, "unknown" if is_unknown(event.error) else "failed")
            if event.attempt == 1 and event.waited is not None:
                self.wait(event.waited)

    def _batch(self, event: BatchCompleted | BatchFailed, outcome: str) -> None:
        with writing:
            self.batch(event.size, event.seconds, event.trigger, outcome)


def check_name(core: Core, others: Iterable[Core]) -> None:
    """Two batchers of one name would be one and the same time series.

    Raises:
        ValueError: another open batcher has the name already.
    """
    name = core.options.name
    if any(other.options.name == name and not other.closed for other in others):
        raise ValueError(f"another batcher named {name!r} is instrumented already; give each a name=… of its own")
