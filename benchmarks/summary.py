"""What the single measurements of all scripts say together: goals, and where the library is faster and slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Section = Mapping[str, Sequence[Any]]  # the single measurements, by the name of a variant
Measurements = Mapping[str, Mapping[str, Section]]  # by run, and by section
Choice = str | Callable[[Section], str]


@dataclass(frozen=True)
class Spread:
    """The median of the ratios of single repetitions, and the extremes."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.middle)} ({number(self.low)} .. {number(self.high)})"


@dataclass(frozen=True)
class Goal:
    """*ours* to *theirs*, where there is one, must be at least, or at most, *reach*."""

    what: str
    against: str
    run: str
    section: str
    ours: Choice
    theirs: Choice | None
    figure: str
    reach: float
    at_least: bool = True

    def measured(self, measurements: Measurements) -> Spread | None:
        section = measurements.get(self.run, {}).get(self.section)
        if section is None:
            return None
        ours = figures(section[chosen(self.ours, section)], self.figure)
        if self.theirs is None:
            return spread(ours)
        return ratios(ours, figures(section[chosen(self.theirs, section)], self.figure))

    def verdict(self, measured: Spread | None) -> str:
        if measured is None:
            return "not measured"
        if self.at_least:
            reached, certain = measured.middle >= self.reach, measured.low >= self.reach
            failed = measured.high < self.reach
        else:
            reached, certain = measured.middle <= self.reach, measured.high <= self.reach
            failed = measured.low > self.reach
        return ("yes" if reached else "no") + ("" if certain or failed else ", not in all")


def chosen(choice: Choice, section: Section) -> str:
    return choice if isinstance(choice, str) else choice(section)


def best_pool(section: Section) -> str:
    """The one that a user would have chosen: the most rows per second."""
    pools = [name for name in section if name.startswith("direct, pool")]
    return max(pools, key=lambda name: median(figures(section[name], "rate")))


def dearest(section: Section) -> str:
    return max((name for name in section if name.endswith(" bad")), key=lambda name: median(section[name]))


STATEMENT, BULK, FLIGHT = "any statement", "insert_into", "raw flight"
ONE = "closed loop, one thread"
POOL = "pool: BEGIN; INSERT; COMMIT"
GOALS = [
    Goal(
        "no-op jobs/s, submit all, then wait",
        "ThreadPoolExecutor(1)",
        "in_process",
        "submit all, then wait",
        "MicroBatcher",
        "ThreadPoolExecutor(1)",
        "",
        6,
    ),
    Goal(
        "no-op jobs/s, 16 closed-loop threads",
        "ThreadPoolExecutor(1)",
        "in_process",
        "closed loop, 16 threads",
        "MicroBatcher",
        "ThreadPoolExecutor(1)",
        "",
        1,
    ),
    Goal(
        "rows/s, statement, batches of 1000",
        "raw executemany loop",
        "statement",
        "saturated",
        "microbatch",
        "raw executemany loop",
        "",
        0.92,
    ),
    Goal(
        "rows/s, insert_into, batches of 1000",
        "raw loop of the same flight",
        "bulk",
        "saturated",
        "insert_into",
        "raw loop of the same flight",
        "",
        0.85,
    ),
    Goal(
        "the same, two workers",
        "raw loop of the same flight",
        "bulk",
        "saturated",
        "insert_into, two workers",
        "raw loop of the same flight",
        "",
        1,
    ),
    Goal(
        "rows/s, insert_into, batches of 1000",
        "pg-promise tx.batch",
        "peers",
        "saturated",
        "insert_into",
        "pg-promise tx.batch (Node)",
        "",
        8,
    ),
    Goal(
        "rows/s, insert_into, batches of 1000",
        "8 threads, pool, INSERT and COMMIT",
        "bulk",
        "saturated",
        "insert_into",
        "8 threads, pool, INSERT and COMMIT",
        "",
        18,
    ),
    Goal(
        "p50, one thread, insert_into", POOL, "bulk", "closed loop, one thread", "insert_into", POOL, "p50", 0.65, False
    ),
    Goal("p50, one thread, statement", POOL, "bulk", "closed loop, one thread", "statement", POOL, "p50", 1, False),
    Goal(
        "rows/s, 32 closed-loop threads, insert_into",
        "the best pool",
        "bulk",
        "closed loop, 32 threads",
        "microbatch",
        best_pool,
        "rate",
        2.5,
    ),
    Goal(
        "p99, 32 closed-loop threads, insert_into",
        "the best pool",
        "bulk",
        "closed loop, 32 threads",
        "microbatch",
        best_pool,
        "p99",
        0.5,
        False,
    ),
    Goal(
        "rows/s, 8 closed-loop threads, 1 ms commit, statement",
        "the best pool of up to 8",
        "slow statement",
        "closed loop, 8 threads",
        "microbatch",
        best_pool,
        "rate",
        1,
    ),
    Goal(
        "the same, insert_into",
        "the best pool of up to 8",
        "slow bulk",
        "closed loop, 8 threads",
        "microbatch",
        best_pool,
        "rate",
        1,
    ),
    *[
        Goal(
            f"p50, {form} at 500 rows/s, 1 ms commit, batches held",
            "the same, not held",
            "returning",
            f"open loop, {form}, 500 rows/s",
            "held",
            "not held",
            "p50",
            1.1,
            False,
        )
        for form in ("insert_into", "statement")
    ],
    *[
        goal
        for form in (STATEMENT, BULK)
        for goal in (
            Goal(
                f"time of 1000 rows, {form}, the dearest number of bad ones",
                "clean executemany",
                "isolation",
                form,
                dearest,
                "executemany",
                "",
                4,
                False,
            ),
            Goal("the same, one bad row", "clean raw flight", "isolation", form, "1 bad", FLIGHT, "", 4, False),
            Goal("the same, the dearest number", "clean raw flight", "isolation", form, dearest, FLIGHT, "", 14, False),
        )
    ],
    Goal("bytes per outstanding job", "", "scale", "bytes per outstanding job", "MicroBatcher", None, "", 1024, False),
    Goal("wake-ups of an idle batcher", "", "scale", "idle", "wake-ups", None, "", 0, False),
]


@dataclass(frozen=True)
class Comparison:
    """How many times as fast *ours* is as *theirs*; below 1 it is slower."""

    shape: str
    ours: str
    theirs: str
    speed: Spread

    @property
    def kind(self) -> str:
        return "faster" if self.speed.low > 1 else "slower" if self.speed.high < 1 else "undecided"


def comparisons(measurements: Measurements) -> Iterator[Comparison]:
    """Each of ours with each that is not, in every section that has both."""
    for run, where in (("peers", ""), ("options", ""), ("open_loop", "load of "), ("scale", "")):
        for title, section in measurements.get(run, {}).items():
            if run == "options" and not title.startswith("threads"):
                continue
            shape = f"{title} closed loop" if run == "options" else f"{where}{title}"
            yield from compared(shape, section)


OURS = ("insert_into", "statement", "MicroBatcher")


def compared(shape: str, section: Section) -> Iterator[Comparison]:
    for ours in OURS:
        for theirs in section:
            if ours in section and theirs not in OURS:
                for figure, label in speed_figures(shape, section[ours]):
                    values = [figures(section[name], figure) for name in (ours, theirs)]
                    first, second = values if figure in ("", "rate") and "microseconds" not in shape else values[::-1]
                    yield Comparison(f"{shape}{label}", ours, theirs, ratios(first, second))


def speed_figures(shape: str, runs: Sequence[Any]) -> list[tuple[str, str]]:
    """At a given load the rate is given, too, and says nothing."""
    if not isinstance(runs[0], Mapping):
        return [("", "")]
    if shape.startswith("load"):
        return [("p50", ", p50"), ("p99", ", p99")]
    return [("rate", "")]


def figures(runs: Sequence[Any], figure: str) -> list[float]:
    return [float(run[figure]) if isinstance(run, Mapping) else float(run) for run in runs]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
