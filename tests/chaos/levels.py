"""The levels by name, each with what a short run and a long one do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import apache, load, processes, schedules, simulator, storm
from .report import Finding
from .verdict import Verdict


@dataclass(frozen=True)
class Settings:
    """How much to do: *seconds* for what lasts, *is_short* for the run that everybody has the time for."""

    seed: int
    seconds: float
    is_short: bool
    one_seed: bool = False


Level = Callable[[Settings], list[Finding]]


def run_simulator(settings: Settings) -> list[Finding]:
    """Seeds from the given one on, on every processor; with a seed on the command line that one alone."""
    if settings.one_seed:
        return [_told(settings.seed)]
    count = 2_000 if settings.is_short else int(10_000 * max(1.0, settings.seconds / 60))
    began = time.monotonic()
    processors = os.cpu_count() or 1
    ranges = [range(settings.seed + n, settings.seed + count, processors) for n in range(processors)]
    finding = Finding(f"simulator: {count:,} seeds x 200 steps", Verdict())
    with multiprocessing.get_context("spawn").Pool(processors) as pool:
        for jobs, faults, unknown, expired, problems in pool.imap_unordered(_simulate, ranges):
            finding.verdict.jobs += jobs
            finding.verdict.unknown += [None] * unknown
            finding.verdict.expired += [None] * expired
            finding.faults += faults
            finding.problems += problems
    finding.seconds = time.monotonic() - began
    finding.unknown_at_most = finding.expired_at_most = finding.verdict.jobs
    return [finding]


def _simulate(seeds: range) -> tuple[int, int, int, int, list[str]]:
    total, hits, problems = Verdict(), 0, []
    with simulator.virtual_time():
        for seed in seeds:
            try:
                verdict, faults = simulator.simulate(seed)
            except simulator.Violation as violation:
                problems.append(str(violation))
                continue
            total += verdict
            hits += faults
    return total.jobs, hits, len(total.unknown), len(total.expired), problems


def _told(seed: int) -> Finding:
    finding = Finding(f"simulator: seed {seed}", Verdict())
    story: list[str] = []
    with simulator.virtual_time():
        try:
            finding.verdict, finding.faults = simulator.simulate(seed, story=story)
        except simulator.Violation as violation:
            finding.problems.append(str(violation))
    print("\n".join(story))
    finding.unknown_at_most = finding.expired_at_most = finding.verdict.jobs
    return finding


def run_schedules(settings: Settings) -> list[Finding]:
    """Every order with one preemption; a long run has the time for two."""
    preemptions = 1 if settings.is_short else 2
    finding = Finding("", Verdict())
    began = time.monotonic()
    for name, scenario in schedules.SCENARIOS.items():
        seconds = 60.0 if settings.is_short else settings.seconds / 4
        count, problems, complete = schedules.explore(scenario, preemptions, seconds)
        finding.verdict.jobs += count
        finding.problems += [f"{name}: {problem}" for problem in problems]
        if not complete:
            finding.note += f"{name} not to its end; "
    finding.name = f"schedules: {len(schedules.SCENARIOS)} scenarios, {preemptions} preemptions"
    finding.faults, finding.seconds = finding.verdict.jobs, time.monotonic() - began
    return [finding]


def run_storm(settings: Settings) -> list[Finding]:
    return storm.run(settings.seed, settings.seconds)


def run_kills(settings: Settings) -> list[Finding]:
    return [processes.kill_nine(settings.seed, 3 if settings.is_short else 25)]


def run_forks(settings: Settings) -> list[Finding]:
    children = 20 if settings.is_short else 150
    cases = {f"{children} forks under load": lambda path: processes.forks(path, children)}
    for method in ("fork", "spawn") if settings.is_short else ("fork", "spawn", "forkserver"):
        cases[f"multiprocessing, {method}"] = lambda path, method=method: processes.multiprocess(path, method)
    return [processes.attempt(name, case) for name, case in cases.items()]


def run_exits(settings: Settings) -> list[Finding]:
    return [
        processes.attempt(f"exit of Python {version}", lambda path, python=python: processes.exits(path, python))
        for version, python in processes.interpreters().items()
    ]


def run_servers(settings: Settings) -> list[Finding]:
    cases = [*processes.gunicorn_cases()]
    if _has("waitress"):
        cases.append(("waitress, SIGTERM", processes.waitress_case))
    if _has("uwsgi", Path(sys.executable).parent / "uwsgi"):
        cases += processes.uwsgi_cases()
    if _has("mod_wsgi", apache.PROGRAM, apache.MODULES / "mod_wsgi.so", remedy=apache.MISSING):
        cases += apache.cases()
    return [processes.attempt(name, case) for name, case in cases]


def run_load(settings: Settings) -> list[Finding]:
    seconds = 8.0 if settings.is_short else settings.seconds
    cases: dict[str, Callable[[Path], Finding]] = {
        "64 producers at the bound": lambda path: load.sustained(seconds),
        "a burst of 100 x the bound, block": lambda path: load.burst("block"),
        "a burst of 100 x the bound, raise": lambda path: load.burst("raise"),
    }
    return [processes.attempt(name, case) for name, case in cases.items()]


def run_gevent(settings: Settings) -> list[Finding]:
    return [processes.attempt("gevent, patched first", load.greenlets)] if _has("gevent") else []


def _has(name: str, *files: Path | str, remedy: str = "pip install 'microbatch[chaos]'") -> bool:
    """Whether what a case needs is there; said, and an error where nothing may be left out."""
    there = all(Path(file).exists() for file in files) if files else find_spec(name) is not None
    if not there and os.environ.get("MICROBATCH_CHAOS_ALL"):
        raise SystemExit(f"{name} is missing: {remedy}")
    if not there:
        print(f"  not run, {name} is missing: {remedy}", flush=True)
    return there


LEVELS: dict[str, Level] = {
    "simulator": run_simulator,
    "schedules": run_schedules,
    "storm": run_storm,
    "kills": run_kills,
    "forks": run_forks,
    "exits": run_exits,
    "servers": run_servers,
    "load": run_load,
    "gevent": run_gevent,
}
# What fits, together, into two minutes.
SHORT = ("simulator", "storm", "kills", "forks", "load")
