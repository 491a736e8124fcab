"""What does batching bring to INSERTs through `PostgresProcessor(conninfo, statement)`, and what does it cost?

Saturated: jobs from submit to committed row, against a raw loop of the same transactions on one connection.
Closed loop: threads that wait for their row before they send the next one, against one INSERT per row in a
transaction of its own through a pool, with the best of several pool sizes.

The server is started for this, with fsync on, or given by --dsn (a table is made and dropped there).
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import psycopg
from database import add_options, bench
from loops import Loop, closed_loop
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor

Row = dict[str, Any]
Write = Callable[[Row], Any]

# The processes that a benchmark starts have the same.
TABLE = os.environ.setdefault("MICROBATCH_BENCHMARK_TABLE", f"microbatch_benchmark_{secrets.token_hex(4)}")
INSERT = f"INSERT INTO {TABLE} (user_id, amount, status) VALUES (%(user_id)s, %(amount)s, %(status)s) RETURNING *"
CREATE = f"""
    CREATE TABLE {TABLE} (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL,
        amount numeric(10,2) NOT NULL,
        status varchar(50) NOT NULL,
        transaction_date timestamptz NOT NULL DEFAULT now()
    )"""


def payment(number: int) -> Row:
    return {"user_id": number, "amount": "100.00", "status": "pending"}


# Saturated


def raw_loop(dsn: str, rows: int, size: int) -> float:
    """Rows per second of the same transactions without the library, each row read as a dict."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        begin = time.perf_counter()
        for first in range(0, rows, size):
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(INSERT, [payment(n) for n in range(first, first + size)], returning=True)
                read = [cursor.fetchone()]
                while cursor.nextset():
                    read.append(cursor.fetchone())
            assert len(read) == size
        return rows / (time.perf_counter() - begin)


def through_batcher(dsn: str, rows: int, size: int) -> float:
    with MicroBatcher[Row, Row](PostgresProcessor(dsn, INSERT), max_batch_size=size, max_outstanding=rows) as batcher:
        batcher.execute(payment(0))
        begin = time.perf_counter()
        futures = [batcher.submit(payment(n)) for n in range(rows)]
        for n, future in enumerate(futures):
            assert future.result()["user_id"] == n
        return rows / (time.perf_counter() - begin)


# Closed loop


@contextmanager
def direct(dsn: str, size: int) -> Iterator[Write]:
    """BEGIN; INSERT; COMMIT on a connection of a pool."""
    with ConnectionPool(dsn, min_size=size, max_size=size, kwargs={"row_factory": dict_row}, open=True) as pool:
        pool.wait()

        def write(row: Row) -> Any:
            with pool.connection() as connection:
                return connection.execute(INSERT, row).fetchone()

        yield write


def loop_direct(dsn: str, size: int, threads: int, seconds: float) -> Loop:
    with direct(dsn, size) as write:
        write(payment(0))
        return closed_loop(write, threads, seconds, payment)


def by_statement(dsn: str) -> PostgresProcessor:
    return PostgresProcessor(dsn, INSERT)


def loop_batcher(dsn: str, processor: Callable[[str], PostgresProcessor], threads: int, seconds: float) -> Loop:
    with MicroBatcher[Row, Row](processor(dsn)) as batcher:
        batcher.execute(payment(0))
        return closed_loop(batcher.execute, threads, seconds, payment)


def report_loops(
    dsn: str, threads: int, arguments: argparse.Namespace, processor: Callable[[str], PostgresProcessor] = by_statement
) -> None:
    sizes = sorted({min(size, threads) for size in (4, 8, 16, 32)})
    pools = {f"direct, pool of {size}": partial(loop_direct, dsn, size, threads, arguments.seconds) for size in sizes}
    batched = {"microbatch": partial(loop_batcher, dsn, processor, threads, arguments.seconds)}
    loops = interleaved({**pools, **batched}, arguments.repetitions)
    best = max(pools, key=lambda name: median(loop.rate for loop in loops[name]))
    section = f"closed loop, {threads} thread{'s' if threads > 1 else ''}"
    keep(section, loops)
    print(section)
    for name, runs in loops.items():
        print(absolute(f"{name}: rate", [run.rate for run in runs], "rows/s"))
        for figure in ("p50", "p99"):
            print(absolute(f"{name}: {figure}", [getattr(run, figure) for run in runs], "ms"))
    for figure in ("rate", "p50", "p99"):
        ours, theirs = ([getattr(run, figure) for run in loops[name]] for name in ("microbatch", best))
        print(ratio(f"{figure}, microbatch to {best}", ours, theirs))
    print()


def report_saturated(dsn: str, arguments: argparse.Namespace) -> None:
    size = arguments.batch_size
    rows = max(1, arguments.rows // size) * size
    rates = interleaved(
        {
            "microbatch": partial(through_batcher, dsn, rows, size),
            "raw executemany loop": partial(raw_loop, dsn, rows, size),
        },
        arguments.repetitions,
    )
    keep("saturated", rates)
    print(f"saturated, {rows} rows in batches of {size}")
    print("\n".join(absolute(name, values, "rows/s") for name, values in rates.items()))
    print(ratio("microbatch to raw loop", *rates.values()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20_000, help="saturated")
    parser.add_argument("--batch-size", type=int, default=1000, help="saturated")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 8, 32], help="closed loop")
    parser.add_argument("--seconds", type=float, default=2.0, help="closed loop, per run")
    arguments = parser.parse_args()

    with bench("INSERTs in batches against INSERTs one by one", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        report_saturated(dsn, arguments)
        for threads in arguments.threads:
            report_loops(dsn, threads, arguments)


if __name__ == "__main__":
    main()
