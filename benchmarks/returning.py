"""What does it bring, and cost, to hold a batch for the callers whom the last one has woken?

With it, as it is by default, against the same library without it. Closed loop: threads that wait for their row before
they send the next one. Open loop: rows at fixed times, each sent by a thread that waits for it, so that those who were
woken come back only by chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from unittest import mock

from database import add_options, bench
from loops import Loop, closed_loop, open_loop
from options import FORMS, Processor
from postgres_statement import CREATE, TABLE, Row, payment
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher, collector

WAITING = 32  # threads of the open loop
HELD, EAGER = "held", "not held"


@contextmanager
def batcher(dsn: str, form: Processor, held: bool) -> Iterator[MicroBatcher[Row, Row]]:
    patience = collector._PATIENCE if held else 0.0
    with mock.patch.object(collector, "_PATIENCE", patience), MicroBatcher[Row, Row](form(dsn)) as made:
        made.execute(payment(0))
        yield made


def in_a_loop(dsn: str, form: Processor, held: bool, threads: int, seconds: float) -> Loop:
    with batcher(dsn, form, held) as made:
        return closed_loop(made.execute, threads, seconds, payment)


def at_a_load(dsn: str, form: Processor, held: bool, rate: float, seconds: float) -> Loop:
    with batcher(dsn, form, held) as made, ThreadPoolExecutor(WAITING) as executor:
        list(executor.map(made.execute, map(payment, range(2 * WAITING))))
        return open_loop(partial(executor.submit, made.execute), rate, seconds, payment)


def show(section: str, variants: dict[str, Callable[[], Loop]], arguments: argparse.Namespace) -> None:
    measured = interleaved(variants, arguments.repetitions)
    keep(section, measured)
    print(section)
    for figure, unit in (("rate", "rows/s"), ("p50", "ms"), ("p99", "ms")):
        values = {name: [getattr(run, figure) for run in runs] for name, runs in measured.items()}
        print("\n".join(absolute(f"{name}: {figure}", values[name], unit) for name in values))
        print(ratio(f"{figure}, {HELD} to {EAGER}", values[HELD], values[EAGER]))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[200, 500, 1000, 2000], help="rows per second")
    parser.add_argument("--seconds", type=float, default=1.0, help="per run")
    arguments = parser.parse_args()

    with bench("Batches held for who comes back", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        for name, form in FORMS.items():
            for threads in arguments.threads:
                loops = {
                    HELD: partial(in_a_loop, dsn, form, True, threads, arguments.seconds),
                    EAGER: partial(in_a_loop, dsn, form, False, threads, arguments.seconds),
                }
                show(f"closed loop, {name}, {threads} threads", loops, arguments)
            for rate in arguments.rates:
                loads = {
                    HELD: partial(at_a_load, dsn, form, True, rate, arguments.seconds),
                    EAGER: partial(at_a_load, dsn, form, False, rate, arguments.seconds),
                }
                show(f"open loop, {name}, {rate:g} rows/s", loads, arguments)


if __name__ == "__main__":
    main()
