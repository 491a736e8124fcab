"""How long does a row take at a given load?

Rows are sent at fixed times, whether or not the earlier ones are back, and a row's latency counts from the time when
it was due. Against threads of an executor that each run BEGIN; INSERT; COMMIT through a pool. Where a side can't keep
up with the load, its latency is that of a growing queue, and its rate says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from database import add_options, bench
from loops import Loop, open_loop
from options import FORMS, Processor
from postgres_statement import CREATE, TABLE, Row, direct, payment
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher


def through_batcher(dsn: str, form: Processor, rate: float, seconds: float) -> Loop:
    with MicroBatcher[Row, Row](form(dsn)) as batcher:
        batcher.execute(payment(0))
        return open_loop(batcher.submit, rate, seconds, payment)


def through_pool(dsn: str, size: int, rate: float, seconds: float) -> Loop:
    with direct(dsn, size) as write, ThreadPoolExecutor(size) as executor:
        write(payment(0))
        return open_loop(partial(executor.submit, write), rate, seconds, payment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="*", default=[200, 500, 1000, 2000, 4000], help="rows per second")
    parser.add_argument("--pool", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="per run")
    arguments = parser.parse_args()
    pool = f"executor and pool of {arguments.pool}"

    with bench("Latency by load", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        for rate in arguments.rates:
            variants: dict[str, Callable[[], Loop]] = {
                name: partial(through_batcher, dsn, form, rate, arguments.seconds) for name, form in FORMS.items()
            }
            variants[pool] = partial(through_pool, dsn, arguments.pool, rate, arguments.seconds)
            measured = interleaved(variants, arguments.repetitions)
            section = f"{rate:g} rows/s"
            keep(section, measured)
            print(section)
            for figure, unit in (("rate", "rows/s"), ("p50", "ms"), ("p99", "ms")):
                values = {name: [getattr(run, figure) for run in runs] for name, runs in measured.items()}
                print("\n".join(absolute(f"{name}: {figure}", values[name], unit) for name in values))
                print("\n".join(ratio(f"{figure}, {name} to {pool}", values[name], values[pool]) for name in FORMS))
            print()


if __name__ == "__main__":
    main()
