"""What do other ways and other libraries reach, in the same run on the same machine?

Into PostgreSQL: INSERT per request through a pool, psycopg's `executemany` and COPY, asyncpg, SQLAlchemy, psycopg2 and
pg-promise under Node, all of the rows there to be written; and clients that wait for their row, where the batcher that
anybody writes first (a queue and a timer) comes in, too.

In process, no-op jobs: executors, that same batcher, and batchers from PyPI.

A peer that is not installed is a line that says so. `pip install '.[benchmarks]'` has those of Python; pg-promise is
fetched by npm into a directory of its own, where node and npm are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import peers_in_process
import peers_postgres
from database import add_options, bench
from peers_postgres import NodeMissing
from postgres_bulk import bulk
from postgres_bulk import through_batcher as through_bulk
from postgres_statement import CREATE, TABLE, by_statement, loop_batcher, through_batcher
from report import absolute, interleaved, keep, ratio

Run = Callable[[], Any]


def installed(runs: Mapping[str, tuple[str, Run]]) -> tuple[dict[str, Run], dict[str, str]]:
    """What can run, and why the rest can't; each run comes with the package it needs."""
    there = {name: run for name, (package, run) in runs.items() if find_spec(package)}
    missing = {
        name: f"{package} is not installed: pip install '.[benchmarks]'"
        for name, (package, _) in runs.items()
        if name not in there
    }
    return there, missing


def show(title: str, unit: str, ours: str, measured: Mapping[str, list[Any]], missing: Mapping[str, str]) -> None:
    """Also the latencies of a closed loop."""
    keep(title, measured, missing)
    print(title)
    values = {name: [getattr(run, "rate", run) for run in runs] for name, runs in measured.items()}
    print("\n".join(absolute(name, rates, unit) for name, rates in values.items()))
    for name, reason in missing.items():
        print(f"  {name:<52} not measured: {reason}")
    print("\n".join(ratio(f"{ours} to {name}", values[ours], values[name]) for name in values if name != ours))
    if all(hasattr(run, "p50") for runs in measured.values() for run in runs):
        for figure in ("p50", "p99"):
            shown = {name: [getattr(run, figure) for run in runs] for name, runs in measured.items()}
            micro = {name: [time * 1000 for time in times] for name, times in shown.items()}
            print("\n".join(absolute(f"{name}: {figure}", times, "µs") for name, times in micro.items()))
    print()


def report_saturated(dsn: str, arguments: argparse.Namespace) -> None:
    size = arguments.batch_size
    rows = max(1, arguments.rows // size) * size
    runs, missing = installed(
        {
            "insert_into": ("microbatch", partial(through_bulk, dsn, rows, size)),
            "statement": ("microbatch", partial(through_batcher, dsn, rows, size)),
            **{peer.name: (peer.package, partial(peer.write, dsn, rows, size)) for peer in peers_postgres.PEERS},
        }
    )
    with ExitStack() as stack:
        try:
            ask = stack.enter_context(peers_postgres.pg_promise(dsn))
            for way in ("tx.batch", "helpers.insert"):
                runs[f"pg-promise {way} (Node)"] = partial(ask, way, rows, size)
        except NodeMissing as error:
            missing["pg-promise (Node)"] = str(error)
        show("saturated", "rows/s", "insert_into", interleaved(runs, arguments.repetitions), missing)


def report_loops(dsn: str, clients: int, arguments: argparse.Namespace) -> None:
    seconds = arguments.seconds
    pools = {
        f"pool of {min(size, clients)}, {'autocommit' if autocommit else 'transaction'}": (
            "psycopg",
            partial(peers_postgres.loop_pool, dsn, clients, seconds, size=size, autocommit=autocommit),
        )
        for size in (8, 32)
        for autocommit in (False, True)
    }
    runs, missing = installed(
        {
            "insert_into": ("microbatch", partial(loop_batcher, dsn, bulk, clients, seconds)),
            "statement": ("microbatch", partial(loop_batcher, dsn, by_statement, clients, seconds)),
            **pools,
            "textbook, timer of 5 ms, executemany": (
                "psycopg",
                partial(peers_postgres.loop_timer, dsn, clients, seconds, interval=0.005),
            ),
            "asyncpg, pool of 8, tasks": ("asyncpg", partial(peers_postgres.loop_asyncpg, dsn, clients, seconds)),
        }
    )
    title = f"closed loop, {clients} client{'s' if clients > 1 else ''}"
    show(title, "rows/s", "insert_into", interleaved(runs, arguments.repetitions), missing)


def report_in_process(arguments: argparse.Namespace) -> None:
    peers = peers_in_process.PEERS
    runs, missing = installed({peer.name: (peer.package, partial(peer.at_once, arguments.jobs)) for peer in peers})
    show("no-op jobs at once", "jobs/s", "MicroBatcher", interleaved(runs, arguments.repetitions), missing)
    for clients in arguments.clients:
        runs, missing = installed(
            {peer.name: (peer.package, partial(peer.loop, clients, arguments.seconds / 2)) for peer in peers}
        )
        title = f"no-op jobs, closed loop, {clients} client{'s' if clients > 1 else ''}"
        show(title, "jobs/s", "MicroBatcher", interleaved(runs, arguments.repetitions), missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20_000, help="saturated")
    parser.add_argument("--batch-size", type=int, default=1000, help="saturated")
    parser.add_argument("--jobs", type=int, default=20_000, help="in process")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="closed loop")
    parser.add_argument("--seconds", type=float, default=2.0, help="closed loop, per run; half of it in process")
    arguments = parser.parse_args()

    with bench("Other ways to write rows", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        report_saturated(dsn, arguments)
        for clients in arguments.clients:
            report_loops(dsn, clients, arguments)
    report_in_process(arguments)


if __name__ == "__main__":
    main()
