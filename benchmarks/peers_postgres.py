"""Rows into PostgreSQL by other means, each its best honest way: rows per second, all of them there to be written."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from loops import Loop, closed_loop, closed_loop_of_tasks
from postgres_statement import INSERT, TABLE, Row, payment
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from textbook import TimerBatcher

COLUMNS = "user_id, amount, status"
NODE_SECONDS = 120  # for the installation, and for each answer


@dataclass(frozen=True)
class Peer:
    """*write* takes a connection string, rows and the size of a batch, and returns rows per second."""

    name: str
    package: str
    write: Callable[[str, int, int], float]


def rate_of(rows: int, size: int, write: Callable[[int, int], int]) -> float:
    """*write* takes the first number of a batch and its size, and returns how many rows it wrote."""
    begin = time.perf_counter()
    for first in range(0, rows, size):
        assert write(first, size) == size
    return rows / (time.perf_counter() - begin)


# psycopg: a row per request


@contextmanager
def pool_of(dsn: str, size: int, autocommit: bool) -> Iterator[Callable[[Row], Any]]:
    """INSERT through a pool, in a transaction begun and committed for it or in the implicit one of autocommit."""
    kwargs = {"row_factory": dict_row, "autocommit": autocommit}
    with ConnectionPool(dsn, min_size=size, max_size=size, kwargs=kwargs, open=True) as pool:
        pool.wait()

        def write(row: Row) -> Any:
            with pool.connection() as connection:
                return connection.execute(INSERT, row).fetchone()

        yield write


def insert_per_request(dsn: str, rows: int, _: int, *, threads: int, autocommit: bool) -> float:
    share = min(rows, 4000) // threads

    def client(_: int) -> None:
        for number in range(share):
            assert write(payment(number))["user_id"] == number

    with pool_of(dsn, threads, autocommit) as write, ThreadPoolExecutor(threads) as executor:
        begin = time.perf_counter()
        list(executor.map(client, range(threads)))
        return share * threads / (time.perf_counter() - begin)


# psycopg: loops over batches, the limits of their form


def executemany(connection: psycopg.Connection[Row], jobs: list[Row]) -> list[Row | None]:
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(INSERT, jobs, returning=True)
        read = [cursor.fetchone()]
        while cursor.nextset():
            read.append(cursor.fetchone())
    return read


def executemany_loop(dsn: str, rows: int, size: int) -> float:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        return rate_of(
            rows, size, lambda first, n: len(executemany(connection, [payment(first + i) for i in range(n)]))
        )


def copy_loop(dsn: str, rows: int, size: int) -> float:
    """Answers with no row: nobody learns an id."""
    with psycopg.connect(dsn, autocommit=True) as connection:

        def write(first: int, n: int) -> int:
            with connection.cursor() as cursor:
                with cursor.copy(f"COPY {TABLE} ({COLUMNS}) FROM STDIN") as copy:
                    for i in range(n):
                        copy.write_row(tuple(payment(first + i).values()))
                return cursor.rowcount

        return rate_of(rows, size, write)


# Other drivers


def sqlalchemy_insert(dsn: str, rows: int, size: int) -> float:
    import sqlalchemy as sa

    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    table = sa.Table(
        TABLE,
        sa.MetaData(),
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("amount", sa.Numeric(10, 2), nullable=False),
        sa.Column("status", sa.String(50), nullable=False),
        sa.Column("transaction_date", sa.DateTime(timezone=True), server_default=sa.func.now()),
    )
    statement = sa.insert(table).returning(*table.columns, sort_by_parameter_order=True)

    def write(first: int, n: int) -> int:
        with engine.begin() as connection:
            return len(connection.execute(statement, [payment(first + i) for i in range(n)]).mappings().all())

    try:
        return rate_of(rows, size, write)
    finally:
        engine.dispose()


def psycopg2_execute_values(dsn: str, rows: int, size: int) -> float:
    """Answers with rows in an order that nobody promises."""
    import psycopg2
    from psycopg2.extras import RealDictCursor, execute_values

    connection = psycopg2.connect(dsn)
    query = f"INSERT INTO {TABLE} ({COLUMNS}) VALUES %s RETURNING *"

    def write(first: int, n: int) -> int:
        with connection, connection.cursor(cursor_factory=RealDictCursor) as cursor:
            values = [tuple(payment(first + i).values()) for i in range(n)]
            return len(execute_values(cursor, query, values, page_size=n, fetch=True))

    try:
        return rate_of(rows, size, write)
    finally:
        connection.close()


def asyncpg_fetchmany(dsn: str, rows: int, size: int) -> float:
    query = f"INSERT INTO {TABLE} ({COLUMNS}) VALUES ($1, $2::text::numeric, $3) RETURNING *"

    async def write(connection: Any, first: int) -> int:
        async with connection.transaction():
            jobs = [tuple(payment(first + i).values()) for i in range(size)]
            return len([dict(row) for row in await connection.fetchmany(query, jobs)])

    return asyncio.run(asyncpg_loop(dsn, rows, size, write))


def asyncpg_unnest(dsn: str, rows: int, size: int) -> float:
    """Answers with rows in an order that nobody promises."""
    query = (
        f"INSERT INTO {TABLE} ({COLUMNS}) SELECT a, b::numeric, c"
        " FROM unnest($1::int[], $2::text[], $3::text[]) AS s (a, b, c) RETURNING *"
    )

    async def write(connection: Any, first: int) -> int:
        jobs = [payment(first + i) for i in range(size)]
        columns = [[job[name] for job in jobs] for name in COLUMNS.split(", ")]
        return len([dict(row) for row in await connection.fetch(query, *columns)])

    return asyncio.run(asyncpg_loop(dsn, rows, size, write))


async def asyncpg_loop(dsn: str, rows: int, size: int, write: Callable[[Any, int], Any]) -> float:
    import asyncpg

    connection = await asyncpg.connect(**asyncpg_parts(dsn))
    try:
        begin = time.perf_counter()
        for first in range(0, rows, size):
            assert await write(connection, first) == size
        return rows / (time.perf_counter() - begin)
    finally:
        await connection.close()


def asyncpg_parts(dsn: str) -> dict[str, Any]:
    parts = conninfo_to_dict(dsn)
    names = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
    return {theirs: parts[ours] for ours, theirs in names.items() if parts.get(ours)}


PEERS = [
    *(
        Peer(
            f"INSERT per request, {threads} threads, {'autocommit' if autocommit else 'transaction'}",
            "psycopg",
            partial(insert_per_request, threads=threads, autocommit=autocommit),
        )
        for threads in (8, 32)
        for autocommit in (False, True)
    ),
    Peer("psycopg executemany loop", "psycopg", executemany_loop),
    Peer("psycopg COPY loop (no rows back)", "psycopg", copy_loop),
    Peer("asyncpg fetchmany", "asyncpg", asyncpg_fetchmany),
    Peer("asyncpg unnest", "asyncpg", asyncpg_unnest),
    Peer("SQLAlchemy insertmanyvalues, sorted", "sqlalchemy", sqlalchemy_insert),
    Peer("psycopg2 execute_values", "psycopg2", psycopg2_execute_values),
]


# pg-promise under Node


class NodeMissing(Exception):
    """Says which program or package could not be had."""


@contextmanager
def pg_promise(dsn: str) -> Iterator[Callable[[str, int, int], float]]:
    """A function of way, rows and size; the package goes into a directory that is removed at the end."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NodeMissing(f"{program} is not installed")
    with tempfile.TemporaryDirectory() as directory:
        install_pg_promise(directory)
        shutil.copy(Path(__file__).with_name("peers.mjs"), directory)
        command = ["node", f"{directory}/peers.mjs", json.dumps(asyncpg_parts(dsn)), TABLE]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield partial(ask, process)
            finally:
                process.kill()


def install_pg_promise(directory: str) -> None:
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", directory, "pg-promise"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=NODE_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise NodeMissing(f"npm could not install pg-promise ({type(error).__name__})") from error


def ask(process: subprocess.Popen[str], way: str, rows: int, size: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    guard = threading.Timer(NODE_SECONDS, process.kill)
    guard.start()
    try:
        process.stdin.write(f"{way} {rows} {size}\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    finally:
        guard.cancel()


# Closed loop


def loop_pool(dsn: str, threads: int, seconds: float, *, size: int, autocommit: bool) -> Loop:
    with pool_of(dsn, min(size, threads), autocommit) as write:
        write(payment(0))
        return closed_loop(write, threads, seconds, payment)


def loop_timer(dsn: str, threads: int, seconds: float, *, interval: float) -> Loop:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        batcher = TimerBatcher(partial(executemany, connection), 100, interval)
        try:
            batcher.execute(payment(0))
            return closed_loop(batcher.execute, threads, seconds, payment)
        finally:
            batcher.close()


def loop_asyncpg(dsn: str, tasks: int, seconds: float) -> Loop:
    return asyncio.run(asyncpg_clients(dsn, tasks, seconds))


async def asyncpg_clients(dsn: str, tasks: int, seconds: float) -> Loop:
    import asyncpg

    query = f"INSERT INTO {TABLE} ({COLUMNS}) VALUES ($1, $2::text::numeric, $3) RETURNING *"
    size = min(8, tasks)
    async with asyncpg.create_pool(**asyncpg_parts(dsn), min_size=size, max_size=size) as pool:

        async def write(row: Row) -> None:
            await pool.fetchrow(query, *row.values())

        await write(payment(0))
        return await closed_loop_of_tasks(write, tasks, seconds, payment)
