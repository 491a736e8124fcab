"""Do several processes scale, as gunicorn's workers are?

Each has its own batcher, or its own pool, and threads that wait for their row before they send the next one; rows per
second of all of them together.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

from database import add_options, bench
from loops import closed_loop
from options import FORMS
from postgres_statement import CREATE, TABLE, Row, direct, payment
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher

POOL = "pool of 8"
_gate: Barrier


def attend(gate: Barrier) -> None:
    """In each process: what they begin together at."""
    global _gate
    _gate = gate


def written(dsn: str, side: str, threads: int, seconds: float) -> float:
    """Rows per second of one process."""

    def loop(write: Callable[[Row], Any]) -> float:
        write(payment(0))
        _gate.wait(60)
        return closed_loop(write, threads, seconds, payment).rate

    if side == POOL:
        with direct(dsn, 8) as write:
            return loop(write)
    with MicroBatcher[Row, Row](FORMS[side](dsn)) as batcher:
        return loop(batcher.execute)


def together(dsn: str, side: str, processes: int, threads: int, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        gate = manager.Barrier(processes)
        with ProcessPoolExecutor(processes, context, attend, (gate,)) as executor:
            runs = [executor.submit(written, dsn, side, threads, seconds) for _ in range(processes)]
            return sum(run.result() for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=8, help="of each process")
    parser.add_argument("--seconds", type=float, default=1.0, help="per run")
    arguments = parser.parse_args()

    with bench("Several processes", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        for processes in arguments.processes:
            rates = interleaved(
                {
                    side: partial(together, dsn, side, processes, arguments.threads, arguments.seconds)
                    for side in (*FORMS, POOL)
                },
                arguments.repetitions,
            )
            section = f"{processes} process{'es' if processes > 1 else ''} of {arguments.threads} threads"
            keep(section, rates)
            print(section)
            print("\n".join(absolute(side, values, "rows/s") for side, values in rates.items()))
            print("\n".join(ratio(f"{side} to {POOL}", rates[side], rates[POOL]) for side in FORMS) + "\n")


if __name__ == "__main__":
    main()
