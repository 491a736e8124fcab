"""Metrics for Prometheus: what a scrape says is what happened, in one process and in many."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from docutils import nodes
from exposition import Samples, samples
from programs import PREAMBLE, run
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from test_gunicorn import Clients, Server
from test_readme import README, ROOT, Names, as_uri, blocks, parsed, run_blocks

from microbatch import BatcherClosed, MicroBatcher, OutcomeUnknown, QueueFull, RetryPolicy
from microbatch.instrumentation import prometheus
from microbatch.instrumentation.prometheus import instrument, scrape
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock

PATIENCE = 30.0
PAGE = ROOT / "docs" / "metrics.rst"
BOARD = ROOT / "examples" / "grafana.json"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def numbers(registry: CollectorRegistry) -> Samples:
    body, content_type = scrape(registry=registry)
    assert content_type.startswith("text/plain")
    return samples(body.decode())


def buckets(registry: CollectorRegistry, name: str) -> dict[float, float]:
    """What each bucket of a histogram has of its own."""
    found, below = {}, 0.0
    for family in parse_text(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name == f"microbatch_{name}_bucket" and sample.value > below:
                found[float(sample.labels["le"])] = sample.value - below
                below = sample.value
    return found


# One process.


def test_each_number_of_the_snapshot_is_there_under_its_name(registry: CollectorRegistry) -> None:
    processor = FaultyProcessor[Any, Any](
        [lambda batch: [1, ValueError(), 3], OSError(), OSError(), OutcomeUnknown()], retryable=(OSError,)
    )
    batcher = InlineBatcher(processor, max_outstanding=3, retry=RetryPolicy(max_attempts=2))
    instrument(batcher, registry)
    batcher.submit_many([1, 2, 3])
    batcher.submit("tried twice")
    batcher.submit("unknown")
    with batcher.hold():
        batcher.submit("cancelled").cancel()
        batcher.submit_many("abc")
        with pytest.raises(QueueFull):
            batcher.submit("full")
        batcher.clock.advance(2.0)
        held = numbers(registry)
    with pytest.raises(ValueError, match="never fit"):
        batcher.submit_many("abcd")
    batcher.shutdown()
    with pytest.raises(BatcherClosed):
        batcher.submit("closed")

    assert (held["jobs_outstanding",], held["jobs_queued",], held["oldest_job_age_seconds",]) == (3, 3, 2.0)
    assert held["consecutive_failures",] == 3
    after = numbers(registry)
    assert {key: value for key, value in after.items() if key[0] in ("jobs_total", "jobs_rejected_total")} == {
        ("jobs_total", "completed"): 5,
        ("jobs_total", "failed"): 2,
        ("jobs_total", "cancelled"): 1,
        ("jobs_total", "unknown"): 1,
        ("jobs_rejected_total", "full"): 1,
        ("jobs_rejected_total", "queue"): 0,
        ("jobs_rejected_total", "too_many"): 4,
        ("jobs_rejected_total", "threads"): 0,
        ("jobs_rejected_total", "closed"): 1,
    }
    assert (after["jobs_submitted_total",], after["jobs_isolated_total",], after["retries_total",]) == (9, 1, 1)
    assert (after["jobs_outstanding",], after["oldest_job_age_seconds",], after["consecutive_failures",]) == (0, 0, 0)


def test_submits_that_wait_are_counted_with_their_seconds(registry: CollectorRegistry) -> None:
    entered, gate = threading.Event(), threading.Event()

    def stuck(batch: Any) -> None:
        entered.set()
        assert gate.wait(PATIENCE)

    with MicroBatcher[int, None](stuck, max_outstanding=1) as batcher:
        instrument(batcher, registry)
        batcher.submit(1)
        assert entered.wait(PATIENCE)
        with pytest.raises(QueueFull):
            batcher.submit(2, submit_timeout=0.02)
        gate.set()
    after = numbers(registry)
    assert (after["blocked_submits_total",], after["jobs_rejected_total", "full"]) == (1, 1)
    assert 0.02 <= after["blocked_seconds_total",] < PATIENCE


def test_batches_are_counted_by_trigger_and_outcome(registry: CollectorRegistry) -> None:
    batcher = InlineBatcher(FaultyProcessor([None, OSError(), None, None]), max_batch_size=3, retry=RetryPolicy())
    batcher._core.processor.is_retryable = lambda error: True
    instrument(batcher, registry)
    batcher.submit_many([1, 2, 3])
    batcher.submit(4)
    with batcher.hold():
        batcher.submit(5)
        batcher.flush()
    found = {key[1:]: value for key, value in numbers(registry).items() if key[0] == "batches_total" and value}
    assert found == {
        ("completed", "size"): 1,
        ("failed", "idle"): 1,
        ("completed", "retry"): 1,
        ("completed", "flush"): 1,
    }


def test_times_and_sizes_fall_into_their_buckets(registry: CollectorRegistry) -> None:
    clock = ManualClock()

    def slow(batch: Any) -> list[Any]:
        clock.advance(0.3)
        return [ValueError() if job == "bad" else job for job in batch]

    batcher = InlineBatcher[str, Any](slow, clock=clock)
    instrument(batcher, registry)
    with batcher.hold():
        batcher.submit_many(["a", "b", "bad"])
        clock.advance(0.02)
    with batcher.hold():
        batcher.submit("expired", delivery_timeout=1)
        clock.advance(2)
    assert buckets(registry, "batch_size_jobs") == {5.0: 1}
    assert buckets(registry, "batch_process_seconds") == {0.5: 1}
    assert buckets(registry, "job_queue_wait_seconds") == {0.025: 3}
    after = numbers(registry)
    assert after["job_latency_seconds_count", "completed"] == 2
    assert after["job_latency_seconds_sum", "completed"] == pytest.approx(0.64)
    assert after["job_latency_seconds_count", "failed"] == 2
    assert after["job_latency_seconds_sum", "failed"] == pytest.approx(2.32)


def test_only_the_first_batch_of_a_job_counts_as_waiting(registry: CollectorRegistry) -> None:
    batcher = InlineBatcher(FaultyProcessor([OSError()], retryable=(OSError,)))
    instrument(batcher, registry)
    batcher.submit(1)
    assert numbers(registry)["job_queue_wait_seconds_count",] == 0
    batcher.submit(2)
    assert numbers(registry)["job_queue_wait_seconds_count",] == 1


def test_a_scrape_of_some_names_is_as_fresh_as_one_of_all(registry: CollectorRegistry) -> None:
    batcher = InlineBatcher(FaultyProcessor())
    instrument(batcher, registry)
    batcher.submit(1)
    body = generate_latest(registry.restricted_registry(["microbatch_jobs_submitted_total"])).decode()
    assert samples(body) == {("jobs_submitted_total",): 1}


def test_openmetrics_is_answered_to_who_accepts_it(registry: CollectorRegistry) -> None:
    instrument(InlineBatcher(FaultyProcessor()), registry)
    body, content_type = scrape("application/openmetrics-text; version=1.0.0", registry)
    assert content_type.startswith("application/openmetrics-text")
    assert "microbatch_jobs" in {family.name for family in parse_openmetrics(body.decode())}


def test_scrapes_at_once_count_nothing_twice(registry: CollectorRegistry) -> None:
    batcher = InlineBatcher(FaultyProcessor())
    instrument(batcher, registry)
    for _ in range(20):
        batcher.submit_many(range(50))
        threads = [threading.Thread(target=generate_latest, args=(registry,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert numbers(registry)["jobs_submitted_total",] == 1000


def test_a_second_call_changes_nothing(registry: CollectorRegistry) -> None:
    batcher = InlineBatcher(FaultyProcessor())
    instrument(batcher, registry)
    instrument(batcher, registry)
    batcher.submit(1)
    after = numbers(registry)
    assert (after["jobs_submitted_total",], after["batch_size_jobs_count",]) == (1, 1)


def test_two_open_batchers_need_two_names(registry: CollectorRegistry) -> None:
    first, second = InlineBatcher(FaultyProcessor()), InlineBatcher(FaultyProcessor())
    other = InlineBatcher(FaultyProcessor(), name="other")
    instrument(first, registry)
    instrument(other, registry)
    with pytest.raises(
        ValueError, match="another batcher named 'microbatch' is instrumented already; give each a name"
    ):
        instrument(second, registry)
    first.submit(1)
    first.shutdown()
    instrument(second, registry)
    second.submit(2)
    other.submit_many([3, 4, 5])
    body = generate_latest(registry).decode()
    assert 'microbatch_jobs_submitted_total{batcher="microbatch"} 2.0' in body
    assert 'microbatch_jobs_submitted_total{batcher="other"} 3.0' in body


def test_a_forgotten_batcher_is_collected_and_its_numbers_stay(registry: CollectorRegistry) -> None:
    batcher = MicroBatcher[int, int](FaultyProcessor())
    instrument(batcher, registry)
    batcher.submit_many(range(5))
    core = weakref.ref(batcher._core)
    del batcher
    give_up = time.monotonic() + PATIENCE
    while core() is not None:
        assert time.monotonic() < give_up
        gc.collect()
        time.sleep(0.01)
    after = numbers(registry)
    assert (after["jobs_total", "completed"], after["jobs_outstanding",]) == (5, 0)


def test_a_batcher_that_nobody_instruments_tells_nothing() -> None:
    batcher = InlineBatcher(FaultyProcessor())
    assert not batcher._core.listeners.by_type


def test_without_prometheus_client_the_error_is_the_pip_command() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import microbatch.instrumentation.prometheus"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert 'MissingExtra: pip install "prometheus-client>=0.20"' in done.stderr


# Several processes.

SHARED = """\
import json
from microbatch.instrumentation.prometheus import instrument, scrape
from exposition import samples

def numbers():
    return samples(scrape()[0].decode())

def wait_for(key, value):
    give_up = time.monotonic() + 20
    while (seen := numbers().get(key)) != value:
        assert time.monotonic() < give_up, (key, seen, value)
        time.sleep(0.02)
"""


def run_shared(tmp_path: Path, script: str) -> None:
    values = tmp_path / "values"
    values.mkdir()
    told = run(
        script,
        tmp_path,
        preamble=PREAMBLE + f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + SHARED,
        PROMETHEUS_MULTIPROC_DIR=str(values),
    )
    told.assert_quiet()


def test_P7_processes_add_up_and_a_stuck_one_is_seen_from_another(tmp_path: Path) -> None:
    run_shared(
        tmp_path,
        """
        # A file that somebody is just creating.
        open(os.path.join(os.environ["PROMETHEUS_MULTIPROC_DIR"], "counter_999999999.db"), "w").close()
        processor = Gated()
        batcher = MicroBatcher(processor, max_outstanding=5)
        instrument(batcher)
        ours, theirs = os.pipe()

        def work():
            stuck = Gated()
            batcher._core.processor.process = stuck.process
            futures = batcher.submit_many(range(5))
            try:
                batcher.submit("no room", submit_timeout=0)
            except QueueFull:
                pass
            os.read(ours, 1)
            stuck.gate.set()
            assert [future.result() for future in futures] == list(range(5))
            batcher.shutdown()

        processor.gate.set()
        batcher.execute("before the fork")
        pids = [child(work), child(work)]
        wait_for(("jobs_outstanding",), 10)
        wait_for(("jobs_rejected_total", "full"), 2)
        assert numbers()[("oldest_job_age_seconds",)] > 0
        os.write(theirs, b"xx")
        for pid in pids:
            join(pid)
        batcher.submit_many(["after", "it"])
        batcher.shutdown()
        found = numbers()
        assert (found["jobs_submitted_total",], found["jobs_total", "completed"]) == (13, 13), found
        assert (found["job_latency_seconds_count", "completed"], found["jobs_outstanding",]) == (13, 0), found
        assert found["batch_size_jobs_sum",] == 13, found
        """,
    )


def test_a_directory_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    told = run(
        """
        from microbatch.instrumentation.prometheus import instrument

        instrument(MicroBatcher(lambda batch: None))
        """,
        tmp_path,
        PROMETHEUS_MULTIPROC_DIR="/nowhere",
    )
    assert "ValueError: PROMETHEUS_MULTIPROC_DIR='/nowhere' is no directory; make it before" in told.stderr


def test_P7_a_fork_waits_until_nobody_is_in_the_middle_of_a_value(tmp_path: Path) -> None:
    told = run(
        """
        from microbatch.instrumentation.measures import writing
        middle, forking = threading.Event(), threading.Event()
        inside = []

        def write():
            with writing:
                inside.append("half")
                middle.set()
                forking.wait(0.2)
                inside.clear()

        threading.Thread(target=write).start()
        middle.wait()
        join(child(lambda: note("inside", *inside, writing.acquire(timeout=1))))
        """,
        tmp_path,
    )
    told.assert_quiet()
    assert told.said("inside") == ["True"]


def test_the_thread_looks_only_while_something_is_outstanding(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prometheus, "multiprocess", lambda: True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    looks: list[int] = []
    entered, gate = threading.Event(), threading.Event()
    looked = threading.Semaphore(0)

    def stuck(batch: Any) -> None:
        entered.set()
        assert gate.wait(PATIENCE)

    def sync(share: Any) -> int:
        looks.append(outstanding := plain(share))
        looked.release()
        return outstanding

    plain = prometheus._Share.sync
    monkeypatch.setattr(prometheus._Share, "sync", sync)
    monkeypatch.setattr(prometheus, "INTERVAL", 0.01)
    with MicroBatcher[int, None](stuck, name="watched") as batcher:
        instrument(batcher, registry)
        batcher.submit(1)
        assert entered.wait(PATIENCE)
        for _ in range(3):
            assert looked.acquire(timeout=PATIENCE)
        gate.set()
        batcher.flush()
        share = next(iter(registry_watcher(registry)._shares.values()))
        wait_until(lambda: share._asleep and looks[-1] == 0)
        seen = len(looks)
        assert looks[seen - 1] == 0
        assert 1 in looks
        batcher.submit(2).result(PATIENCE)
        wait_until(lambda: share._asleep and len(looks) > seen)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "watched-metrics"])


def test_a_thread_that_falls_asleep_while_it_is_being_woken_is_woken_again(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prometheus, "multiprocess", lambda: True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with MicroBatcher[int, None](lambda batch: None, name="watched") as batcher:
        instrument(batcher, registry)
        share = registry_watcher(registry).share()
        monkeypatch.setattr(share, "_threads", [threading.current_thread()])
        bell, rings = share._bell, []

        class Bell:
            def put(self) -> None:
                rings.append(len(rings))
                bell.put()
                if len(rings) == 1:
                    wait_until(lambda: not batcher.stats().outstanding)
                    assert not share._look()  # by the other thread, which finds nothing

        monkeypatch.setattr(share, "_bell", Bell())
        batcher.submit(1).result(PATIENCE)
        batcher.submit(2).result(PATIENCE)
        assert len(rings) == 2


def registry_watcher(registry: CollectorRegistry) -> Any:
    (watcher,) = prometheus._exports[registry]._living()
    return watcher


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


class Scraped(Server):
    """gunicorn as the page on metrics has it."""

    def __init__(self, directory: Path) -> None:
        (directory / "values").mkdir()
        settings = Path(__file__).parent / "scripts" / "metrics_settings.py"
        super().__init__(
            directory,
            *("--config", str(settings), "--threads", "4"),
            application="metrics_web:application",
            PROMETHEUS_MULTIPROC_DIR=str(directory / "values"),
        )

    def numbers(self) -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return samples(answer.read().decode())

    def wait_for(self, wanted: dict[tuple[str, ...], float]) -> Samples:
        """Until all of it is there: events come a moment after the outcomes that a client has seen."""
        give_up = time.monotonic() + PATIENCE
        while not wanted.items() <= (found := self.numbers()).items():
            assert time.monotonic() < give_up, (wanted, found)
            time.sleep(0.02)
        return found


def test_any_worker_of_gunicorn_answers_for_all_of_them_also_for_those_that_are_gone(tmp_path: Path) -> None:
    with Scraped(tmp_path) as server:
        clients = Clients(server)
        try:
            clients.wait_for(200)
            wait_until(lambda: len(processes(server.lines())) == 2)
            gone = processes(server.lines())
            # New workers in the place of the old ones.
            server.send(signal.SIGHUP)
            while processes(server.lines()) <= gone:
                clients.wait_for(len(clients.answered) + 50)
            clients.wait_for(len(clients.answered) + 100)
        finally:
            clients.stop()
        jobs = len([line for line in server.lines() if line[0] == "accepted"])
        found = server.wait_for(
            {
                ("jobs_submitted_total",): jobs,
                ("jobs_total", "completed"): jobs,
                ("job_latency_seconds_count", "completed"): jobs,
                ("job_queue_wait_seconds_count",): jobs,
                ("batch_size_jobs_sum",): jobs,
                ("jobs_outstanding",): 0,
            }
        )
        server.send(signal.SIGTERM)
        told = server.end()
    assert processes(told.lines) > gone, told
    assert jobs >= len(clients.answered) >= 350
    assert found["batch_size_jobs_count",] > 0
    assert found["last_success_timestamp_seconds",] == pytest.approx(time.time(), abs=120)


def processes(lines: list[list[str]]) -> set[str]:
    """Those that had jobs."""
    return {line[1] for line in lines if line[0] == "processed"}


# The page and the board.


def exported() -> dict[str, set[str]]:
    """The labels by the name of each sample that a scrape has."""
    registry = CollectorRegistry()
    batcher = InlineBatcher(FaultyProcessor())
    instrument(batcher, registry)
    batcher.submit(1)
    found: dict[str, set[str]] = {}
    for family in parse_text(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def families() -> dict[str, tuple[str, ...]]:
    """What the page has to name: each metric with the labels of its own."""
    registry = CollectorRegistry()
    batcher = InlineBatcher(FaultyProcessor())
    instrument(batcher, registry)
    batcher.submit(1)
    found = {}
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, *sorted(labels - {"batcher", "le"}))
    return found


@pytest.mark.database
def test_the_page_runs(database: str) -> None:
    def check_scrape(names: Names) -> None:
        assert names["payments"].execute({"user_id": 1, "amount": 5})["id"] == 1
        answer = names["app"].test_client().get("/metrics")
        assert answer.content_type.startswith("text/plain")
        assert 'microbatch_jobs_total{batcher="payments",outcome="completed"} 1.0' in answer.text

    with psycopg.connect(database) as connection:
        for block in blocks(README, "sql"):
            connection.execute(block.text.encode())
    run_blocks(PAGE, as_uri(database), {"Prometheus": check_scrape})


def test_the_table_of_the_page_is_complete() -> None:
    (table,) = [table for table in parsed(PAGE).findall(nodes.table) if "microbatch_jobs_total" in table.astext()]
    said = {}
    for row in next(table.findall(nodes.tbody)).findall(nodes.row):
        name, kind, labels, _ = [" ".join(entry.astext().split()) for entry in row.findall(nodes.entry)]
        said[name] = (kind, *sorted(filter(None, labels.replace(",", " ").split())))
    assert said == families()


def test_names_end_in_their_unit_and_counters_in_total() -> None:
    for name, (kind, *_) in families().items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert kind != "histogram" or name.endswith(("_seconds", "_jobs")), name
        assert re.fullmatch("microbatch_[a-z_]+", name)


def queries() -> list[str]:
    board = json.loads(BOARD.read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [*panels, *(variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query")]


def test_the_boards_queries_name_metrics_and_labels_that_there_are() -> None:
    known = exported()
    named = set()
    for query in queries():
        for name, selector in re.findall(r"\b(microbatch_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, query
            named.add(name)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= known[name] | {"job", "instance"}, query
        for grouping in re.findall(r"\bby\s*\(([^)]*)\)", query):
            asked = {label.strip() for label in grouping.split(",")}
            assert asked <= set().union(*known.values()) | {"job", "instance"}, query
    # A metric that no panel shows is one that nobody looks at.
    bases = {re.sub("_(bucket|sum|count)$", "", name) for name in named}
    assert bases == set(families())


def test_the_board_takes_its_source_and_batcher_from_the_page() -> None:
    board = json.loads(BOARD.read_text())
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "batcher"}
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
            assert all('batcher=~"$batcher"' in target["expr"] for target in panel["targets"]), panel["title"]
