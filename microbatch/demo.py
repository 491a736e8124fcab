"""`microbatch demo`: one INSERT per request against microbatch, side by side on one server.

Both sides run the same statement from the same number of threads, each of which waits for its row before it
sends the next one. They take turns, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import itertools
import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from microbatch._database import connect, one_line
from microbatch._terminal import CommandError, StatusLine, StopSignals, table
from microbatch.batcher import MicroBatcher
from microbatch.embedded import EmbeddedPostgres, EmbeddedServerError
from microbatch.errors import MicrobatchError, MissingExtra
from microbatch.processors.postgres import PostgresProcessor

TURNS = 5
POOL_SIZES = (4, 8, 16, 32)
TRIAL_SECONDS = 0.3  # of warming up, and of finding the best size of the pool
MAX_THREADS = 500
_TICK = 0.1  # seconds between looks at signals and at the clock

Payment = dict[str, Any]

_CREATE = """
    CREATE TABLE {} (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL,
        amount numeric(10,2) NOT NULL,
        status varchar(50) NOT NULL,
        transaction_date timestamptz NOT NULL DEFAULT now()
    )"""
_COLUMNS = ("user_id", "amount", "status")
_INSERT = """
    INSERT INTO {} (user_id, amount, status)
    VALUES (%(user_id)s, %(amount)s, %(status)s) RETURNING *"""


def demo(*, dsn: str | None = None, threads: int = 32, seconds: float = 5.0) -> int:
    """Run the comparison and print it; returns the exit status, 0 when all rows are in the table."""
    if threads > MAX_THREADS:
        raise CommandError(f"--threads {threads} is too many; at most {MAX_THREADS}")
    own_server = dsn is None
    # The first signal is looked at between steps, none of which takes long: so nothing is left behind.
    with StopSignals(patience=1) as stop:
        try:
            with _server(dsn) as conninfo, _payments_table(conninfo, own_server) as payments:
                stop.check()
                comparison = _Comparison(conninfo, payments, threads, seconds, stop)
                return comparison.run(own_server)
        except (psycopg.Error, MicrobatchError) as error:
            stop.check()
            status = 2 if isinstance(error, (MissingExtra, EmbeddedServerError)) else 1
            raise CommandError(one_line(error), status) from None


@contextmanager
def _server(dsn: str | None) -> Iterator[str]:
    if dsn is not None:
        yield dsn
        return
    line = StatusLine(sys.stdout)
    line.show("  starting a PostgreSQL server ...")
    with EmbeddedPostgres() as server:
        line.clear()
        yield server.dsn


@contextmanager
def _payments_table(conninfo: str, own_server: bool) -> Iterator[sql.Identifier]:
    name = "payment_transactions" if own_server else f"microbatch_demo_{secrets.token_hex(4)}"
    identifier = sql.Identifier(name)
    with connect(conninfo) as connection:
        connection.execute(sql.SQL(_CREATE).format(identifier))
    try:
        yield identifier
    finally:
        if not own_server:
            with connect(conninfo) as connection:
                connection.execute(sql.SQL("DROP TABLE {}").format(identifier))


@dataclass(frozen=True, slots=True)
class Run:
    """One turn of one side."""

    rows: int
    rate: float
    p50: float
    p99: float
    transactions: int


@dataclass(frozen=True, slots=True)
class Side:
    """One way to write a payment."""

    name: str
    insert: Callable[[Payment], Payment]
    transactions: Callable[[], int] | None = None  # None: every row is one


class _Comparison:
    def __init__(
        self, conninfo: str, payments: sql.Identifier, threads: int, seconds: float, stop: StopSignals
    ) -> None:
        self._conninfo = conninfo
        self._payments = payments
        self._table = payments.as_string(None)
        self._insert = sql.SQL(_INSERT).format(payments)
        self._threads = threads
        self._seconds = seconds / TURNS
        self._trial_seconds = min(TRIAL_SECONDS, self._seconds)
        self._stop = stop
        self._line = StatusLine(sys.stdout)
        self._numbers = itertools.count(1)
        self._submitted: Counter[str] = Counter()

    def run(self, own_server: bool) -> int:
        self._say("microbatch demo: one INSERT per request against microbatch\n")
        self._say(self._setting(own_server))
        pool_size = self._best_pool_size()
        self._say(self._contenders(pool_size) + "\n")
        with self._direct(pool_size) as direct, self._batched() as batched:
            runs = self._take_turns([direct, batched])
        return self._report(runs)

    def _best_pool_size(self) -> int:
        """The size with which one INSERT per request is fastest here: microbatch is compared with that."""
        rates: Counter[int] = Counter()
        for size in self._pool_sizes() * 2:  # twice, as one trial is too short to trust
            with self._direct(size) as side:
                rates[size] += int(self._measure(side, self._trial_seconds, f"trying a pool of {size}").rate)
        return rates.most_common(1)[0][0]

    def _pool_sizes(self) -> list[int]:
        return sorted({min(size, self._threads) for size in POOL_SIZES})

    @contextmanager
    def _direct(self, size: int) -> Iterator[Side]:
        pool: ConnectionPool[psycopg.Connection[Payment]] = ConnectionPool(
            self._conninfo, min_size=size, max_size=size, kwargs={"row_factory": dict_row}, open=False
        )

        def insert(payment: Payment) -> Payment:
            with pool.connection() as connection:
                row = connection.execute(self._insert, payment).fetchone()
            assert row is not None
            return row

        with pool:
            pool.wait()
            yield Side("direct", insert)

    @contextmanager
    def _batched(self) -> Iterator[Side]:
        processor = PostgresProcessor.insert_into(self._conninfo, self._table, _COLUMNS)
        with MicroBatcher[Payment, Payment](processor, name="microbatch-demo") as batcher:
            yield Side("microbatch", batcher.execute, lambda: batcher.stats().batches)

    def _take_turns(self, sides: list[Side]) -> dict[str, list[Run]]:
        for side in sides:
            self._measure(side, self._trial_seconds, f"warming up {side.name}")
        runs: dict[str, list[Run]] = {side.name: [] for side in sides}
        for turn, side in itertools.product(range(TURNS), sides):
            label = f"turn {turn + 1} of {TURNS}   {side.name:<10}"
            run = self._measure(side, self._seconds, label)
            runs[side.name].append(run)
            self._say(f"  {label}  {run.rate:>8,.0f} rows/s")
        return runs

    def _measure(self, side: Side, seconds: float, label: str) -> Run:
        clients = _Clients(side, self._threads, seconds, self._numbers, self._stop)
        before = side.transactions() if side.transactions else 0
        with clients.running() as futures:
            while wait(futures, timeout=_TICK).not_done:
                if self._line.due():
                    self._line.show(f"  {label}  {clients.rate():>8,.0f} rows/s")
        self._line.clear()
        self._submitted[side.name] += len(clients.latencies)
        for future in futures:
            future.result()
        self._stop.check()
        transactions = side.transactions() - before if side.transactions else len(clients.latencies)
        return clients.run(transactions)

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _setting(self, own_server: bool) -> str:
        with connect(self._conninfo) as connection:
            row = connection.execute(
                "SELECT split_part(current_setting('server_version'), ' ', 1), current_setting('fsync'),"
                " current_setting('synchronous_commit'),"
                " inet_server_addr() IS NOT DISTINCT FROM inet_client_addr()"
            ).fetchone()
        assert row is not None
        version, fsync, synchronous_commit, is_shared = row
        origin = "started for this demo" if own_server else "given by --dsn"
        users = "shared by server and clients" if is_shared else "for the clients; the server is elsewhere"
        lines = [
            (
                "server",
                f"PostgreSQL {version}, {origin}; fsync {fsync}, synchronous_commit {synchronous_commit}",
            ),
            ("machine", f"{os.cpu_count()} cores, {users}{other_work()}"),
            ("clients", f"{self._threads} threads, each waits for its row before it sends the next one"),
        ]
        return table_of_words(lines)

    def _contenders(self, pool_size: int) -> str:
        sizes = ", ".join(map(str, self._pool_sizes()))
        lines = [
            (
                "direct",
                f"BEGIN, INSERT, COMMIT per row; pool of {pool_size} connections, the best of {sizes}",
            ),
            ("microbatch", "insert_into, one INSERT per batch; one connection, default options"),
            (
                "figures",
                f"medians of {TURNS} turns of {self._seconds:g} s, the two sides one after the other",
            ),
        ]
        return table_of_words(lines)

    def _report(self, runs: dict[str, list[Run]]) -> int:
        counted = self._count_rows()
        names = list(runs)
        rates, p50s, p99s = (
            [median(getattr(run, figure) for run in runs[name]) for name in names] for figure in ("rate", "p50", "p99")
        )
        rows = [sum(run.rows for run in runs[name]) for name in names]
        transactions = [sum(run.transactions for run in runs[name]) for name in names]
        batch_sizes = [f"{count / max(each, 1):.1f}" for count, each in zip(rows, transactions, strict=True)]
        lines = [
            ("", *names, "ratio"),
            ("rows/s", *(f"{rate:,.0f}" for rate in rates), ratio(rates)),
            ("latency p50", *map(milliseconds, p50s), ratio(p50s)),
            ("latency p99", *map(milliseconds, p99s), ratio(p99s)),
            ("transactions", *(f"{count:,}" for count in transactions), ratio(transactions)),
            ("mean batch size", *batch_sizes, ""),
            ("rows submitted", *(f"{self._submitted[name]:,}" for name in names), ""),
            ("rows in the table", *(f"{counted[name]:,}" for name in names), ""),
        ]
        self._say(f"\n{table(lines)}\n")
        return self._verdict(counted)

    def _verdict(self, counted: Counter[str]) -> int:
        if counted != self._submitted:
            self._say("  The table does not hold what was submitted: please report this.")
            return 1
        self._say("  Every row was counted in the table, warm-up included, and every caller got its own row.")
        return 0

    def _count_rows(self) -> Counter[str]:
        query = sql.SQL("SELECT status, count(*) FROM {} GROUP BY status").format(self._payments)
        with connect(self._conninfo) as connection:
            return Counter(dict(connection.execute(query).fetchall()))


class _Clients:
    """Threads that insert payment after payment, each for itself, for so many seconds."""

    def __init__(self, side: Side, threads: int, seconds: float, numbers: Iterator[int], stop: StopSignals) -> None:
        self.latencies: list[float] = []
        self._side = side
        self._threads = threads
        self._seconds = seconds
        self._numbers = numbers
        self._stop = stop
        self._started = self._ended = 0.0
        self._gate = threading.Barrier(threads, action=self._start_clock)

    @contextmanager
    def running(self) -> Iterator[list[Future[None]]]:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="client") as executor:
            try:
                yield [executor.submit(self._insert_until_time_is_up) for _ in range(self._threads)]
            except BaseException:
                # Else those already at the gate would wait for threads that never come.
                self._gate.abort()
                raise

    def rate(self) -> float:
        """Rows per second so far."""
        return len(self.latencies) / (time.perf_counter() - self._started) if self._started else 0.0

    def run(self, transactions: int) -> Run:
        ordered = sorted(self.latencies)
        return Run(
            rows=len(ordered),
            rate=len(ordered) / max(self._ended - self._started, 1e-9),
            p50=percentile(ordered, 0.50),
            p99=percentile(ordered, 0.99),
            transactions=transactions,
        )

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _insert_until_time_is_up(self) -> None:
        self._gate.wait()
        end = self._started + self._seconds
        while (begin := time.perf_counter()) < end and not self._stop.count:
            number = next(self._numbers)
            payment = {"user_id": number, "amount": f"{number % 10_000}.50", "status": self._side.name}
            row = self._side.insert(payment)
            self._ended = time.perf_counter()
            self.latencies.append(self._ended - begin)
            if row["user_id"] != number:
                raise CommandError(f"payment {number} got the row of {row['user_id']}: please report this", 1)


def other_work() -> str:
    """What else keeps the machine busy: on a crowded one, many direct connections get more of it than one."""
    return f"; load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def ratio(pair: list[float] | list[int]) -> str:
    """How the second relates to the first."""
    first, second = pair
    return f"{second / first:.2f} x" if first else ""


def table_of_words(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<12}{text}" for name, text in lines)
