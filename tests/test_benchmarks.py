"""What the benchmarks say of their measurements is what the measurements say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.summary")


def test_a_goal_is_judged_by_the_median_of_the_ratios_of_single_repetitions(summary: Any) -> None:
    at_least = summary.Goal("rate", "pool", "run", "loop", "microbatch", summary.best_pool, "rate", 2)
    at_most = summary.Goal("p99", "pool", "run", "loop", "microbatch", summary.best_pool, "p99", 0.5, False)
    runs = {
        "microbatch": [{"rate": 30, "p99": 1}, {"rate": 50, "p99": 9}, {"rate": 40, "p99": 8}],
        "direct, pool of 4": [{"rate": 1, "p99": 1}] * 3,
        "direct, pool of 8": [{"rate": 20, "p99": 10}, {"rate": 10, "p99": 10}, {"rate": 16, "p99": 10}],
    }
    measurements = {"run": {"loop": runs}}

    rate, p99 = at_least.measured(measurements), at_most.measured(measurements)

    assert (rate.middle, rate.low, rate.high) == (2.5, 1.5, 5)
    assert at_least.verdict(rate) == "yes, not in all"
    assert (p99.middle, p99.low, p99.high) == (0.8, 0.1, 0.9)
    assert at_most.verdict(p99) == "no, not in all"
    assert at_most.verdict(at_most.measured({})) == "not measured"


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [([3, 4], [1, 2], "faster"), ([1, 2], [3, 4], "slower"), ([1, 4], [2, 2], "undecided")],
)
def test_slower_is_said_as_plainly_as_faster(summary: Any, ours: list[int], theirs: list[int], kind: str) -> None:
    section = {"insert_into": ours, "another way": theirs}

    (found,) = summary.comparisons({"peers": {"saturated": section}})

    assert (found.ours, found.theirs, found.kind) == ("insert_into", "another way", kind)


def test_a_latency_that_is_lower_is_faster(summary: Any) -> None:
    section = {name: [{"rate": 200, "p50": p50, "p99": p50}] for name, p50 in (("statement", 4), ("pool", 1))}

    found = list(summary.comparisons({"open_loop": {"200 rows/s": section}}))

    assert [(one.shape, one.speed.middle) for one in found] == [
        ("load of 200 rows/s, p50", 0.25),
        ("load of 200 rows/s, p99", 0.25),
    ]


def test_a_chart_has_a_point_for_each_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    line_chart = importlib.import_module("benchmarks.plot").line_chart

    svg = ElementTree.fromstring(line_chart("a & b", "across", "up", {"x<y": [(1, 5), (10, 50)], "z": [(1, 2)]}))

    lines = [line.get("points", "").split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    (low_x, low_y), (high_x, high_y) = [[float(part) for part in point.split(",")] for point in lines[0]]
    assert [len(points) for points in lines] == [2, 1]
    assert {"a & b", "across", "up", "x<y", "z"} <= set(texts)
    assert low_x < high_x
    assert low_y > high_y


def test_the_guard_tells_a_ratio_below_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    guard = importlib.import_module("benchmarks.guard")
    spread = importlib.import_module("benchmarks.summary").spread
    floor = guard.Floor("rate", (), "", "", "", 2)

    assert guard.crossed(floor, spread([1.5, 1.9, 9]))
    assert not guard.crossed(floor, spread([1, 2, 9]))


def test_a_script_keeps_each_single_measurement(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    script = ["benchmarks/in_process.py", "--repetitions", "2", "--jobs", "200", "--threads", "2"]

    environment = {**os.environ, "MICROBATCH_BENCHMARKS_KEEP": str(kept)}
    subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)

    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [record["section"] for record in records] == ["submit all, then wait", "closed loop, 2 threads"]
    assert all(len(runs) == 2 and min(runs) > 0 for record in records for runs in record["measured"].values())
