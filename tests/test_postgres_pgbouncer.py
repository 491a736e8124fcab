"""Through pgbouncer in transaction mode: two transactions of one connection may meet two servers' processes."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Once, Proxy, behind_commit, is_commit, is_committed
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.guard import DDL
from microbatch.processors.postgres.session import ask

pytestmark = pytest.mark.database

INSERT = "INSERT INTO item (n, label) VALUES (%(n)s, %(label)s) RETURNING id, n"
CONFIG = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = 2
min_pool_size = 2
max_client_conn = 100
server_round_robin = 1
server_login_retry = 1
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="microbatch-pgbouncer-") as directory:  # others may enter, unlike pytest's
        yield Path(directory)


@pytest.fixture(scope="module")
def bouncer(shared_database: str, directory: Path) -> Iterator[str]:
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    target = conninfo_to_dict(shared_database)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    users = directory / "users.txt"
    users.write_text(f'"{target["user"]}" "{target.get("password", "")}"\n')
    facts = {"host": target.get("host", "127.0.0.1"), "port": target.get("port", 5432), "listen": port, "users": users}
    config = directory / "pgbouncer.ini"
    config.write_text(CONFIG.format(**facts))
    command = [program, "-q", str(config)]
    if os.getuid() == 0:
        give_to_nobody(directory)
        command[1:1] = ["-u", "nobody"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    conninfo = make_conninfo(shared_database, host="127.0.0.1", port=port, sslmode="disable")
    try:
        wait_for(conninfo)
        yield conninfo
    finally:
        process.terminate()
        process.wait(10)


def give_to_nobody(directory: Path) -> None:
    """pgbouncer does not run as root."""
    nobody = pwd.getpwnam("nobody")
    for path in (directory, *directory.iterdir()):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)


def wait_for(conninfo: str) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            psycopg.connect(conninfo, connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture
def control(shared_database: str, bouncer: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY, n integer NOT NULL, label text)")
        connection.execute(DDL)
        yield connection
    empty(shared_database)


def stored(control: psycopg.Connection[Any]) -> list[int]:
    return [n for (n,) in control.execute("SELECT n FROM item ORDER BY n").fetchall()]


def test_P2_P3_batches_of_many_connections_over_two_servers(bouncer: str, control: psycopg.Connection[Any]) -> None:
    processors = [PostgresProcessor(bouncer, INSERT, commit_guard=guard) for guard in ("xid", "ledger", "auto", "none")]
    failures: list[Any] = []

    def flow(lane: int, processor: PostgresProcessor) -> None:
        with MicroBatcher(processor, max_batch_size=10, max_concurrent_batches=2) as batcher:
            numbers = range(1000 * lane, 1000 * lane + 200)
            futures = {n: batcher.submit({"n": n if n % 50 else None, "label": str(n)}) for n in numbers}
            for n, future in futures.items():
                error = future.exception(30)
                if isinstance(error, psycopg.errors.NotNullViolation) != (n % 50 == 0):
                    failures.append(error)
                elif error is None and future.result()["n"] != n:
                    failures.append(future.result())

    with psycopg.connect(bouncer) as connection:
        assert ask(connection).pooled
    threads = [threading.Thread(target=flow, args=each) for each in enumerate(processors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert failures == []
    assert stored(control) == [n for lane in range(4) for n in range(1000 * lane, 1000 * lane + 200) if n % 50]
    ids = dict(control.execute("SELECT n, label FROM item").fetchall())
    assert all(str(n) == label for n, label in ids.items())


@pytest.mark.parametrize("guard", ["xid", "ledger"])
@pytest.mark.parametrize("moment", ["before COMMIT", "behind COMMIT", "before its answer"])
def test_P4_a_lost_commit_is_found_out(bouncer: str, control: psycopg.Connection[Any], moment: str, guard: str) -> None:
    plan = {
        "before COMMIT": Once(is_commit, Harm.CUT),
        "behind COMMIT": Once(behind_commit(), Harm.CUT_BEHIND),
        "before its answer": Once(is_committed, Harm.CUT),
    }[moment]
    with Proxy(bouncer, plan) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor) as batcher:
            futures = batcher.submit_many([{"n": n, "label": ""} for n in range(5)])
            assert [future.result(15)["n"] for future in futures] == list(range(5))

    assert plan.fired.is_set()
    assert stored(control) == list(range(5))


def test_nothing_of_a_batch_leaks_to_the_next_client(bouncer: str, control: psycopg.Connection[Any]) -> None:
    def settings() -> set[tuple[Any, ...]]:
        query = "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')"
        with psycopg.connect(bouncer, autocommit=True, prepare_threshold=None) as other:
            return {other.execute(query).fetchone() or () for _ in range(10)}

    before = settings()
    with MicroBatcher(PostgresProcessor(bouncer, INSERT), delivery_timeout=5) as batcher:
        for n in range(10):
            batcher.execute({"n": n, "label": ""})
            assert settings() == before
