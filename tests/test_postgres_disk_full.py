"""A disk without room: for the rows of a table, and for the server's log. Root mounts small ones; others skip."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg import sql
from servers import crashed, hand_over, is_alive
from test_postgres_guard import judged, new_keys, out_of_time

from microbatch import MicroBatcher
from microbatch.embedded import EmbeddedPostgres, _unprivileged_account
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.guard import DDL

pytestmark = pytest.mark.database

TABLE = "CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL)"
UNCOMPRESSED = "ALTER TABLE item ALTER key SET STORAGE EXTERNAL"
INSERT = "INSERT INTO item (key) VALUES (%(key)s) RETURNING id, key"


@contextlib.contextmanager
def disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, of this size, that `nobody` may use."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Somebody else's file takes all that is left."""
    filler = path / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
    finally:
        filler.unlink()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that the server's account can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_P4_P5_a_table_without_room_is_waited_out(server: Any, shared_database: str, open_directory: Path) -> None:
    """53100 is nobody's fault: what has no time left fails without a trace, the others are written."""
    if not isinstance(server, EmbeddedPostgres):
        pytest.skip("the server's disk is not here")
    with disk(open_directory / "disk", 2) as path, small_tablespace(shared_database, path):
        processor = PostgresProcessor.insert_into(shared_database, "item", ["key"])
        with MicroBatcher(processor, delivery_timeout=60) as batcher:
            with no_room(path):
                late = out_of_time(
                    PostgresProcessor.insert_into(shared_database, "item", ["key"]), jobs(big_keys(1))[0]
                )
                assert isinstance(late.__cause__, psycopg.errors.DiskFull)
                keys = big_keys(40)
                futures = dict(zip(keys, batcher.submit_many(jobs(keys)), strict=True))
                assert not any(future.done() for future in futures.values())
            verdict = judged(shared_database, futures, 60)

        assert not verdict.violations()
        assert [future.exception(0) for future in futures.values()] == [None] * 40


def big_keys(count: int, size: int = 6000) -> list[str]:
    return [key.ljust(size, "x") for key in new_keys(count)]


def jobs(keys: list[str]) -> list[dict[str, str]]:
    return [{"key": key} for key in keys]


@contextlib.contextmanager
def small_tablespace(database: str, path: Path) -> Iterator[None]:
    place = path / "rows"
    place.mkdir()
    account = _unprivileged_account()
    assert account is not None
    os.chown(place, *account)
    with psycopg.connect(database, autocommit=True) as control:
        control.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(str(place)))
        control.execute("SET default_tablespace = small")
        control.execute(TABLE)
        control.execute(UNCOMPRESSED)
        try:
            yield
        finally:
            empty(database)
            control.close()
            with psycopg.connect(database, autocommit=True) as again:
                again.execute("DROP TABLESPACE small")


@pytest.mark.parametrize("guard", ["ledger", "xid"])
def test_P4_P5_a_server_whose_log_has_no_room_ends_and_loses_and_doubles_nothing(
    binaries: None, open_directory: Path, guard: str
) -> None:
    with disk(open_directory / "disk", 48) as path, EmbeddedPostgres(wal_recycle=False, wal_init_zero=False) as server:
        with crashed(server) as files:
            shutil.move(files / "pg_wal", path / "pg_wal")
            (files / "pg_wal").symlink_to(path / "pg_wal")
            hand_over(path / "pg_wal")
        with psycopg.connect(server.dsn, autocommit=True) as control:
            control.execute(TABLE)
            control.execute(UNCOMPRESSED)
            control.execute(DDL)
        processor = PostgresProcessor(server.dsn, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor, delivery_timeout=120, max_batch_size=10) as batcher:
            futures: dict[str, Any] = {}
            with no_room(path):
                deadline = time.monotonic() + 60
                while is_alive(server.pid):
                    assert time.monotonic() < deadline, "there is room still"
                    keys = big_keys(20, 100_000)
                    submitted = batcher.submit_many(jobs(keys))
                    futures |= dict(zip(keys, submitted, strict=True))
                    wait(submitted, 0.2)
            server.restart("immediate")
            verdict = judged(server.dsn, futures, 120)

    assert not verdict.violations()
    assert len(verdict.unknown) <= (10 if guard == "xid" else 0)  # a crash: the batch at its COMMIT
    assert any(future.exception(0) is None for future in futures.values())
