"""The charts of the report, each of what one script kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .plot import line_chart
from .summary import Measurements, figures

Lines = dict[str, list[tuple[float, float]]]


def charts(measurements: Measurements) -> dict[str, str]:
    """SVG by file name; a chart whose script did not run is left out."""
    options, load, scale = (measurements.get(run, {}) for run in ("options", "open_loop", "scale"))
    drawn = {
        "batch_size.svg": (
            "Throughput by batch size, everything submitted at once",
            "max_batch_size",
            "rows per second",
            by_section(options, "saturated, max_batch_size ", "", "rate"),
        ),
        "linger.svg": (
            "p50 by linger, any statement, clients that wait for their row",
            "clients",
            "milliseconds",
            by_section(options, "closed loop, statement, ", "linger", "p50"),
        ),
        "load.svg": (
            "p50 by load, rows sent at fixed times",
            "rows per second",
            "milliseconds",
            by_section(load, "", "", "p50"),
        ),
        "load_p99.svg": (
            "p99 by load, rows sent at fixed times",
            "rows per second",
            "milliseconds",
            by_section(load, "", "", "p99"),
        ),
        "threads.svg": (
            "Closed loop, default options: threads that wait for their row",
            "threads",
            "rows per second",
            by_section(options, "threads, ", "", "rate"),
        ),
        "outstanding.svg": (
            "Cost of a no-op job as the queue grows to its bound",
            "outstanding jobs, submitted and then awaited",
            "microseconds per job",
            {"MicroBatcher": by_name(scale.get("microseconds per job, bursts", {}), "outstanding")},
        ),
        "waiting.svg": (
            "Cost of a no-op job, threads that wait for each",
            "threads",
            "microseconds per job",
            by_section(scale, "microseconds per job, ", "", "", only="waiting thread"),
        ),
        "workers.svg": (
            "Throughput by workers, everything submitted at once",
            "max_concurrent_batches",
            "rows per second",
            {
                form: by_name(options.get(f"saturated, workers, {form}", {}), "max_concurrent_batches")
                for form in ("insert_into", "statement")
            },
        ),
    }
    return {
        name: line_chart(title, across, upward, lines)
        for name, (title, across, upward, lines) in drawn.items()
        if lines and all(lines.values())
    }


def by_section(
    sections: Mapping[str, Mapping[str, Sequence[Any]]], prefix: str, variant: str, figure: str, only: str = ""
) -> Lines:
    """x is the number in a section's title; pools of several sizes share a line, the best of them."""
    lines: Lines = {}
    for title, section in sections.items():
        if title.startswith(prefix) and only in title:
            points: dict[str, list[float]] = {}
            for name, runs in section.items():
                if name.startswith(variant):
                    points.setdefault(line_of(name), []).append(median(figures(runs, figure)))
            for name, values in points.items():
                best = max(values) if figure == "rate" else min(values)
                lines.setdefault(name, []).append((number_in(title.removeprefix(prefix)), best))
    return {name: sorted(points) for name, points in lines.items()}


def line_of(name: str) -> str:
    return "pool, the best of 8 and 32" if name.startswith("direct, pool") else name


def by_name(section: Mapping[str, Sequence[Any]], word: str) -> list[tuple[float, float]]:
    """x is the number in a variant's name."""
    return sorted((number_in(name), median(figures(runs, "rate"))) for name, runs in section.items() if word in name)


def number_in(text: str) -> float:
    return next(float(part) for part in text.split() if part.replace(".", "").isdigit())
