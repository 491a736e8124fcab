"""Metrics for Prometheus: `instrument(batcher)`, and `scrape()` for the application's `/metrics`.

Counters and gauges come from `stats()` when they are asked for; histograms are fed by events. In the multi-process
mode of prometheus_client (`PROMETHEUS_MULTIPROC_DIR`) nobody can ask another process, so each process that has
something outstanding writes its numbers down once a second, on a thread of its own.
"""

from __future__ import annotations

import glob
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from microbatch.batcher import MicroBatcher
from microbatch.core import Core
from microbatch.errors import MissingExtra
from microbatch.events import JobSubmitted
from microbatch.interpreter import Token
from microbatch.stats import Stats

from . import measures

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric, values
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingExtra('pip install "prometheus-client>=0.20"') from error

PREFIX = "microbatch_"
INTERVAL = 1.0  # seconds between two looks of the multi-process mode


def instrument(batcher: MicroBatcher[Any, Any], registry: CollectorRegistry = REGISTRY) -> None:
    """Let *registry* have the numbers of *batcher*, labelled with its name. A second call changes nothing.

    Starts no thread and holds no reference to *batcher*. Works before and after a fork.

    Raises:
        ValueError: another open batcher has the same name; `PROMETHEUS_MULTIPROC_DIR` is no directory.
    """
    if multiprocess():
        _directory()
    with _guard:
        export = _exports.get(registry)
        if export is None:
            export = _exports[registry] = _Export()
            registry.register(export)
        export.watch(batcher)


def scrape(accept: str = "", registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """What `/metrics` answers: the body, and its content type, which goes by the request's header *accept*.

    In the multi-process mode it adds up all processes, and *registry* is that of this process.
    """
    if multiprocess():
        export = _exports.get(registry)
        if export is not None:
            export.sync()
        registry = CollectorRegistry()
        registry.register(_AllProcesses())
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


def multiprocess() -> bool:
    """Whether prometheus_client keeps its values in files that processes share."""
    return values.ValueClass is not values.MutexValue


# Guards what `instrument` changes.
_guard = threading.Lock()
_exports: weakref.WeakKeyDictionary[CollectorRegistry, _Export] = weakref.WeakKeyDictionary()


class _AllProcesses(Collector):
    """prometheus_client's own collector stumbles over a file that another process is just creating."""

    def collect(self) -> Iterable[Metric]:
        written = [path for path in glob.glob(os.path.join(_directory(), "*.db")) if _size(path)]
        return MultiProcessCollector.merge(written, accumulate=True)  # type: ignore[no-untyped-call,no-any-return]


def _directory() -> str:
    path = os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
    if not os.path.isdir(path):
        raise ValueError(f"PROMETHEUS_MULTIPROC_DIR={path!r} is no directory; make it before the processes start")
    return path


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0  # of a process that has just ended


class _Export(Collector):
    """The metrics of one registry. They are read when they are collected, and are not registered themselves."""

    def __init__(self) -> None:
        self.counters = [(measure, _family(Counter, measure)) for measure in measures.COUNTERS]
        self.gauges = [
            (measure, _family(Gauge, measure, multiprocess_mode=measure.across)) for measure in measures.GAUGES
        ]
        self.batches = Counter(
            PREFIX + measures.ENDED, measures.ENDED_HELP, ("batcher", *measures.ENDED_LABELS), registry=None
        )
        self.size, self.process, self.wait, self.latency = (
            _family(Histogram, distribution, buckets=distribution.bounds)
            for distribution in (measures.BATCHES, measures.PROCESS, measures.WAIT, measures.LATENCY)
        )
        # Replaced as a whole, so that collecting needs no lock, which a fork might leave locked.
        self._watchers: tuple[weakref.ref[_Watcher], ...] = ()

    def watch(self, batcher: MicroBatcher[Any, Any]) -> None:
        core = batcher._core
        watchers = self._living()
        if all(watcher.core is not core for watcher in watchers):
            measures.check_name(core, [watcher.core for watcher in watchers])
            watcher = _Watcher(core, self)
            watcher.listen(batcher)
            self._watchers = tuple(map(weakref.ref, (*watchers, watcher)))

    def sync(self) -> None:
        """Bring counters and gauges of this process up to date."""
        for watcher in self._living():
            watcher.share().sync()

    def _living(self) -> list[_Watcher]:
        return [watcher for reference in self._watchers if (watcher := reference()) is not None]

    def describe(self) -> Iterable[Metric]:
        return [metric for family in self._families() for metric in family.describe()]

    def collect(self) -> Iterable[Metric]:
        self.sync()
        with measures.writing:  # reading takes the same locks
            return [metric for family in self._families() for metric in family.collect()]

    def _families(self) -> list[Any]:
        measured = [family for _, family in (*self.counters, *self.gauges)]
        return [*measured, self.batches, self.size, self.process, self.wait, self.latency]


def _family(kind: Callable[..., Any], measured: measures.Measure | measures.Distribution, **options: Any) -> Any:
    labels = ("batcher", measured.label) if measured.label else ("batcher",)
    return kind(PREFIX + measured.name, measured.help, labels, registry=None, **options)


class _Watcher(measures.Watcher):
    """Fills the metrics of one batcher."""

    def __init__(self, core: Core, export: _Export) -> None:
        super().__init__(core)
        self._counters = export.counters
        self._gauges = export.gauges
        self._size = export.size.labels(self.name).observe
        self._process = export.process.labels(self.name).observe
        self._wait = export.wait.labels(self.name).observe
        # Made beforehand, as series that begin with 0: a rate needs two points.
        self._latency = {
            outcome: export.latency.labels(self.name, outcome).observe for outcome in measures.LATENCY_OUTCOMES
        }
        self._batches = {end: export.batches.labels(self.name, *end).inc for end in measures.ENDS}
        self._shares: dict[int, _Share] = {}

    def latency(self, seconds: float, outcome: str) -> None:
        self._latency[outcome](seconds)

    def wait(self, seconds: float) -> None:
        self._wait(seconds)

    def batch(self, size: int, seconds: float, trigger: str, outcome: str) -> None:
        self._size(size)
        self._process(seconds)
        self._batches[trigger, outcome]()

    def shut_down(self) -> None:
        self.share().end()

    def listen(self, batcher: MicroBatcher[Any, Any]) -> None:
        super().listen(batcher)
        if multiprocess():
            batcher.on(JobSubmitted, lambda event: self.share().wake())

    def share(self) -> _Share:
        """That of this process: a forked child counts from 0 while its parent's numbers stand."""
        pid = os.getpid()
        share = self._shares.get(pid)
        return share or self._shares.setdefault(pid, _Share(self.core, self._counters, self._gauges))


class _Share:
    """What one process has put into the metrics of a batcher, and the thread that does so in multi-process mode."""

    def __init__(self, core: Core, counters: list[Any], gauges: list[Any]) -> None:
        self._core = core
        self._name = core.options.name
        self._counters = counters
        self._gauges = gauges
        # Guards `_counted`: two scrapes at once must not add the same growth twice.
        self._lock = threading.Lock()
        self._counted: dict[tuple[str, str], float] = {}
        self._asleep = True
        self._threads: list[threading.Thread] = []
        self._bell = Token()
        self._over = False

    def sync(self) -> int:
        """Bring counters and gauges up to date, from any thread; how many jobs are outstanding."""
        with self._lock:
            stats = self._core.stats()
            with measures.writing:
                self._write(stats)
        return stats.outstanding

    def _write(self, stats: Stats) -> None:
        for measure, family in self._counters:
            for label, number in measure.read(stats).items():
                self._child(family, label).inc(number - self._counted.get((measure.name, label), 0))
                self._counted[measure.name, label] = number
        for measure, family in self._gauges:
            for label, number in measure.read(stats).items():
                self._child(family, label).set(number)

    def wake(self) -> None:
        """Have the thread look every `INTERVAL` for as long as there is something outstanding."""
        if not self._asleep:
            return
        try:
            # Before the thread is woken: if it falls asleep again at once, that has the last word.
            self._asleep = False
            if self._threads:
                self._bell.put()
            else:
                # No lock: a finaliser that submits may run in here. A surplus thread leaves.
                threading.Thread(target=self._run, name=f"{self._name}-metrics", daemon=True).start()
        except RuntimeError:
            self._asleep = True  # no more threads: the next submit tries again, and the last event brings the rest
        except BaseException:
            self._asleep = True
            raise

    def end(self) -> None:
        """After the last event: the numbers as they stay."""
        self.sync()
        self._over = True
        self._bell.put()

    def _child(self, family: Any, label: str) -> Any:
        return family.labels(self._name, label) if label else family.labels(self._name)

    def _run(self) -> None:
        self._threads.append(threading.current_thread())
        if self._threads[0] is threading.current_thread():
            while not (self._pause() if self._look() else self._rest()):
                pass

    def _look(self) -> bool:
        # Before the look: a job that is submitted after it rings.
        self._asleep = True
        if not self.sync():
            return False
        self._asleep = False
        return True

    def _rest(self) -> bool:
        """Sleep until somebody rings; whether it was for the end."""
        self._bell.take()
        return self._over

    def _pause(self) -> bool:
        """Whether the end came."""
        give_up = time.monotonic() + INTERVAL
        while not self._over and (left := give_up - time.monotonic()) > 0:
            self._bell.take(left)
        return self._over
