"""What the benchmarks share: interleaved repetitions, ratios with their spread, and what they ran on."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")

KEEP = "MICROBATCH_BENCHMARKS_KEEP"  # names the file that `python -m benchmarks` reads


def interleaved(variants: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run every variant once to warm up, then all of them in a new order in each repetition."""
    order = list(variants)
    draw = random.Random(1)
    for name in order:
        variants[name]()
    measured: dict[str, list[T]] = {name: [] for name in order}
    for repetition in range(repetitions):
        draw.shuffle(order)
        for name in order:
            measured[name].append(variants[name]())
        _show(f"  repetition {repetition + 1} of {repetitions}")
    _show("")
    return measured


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<40}\r", end="", file=sys.stderr, flush=True)


def machine(*packages: str) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    system = f"{platform.machine()}, {platform.system()} {platform.release()}"
    return (
        f"  machine   {os.cpu_count()} cores, {system}, load {load}\n"
        f"  versions  Python {platform.python_version()}, {versions}"
    )


def absolute(name: str, values: Sequence[float], unit: str) -> str:
    return f"  {name:<52} {median(values):>12,.1f} {unit:<7} ({min(values):,.1f} .. {max(values):,.1f})"


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the per-repetition ratios, and their spread."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"  {name:<52} {median(values):>12.2f} x       ({min(values):.2f} .. {max(values):.2f})"


def keep(section: str, measured: Mapping[str, Sequence[Any]], missing: Mapping[str, str] | None = None) -> None:
    """Every single measurement, for the report over all scripts; *missing* says why a variant was not measured."""
    if path := os.environ.get(KEEP):
        plain = {name: [_plain(value) for value in values] for name, values in measured.items()}
        with open(path, "a") as file:
            file.write(json.dumps({"section": section, "measured": plain, "missing": dict(missing or {})}) + "\n")


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
