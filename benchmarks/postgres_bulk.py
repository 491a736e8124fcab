"""What does `PostgresProcessor.insert_into` bring, and what does the library cost on top of its own flight?

Saturated: jobs from submit to committed row, against

* a raw loop of the same flight: keys drawn, one INSERT with an array per column, rows read as dicts, no library;
* one transaction per batch with one awaited INSERT per row, as a driver without pipelines runs it;
* eight threads that each send INSERT and COMMIT through a pool.

Closed loop: threads that wait for their row before they send the next one, against BEGIN; INSERT; COMMIT per row
through a pool, with the best of several pool sizes; and a single thread, by statement and in bulk.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
from database import add_options, bench
from postgres_statement import (
    CREATE,
    INSERT,
    TABLE,
    Row,
    by_statement,
    loop_batcher,
    loop_direct,
    payment,
    report_loops,
)
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from report import absolute, interleaved, keep, ratio

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.flight import Flight, Prepared

COLUMNS = ["user_id", "amount", "status"]
DRAW = f"""
    WITH d AS MATERIALIZED (SELECT set_config('synchronous_commit', 'on', true),
                                   pg_logical_emit_message(true, 'microbatch', ''))
    SELECT nextval(pg_get_serial_sequence('{TABLE}', 'id'))::text FROM d, generate_series(1, $1::int)""".encode()
LIMIT = b"SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true)"
FLY = (
    f"INSERT INTO {TABLE} (id, user_id, amount, status) OVERRIDING SYSTEM VALUE"
    " SELECT a::bigint, b::integer, c::numeric, d::varchar FROM unnest($1::text[], $2::text[], $3::text[], $4::text[])"
    " AS s(a, b, c, d) RETURNING *"
).encode()


def bulk(dsn: str) -> PostgresProcessor:
    return PostgresProcessor.insert_into(dsn, TABLE, COLUMNS)


def through_batcher(dsn: str, rows: int, size: int, workers: int = 1) -> float:
    with MicroBatcher[Row, Row](
        bulk(dsn), max_batch_size=size, max_outstanding=rows, max_concurrent_batches=workers
    ) as batcher:
        batcher.execute(payment(0))
        begin = time.perf_counter()
        futures = [batcher.submit(payment(n)) for n in range(rows)]
        for n, future in enumerate(futures):
            assert future.result()["user_id"] == n
        return rows / (time.perf_counter() - begin)


def raw_flights(dsn: str, rows: int, size: int) -> float:
    """Rows per second of the same flights without the library, each row read as a dict."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        prepared = Prepared()
        begin = time.perf_counter()
        for first in range(0, rows, size):
            batch = [payment(n) for n in range(first, first + size)]
            flight = Flight(connection, prepared)
            flight.run(DRAW, [b"%d" % size])
            flight.sync()
            answer = flight.land()[0][0]
            keys = [(answer.get_value(i, 0) or b"").decode() for i in range(size)]
            texts = [keys, *([str(row[column]) for row in batch] for column in COLUMNS)]
            flight = Flight(connection, prepared)
            flight.run(LIMIT, [b"20000", b"5000"])
            flight.run(FLY, [("{" + ",".join(f'"{text}"' for text in column) + "}").encode() for column in texts])
            flight.sync()
            answer = flight.land()[0][1]
            transformer = psycopg.adapt.Transformer.from_context(connection)
            transformer.set_pgresult(answer)
            names = [(answer.fname(i) or b"").decode() for i in range(answer.nfields)]
            read = transformer.load_rows(0, size, lambda values, names=names: dict(zip(names, values, strict=True)))
            found = {row["id"]: row for row in read}
            assert [found[int(key)]["user_id"] for key in keys] == [row["user_id"] for row in batch]
        return rows / (time.perf_counter() - begin)


def one_by_one(dsn: str, rows: int, size: int) -> float:
    """Rows per second of a transaction per batch in which every INSERT is awaited."""
    rows = min(rows, 10 * size)
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        begin = time.perf_counter()
        for first in range(0, rows, size):
            with connection.transaction():
                for n in range(first, first + size):
                    row = connection.execute(INSERT, payment(n)).fetchone()
                    assert row is not None
        return rows / (time.perf_counter() - begin)


def pool_of_eight(dsn: str, rows: int) -> float:
    """Rows per second of eight threads, INSERT and COMMIT each."""
    share = max(1, min(rows, 8000) // 8)
    with ConnectionPool(dsn, min_size=8, max_size=8, kwargs={"row_factory": dict_row}, open=True) as pool:
        pool.wait()

        def client(_: int) -> None:
            for n in range(share):
                with pool.connection() as connection:
                    assert connection.execute(INSERT, payment(n)).fetchone()

        begin = time.perf_counter()
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(client, range(8)))
        return share * 8 / (time.perf_counter() - begin)


def report_saturated(dsn: str, arguments: argparse.Namespace) -> None:
    size = arguments.batch_size
    rows = max(1, arguments.rows // size) * size
    rates: dict[str, list[float]] = interleaved(
        {
            "insert_into": partial(through_batcher, dsn, rows, size),
            "insert_into, two workers": partial(through_batcher, dsn, rows, size, 2),
            "raw loop of the same flight": partial(raw_flights, dsn, rows, size),
            "awaited INSERTs, one transaction": partial(one_by_one, dsn, rows, size),
            "8 threads, pool, INSERT and COMMIT": partial(pool_of_eight, dsn, rows),
        },
        arguments.repetitions,
    )
    keep("saturated", rates)
    print(f"saturated, {rows} rows in batches of {size}")
    print("\n".join(absolute(name, values, "rows/s") for name, values in rates.items()))
    ours, two, raw, awaited, pool = rates.values()
    print(ratio("to the raw loop of the same flight", ours, raw))
    print(ratio("two workers to the raw loop", two, raw))
    print(ratio("to awaited INSERTs in one transaction", ours, awaited))
    print(ratio("to 8 threads with a pool", ours, pool) + "\n")


def report_single(dsn: str, arguments: argparse.Namespace) -> None:
    loops = interleaved(
        {
            "insert_into": partial(loop_batcher, dsn, bulk, 1, arguments.seconds),
            "statement": partial(loop_batcher, dsn, by_statement, 1, arguments.seconds),
            "pool: BEGIN; INSERT; COMMIT": partial(loop_direct, dsn, 1, 1, arguments.seconds),
        },
        arguments.repetitions,
    )
    keep("closed loop, one thread", loops)
    print("closed loop, one thread")
    for name, runs in loops.items():
        print(absolute(f"{name}: p50", [run.p50 for run in runs], "ms"))
    theirs = [run.p50 for run in loops["pool: BEGIN; INSERT; COMMIT"]]
    print(ratio("p50, insert_into to the pool", [run.p50 for run in loops["insert_into"]], theirs))
    print(ratio("p50, statement to the pool", [run.p50 for run in loops["statement"]], theirs) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=30_000, help="saturated")
    parser.add_argument("--batch-size", type=int, default=1000, help="saturated")
    parser.add_argument("--threads", type=int, nargs="*", default=[8, 32], help="closed loop")
    parser.add_argument("--seconds", type=float, default=2.0, help="closed loop, per run")
    arguments = parser.parse_args()

    with bench("insert_into against other ways to write rows", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        report_saturated(dsn, arguments)
        report_single(dsn, arguments)
        for threads in arguments.threads:
            report_loops(dsn, threads, arguments, bulk)


if __name__ == "__main__":
    main()
