"""All benchmarks, in about ten minutes, into one report: benchmarks/report.rst and the charts beside it.

    python -m benchmarks                all of them
    python -m benchmarks --quick        in about a minute, into a directory of temporary files: to see that they run
    python -m benchmarks --only NAME    one of them, shown and not kept; may be repeated
    python -m benchmarks --repetitions 2    of each measurement, after one to warm up: faster, and less sure

Run it on a machine that does nothing else. The report says what the load was when it began.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charts import charts
from .report import KEEP
from .slow_fsync import compiler
from .summary import GOALS, Comparison, Measurements, comparisons, number

HERE = Path(__file__).resolve().parent
SECONDS = 600  # for one script: far above what the slowest takes on a busy machine
# A slower disk; where there is no compiler a server that sleeps before it flushes, which also gathers the commits of
# others and so is kinder to them.
SLOW = "--fsync 1" if compiler() else "--setting commit_delay=1000 --setting commit_siblings=0"
BRIEF = "--repetitions 1 --rows 2000 --seconds 0.1"


@dataclass(frozen=True)
class Run:
    name: str
    script: str
    arguments: str
    quick: str

    def command(self, quick: bool, repetitions: int | None) -> list[str]:
        """argparse lets the last of several `--repetitions` count."""
        chosen = shlex.split(self.quick if quick else self.arguments)
        more = [] if repetitions is None else ["--repetitions", str(repetitions)]
        return ["benchmarks/" + self.script, *chosen, *more]


@dataclass(frozen=True)
class Output:
    run: Run
    command: str
    text: str
    failure: str
    seconds: float
    sections: dict[str, Any]
    missing: dict[str, str]


RUNS = [
    Run("in_process", "in_process.py", "--repetitions 9", "--repetitions 1 --jobs 4000"),
    Run("statement", "postgres_statement.py", "--repetitions 5 --seconds 0.7", f"{BRIEF} --threads 8"),
    Run("bulk", "postgres_bulk.py", "--repetitions 5 --seconds 0.7", f"{BRIEF} --threads 8"),
    Run(
        "slow statement",
        "postgres_statement.py",
        f"{SLOW} --repetitions 5 --seconds 0.7 --threads 8",
        f"{SLOW} {BRIEF} --threads 8",
    ),
    Run(
        "slow bulk",
        "postgres_bulk.py",
        f"{SLOW} --repetitions 5 --seconds 0.7 --threads 8",
        f"{SLOW} {BRIEF} --threads 8",
    ),
    Run(
        "returning",
        "returning.py",
        f"{SLOW} --repetitions 5 --seconds 0.5 --rates 500 2000",
        f"{SLOW} --repetitions 1 --seconds 0.2 --threads 8 --rates 500",
    ),
    Run("costs", "costs.py", "--repetitions 5 --seconds 0.5", "--repetitions 1 --rows 2000 --seconds 0.1"),
    Run(
        "processes",
        "processes.py",
        "--repetitions 3 --seconds 0.5 --processes 1 2 4",
        "--repetitions 1 --seconds 0.1 --processes 1 2",
    ),
    Run("isolation", "isolation.py", "--repetitions 5", "--repetitions 1 --batch-size 200 --bad 0 1 200"),
    Run(
        "load_rejects",
        "load_rejects.py",
        "--repetitions 3 --rows 20000",
        "--repetitions 1 --rows 1000 --batch-size 100",
    ),
    Run("peers", "peers.py", "--repetitions 3 --seconds 0.6", f"{BRIEF} --jobs 2000 --clients 1"),
    Run(
        "scale",
        "scale.py",
        "--repetitions 5 --seconds 0.5",
        "--repetitions 1 --seconds 0.1 --jobs 2000 --threads 1 8",
    ),
    Run(
        "options",
        "options.py",
        "--repetitions 3 --seconds 0.5",
        f"{BRIEF} --batch-sizes 10 100 --clients 1 --threads 1 8 --linger 0 5",
    ),
    Run(
        "open_loop",
        "open_loop.py",
        "--repetitions 5 --seconds 0.7",
        "--repetitions 1 --seconds 0.2 --rates 200 500",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[run.name for run in RUNS])
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--into", type=Path, help="the directory of the report; benchmarks, where all of them run")
    arguments = parser.parse_args()
    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]

    before = os.getloadavg()[0]
    began = time.time()
    whole = not (arguments.quick or arguments.only)
    into = arguments.into or (HERE if whole else Path(tempfile.mkdtemp(prefix="microbatch-benchmarks-")))
    into.mkdir(parents=True, exist_ok=True)
    outputs: list[Output] = []
    for run in runs:
        outputs.append(carried_out(run, run.command(arguments.quick, arguments.repetitions)))
        # After each of them, so that a run that is cut short has its report as well.
        write(outputs, into, before, began)
    print(f"the report: {into / 'report.rst'}")
    return 1 if any(output.failure for output in outputs) else 0


def carried_out(run: Run, command: list[str]) -> Output:
    """In a process of its own: nothing that one leaves behind slows down the next."""
    shown = shlex.join(["python", *command])
    print(shown, file=sys.stderr, flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        kept = Path(directory, "kept")
        kept.touch()
        environment = {**os.environ, KEEP: str(kept)}
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=HERE.parent,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=SECONDS,
            )
            text, failure = done.stdout, f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            failure = f"not done after {SECONDS} seconds"
        records = [json.loads(line) for line in kept.read_text().splitlines()]
    print(text + (f"FAILED: {failure}\n" if failure else ""), flush=True)
    sections = {record["section"]: record["measured"] for record in records}
    missing = {f"{record['section']}: {name}": why for record in records for name, why in record["missing"].items()}
    return Output(run, shown, text, failure, time.monotonic() - begin, sections, missing)


# The report


def write(outputs: list[Output], into: Path, load: float, began: float) -> None:
    measurements = {output.run.name: output.sections for output in outputs}
    images = []
    for name, svg in charts(measurements).items():
        Path(into, name).write_text(svg)
        images.append(name)
    Path(into, "report.rst").write_text("\n".join(wrapped(report(outputs, measurements, images, load, began))) + "\n")


def report(
    outputs: list[Output], measurements: Measurements, images: list[str], load: float, began: float
) -> Iterator[str]:
    yield from heading("Benchmark report", "=")
    yield from head(outputs, load, began)
    yield from heading("Goals", "-")
    yield "What is to be reached, and what this run measured: the median of the ratios of the single repetitions, in"
    yield "brackets the extremes. *Not in all*: the extremes lie on both sides of the goal."
    yield from ["", *table(("what", "against", "reach", "measured", "reached"), goals(measurements))]
    compared = list(comparisons(measurements))
    for kind, title, text in KINDS:
        yield from heading(title, "-")
        yield from [text, "", *table(("shape", "of ours", "against", "times as fast"), rows_of(compared, kind))]
    if images:
        yield from heading("Charts", "-")
        for image in images:
            yield from [f".. image:: {image}", "   :width: 760", ""]
    yield from heading("What the scripts printed", "-")
    for output in outputs:
        yield from printed(output)


KINDS = [
    ("slower", "Where it is slower", "In every repetition. Below 1: that many times as fast, which is slower."),
    ("faster", "Where it is faster", "In every repetition."),
    ("undecided", "Where this run decides nothing", "The extremes lie on both sides of 1."),
]


def head(outputs: list[Output], load: float, began: float) -> Iterator[str]:
    cores = os.cpu_count() or 1
    if load > cores / 2:
        yield ".. warning::"
        yield from paragraph(
            f"Preliminary. The machine was busy when this began: a load of {load:.1f} on {cores} cores, and whatever"
            " ran beside it changed during the run. To be made again on a quiet one: ``python -m benchmarks``.",
            indent="   ",
        )
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began))
    minutes = sum(output.seconds for output in outputs) / 60
    again = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    yield from paragraph(
        f"Made by ``{again}`` on {day}, in {minutes:.0f} minutes, with a load of {load:.1f} at its begin and of"
        f" {os.getloadavg()[0]:.1f} at its end. `README.rst <README.rst>`__ says what each script asks, and how to read"
        " this. Versions, settings of the server and the load at that hour stand with each script's output."
    )
    for output in outputs:
        if output.failure:
            yield from paragraph(f"* **{output.run.name}** did not finish: {output.failure}.")
        for what, why in output.missing.items():
            yield from paragraph(f"* Not measured: {what}; {why}.")


def goals(measurements: Measurements) -> Iterator[tuple[str, ...]]:
    for goal in GOALS:
        measured = goal.measured(measurements)
        sign = "≥" if goal.at_least else "≤"
        yield (
            goal.what,
            goal.against or "-",
            f"{sign} {number(goal.reach) if goal.reach % 1 else f'{goal.reach:g}'}",
            str(measured or "-"),
            goal.verdict(measured),
        )


def rows_of(compared: Iterable[Comparison], kind: str) -> Iterator[tuple[str, ...]]:
    for comparison in sorted(compared, key=lambda comparison: comparison.speed.middle):
        if comparison.kind == kind:
            yield comparison.shape, comparison.ours, comparison.theirs, str(comparison.speed)


def printed(output: Output) -> Iterator[str]:
    yield from heading(output.run.name, "~")
    yield from [".. code-block:: sh", "", *(f"    {line}" for line in shell(output.command)), "", "::", ""]
    for line in output.text.strip().splitlines() or ["nothing"]:
        yield from (f"    {part}" for part in textwrap.wrap(line, 112, subsequent_indent="      ") or [""])
    yield ""


def shell(command: str) -> list[str]:
    return textwrap.wrap(command, 110, subsequent_indent="    ", break_on_hyphens=False)


def paragraph(text: str, indent: str = "") -> list[str]:
    return [*textwrap.wrap(text, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False), ""]


def heading(title: str, line: str) -> list[str]:
    return ["", title, line * len(title), ""]


def table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        yield from ["None.", ""]
        return
    yield from [".. list-table::", "   :header-rows: 1", ""]
    for row in (names, *rows):
        yield f"   * - {row[0]}"
        yield from (f"     - {cell}" for cell in row[1:])
    yield ""


def wrapped(lines: Iterable[str]) -> Iterator[str]:
    """Without empty lines on top or in pairs, and without blanks at the end of one."""
    last = ""
    for line in lines:
        if line.strip() or last:
            yield line.rstrip()
        last = line.strip()


if __name__ == "__main__":
    sys.exit(main())
