"""Does a job cost twice what it did? About 20 seconds, for CI: python -m benchmarks.guard

Ratios within one run, medians of interleaved repetitions, against floors that lie well under what is to be reached: a
floor is crossed by a cost that doubled, not by a busy machine. It prints what it measured, and its exit status is 1
where a floor was crossed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import KEEP
from .summary import Spread, figures, ratios

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for one script: it hangs


@dataclass(frozen=True)
class Floor:
    what: str
    command: tuple[str, ...]
    section: str
    ours: str
    theirs: str
    least: float

    def measured(self) -> Spread:
        section = kept(self.command)[self.section]
        return ratios(figures(section[self.ours], ""), figures(section[self.theirs], ""))


FLOORS = [
    Floor(
        "no-op jobs/s to ThreadPoolExecutor(1)",
        ("in_process.py", "--repetitions", "7", "--jobs", "10000", "--threads"),
        "submit all, then wait",
        "MicroBatcher",
        "ThreadPoolExecutor(1)",
        2.0,
    ),
    Floor(
        "rows/s to a raw executemany loop",
        ("postgres_statement.py", "--repetitions", "5", "--rows", "10000", "--threads"),
        "saturated",
        "microbatch",
        "raw executemany loop",
        0.5,
    ),
]


def kept(command: Sequence[str]) -> dict[str, Any]:
    """The single measurements of a script of this directory, by section."""
    script, *arguments = command
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kept")
        subprocess.run(
            [sys.executable, str(HERE / script), *arguments],
            env={**os.environ, KEEP: str(file)},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=SECONDS,
        )
        records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["section"]: record["measured"] for record in records}


def crossed(floor: Floor, measured: Spread) -> bool:
    return measured.middle < floor.least


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    failed = False
    for floor in FLOORS:
        measured = floor.measured()
        too_slow = crossed(floor, measured)
        failed = failed or too_slow
        word = "TOO SLOW" if too_slow else "well"
        print(f"{floor.what:<40} {measured}, at least {floor.least:g}: {word}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
