"""What do `max_batch_size`, `linger` and `max_concurrent_batches` change, on PostgreSQL?

Rows per second by the size of a batch and by workers, everything submitted and then awaited; the size also of a raw
`executemany` loop. Then clients that wait for their row: rows per second and latency by linger and by workers, and by
the number of clients, against BEGIN; INSERT; COMMIT through a pool.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from database import add_options, bench
from loops import Loop, closed_loop
from postgres_bulk import bulk
from postgres_statement import CREATE, TABLE, Row, by_statement, loop_direct, payment, raw_loop
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor

Processor = Callable[[str], PostgresProcessor]
FORMS: dict[str, Processor] = {"insert_into": bulk, "statement": by_statement}


def saturated(dsn: str, form: Processor, rows: int, options: Mapping[str, Any]) -> float:
    with MicroBatcher[Row, Row](form(dsn), max_outstanding=rows, **options) as batcher:
        batcher.execute(payment(0))
        begin = time.perf_counter()
        for number, future in enumerate([batcher.submit(payment(n)) for n in range(rows)]):
            assert future.result()["user_id"] == number
        return rows / (time.perf_counter() - begin)


def waiting(dsn: str, form: Processor, clients: int, seconds: float, options: Mapping[str, Any]) -> Loop:
    with MicroBatcher[Row, Row](form(dsn), **options) as batcher:
        batcher.execute(payment(0))
        return closed_loop(batcher.execute, clients, seconds, payment)


def show(section: str, measured: Mapping[str, list[Any]], first: str) -> None:
    keep(section, measured)
    print(section)
    rates = {name: [getattr(run, "rate", run) for run in runs] for name, runs in measured.items()}
    print("\n".join(absolute(name, values, "rows/s") for name, values in rates.items()))
    for name, runs in measured.items():
        if isinstance(runs[0], Loop):
            for figure in ("p50", "p99"):
                print(absolute(f"{name}: {figure}", [getattr(run, figure) for run in runs], "ms"))
    print("\n".join(ratio(f"{name} to {first}", rates[name], rates[first]) for name in rates if name != first))
    print()


def report_sizes(dsn: str, arguments: argparse.Namespace) -> None:
    for size in arguments.batch_sizes:
        rows = max(size, min(arguments.rows, size * 100))
        rows -= rows % size
        variants = {name: partial(saturated, dsn, form, rows, {"max_batch_size": size}) for name, form in FORMS.items()}
        variants["raw executemany loop"] = partial(raw_loop, dsn, rows, size)
        measured = interleaved(variants, arguments.repetitions)
        show(f"saturated, max_batch_size {size}", measured, "raw executemany loop")


def report_workers(dsn: str, arguments: argparse.Namespace) -> None:
    for name, form in FORMS.items():
        variants = {
            f"max_concurrent_batches {n}": partial(
                saturated, dsn, form, arguments.rows, {"max_batch_size": 1000, "max_concurrent_batches": n}
            )
            for n in arguments.workers
        }
        measured = interleaved(variants, arguments.repetitions)
        show(f"saturated, workers, {name}", measured, f"max_concurrent_batches {arguments.workers[0]}")


def report_waiting(dsn: str, arguments: argparse.Namespace) -> None:
    for clients in arguments.clients:
        variants: dict[str, Callable[[], Loop]] = {
            f"linger {linger:g} ms": partial(
                waiting, dsn, by_statement, clients, arguments.seconds, {"linger": linger / 1000}
            )
            for linger in arguments.linger
        }
        for n in arguments.workers[1:]:
            variants[f"max_concurrent_batches {n}"] = partial(
                waiting, dsn, by_statement, clients, arguments.seconds, {"max_concurrent_batches": n}
            )
        measured = interleaved(variants, arguments.repetitions)
        title = f"closed loop, statement, {clients} client{'s' if clients > 1 else ''}"
        show(title, measured, f"linger {arguments.linger[0]:g} ms")


def report_clients(dsn: str, arguments: argparse.Namespace) -> None:
    for threads in arguments.threads:
        variants: dict[str, Callable[[], Loop]] = {
            name: partial(waiting, dsn, form, threads, arguments.seconds, {}) for name, form in FORMS.items()
        }
        for size in sorted({min(size, threads) for size in (8, 32)}):
            variants[f"direct, pool of {size}"] = partial(loop_direct, dsn, size, threads, arguments.seconds)
        measured = interleaved(variants, arguments.repetitions)
        show(f"threads, {threads}", measured, f"direct, pool of {min(8, threads)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000, help="saturated; at most 100 batches")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--linger", type=float, nargs="+", default=[0, 1, 5, 20], help="milliseconds")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="for linger and workers")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 8, 32, 128, 512], help="against the pools")
    parser.add_argument("--seconds", type=float, default=1.0, help="closed loop, per run")
    arguments = parser.parse_args()

    with bench("The options of a batcher on PostgreSQL", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        report_sizes(dsn, arguments)
        report_workers(dsn, arguments)
        report_waiting(dsn, arguments)
        report_clients(dsn, arguments)


if __name__ == "__main__":
    main()
