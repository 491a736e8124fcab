"""Servers whose files a test changes: a primary and its standby, a log on another disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

from microbatch.embedded import EmbeddedPostgres, _find_binaries, _unprivileged_account


class Pair:
    """Use it in a `with`; the standby follows the primary from `renew()` to `freeze()`."""

    def __init__(self) -> None:
        self.primary = EmbeddedPostgres(shared_buffers="32MB")
        self.standby = EmbeddedPostgres(shared_buffers="32MB")

    def __enter__(self) -> Pair:
        try:
            self.primary.start()
            self.standby.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.standby.stop("immediate")
        self.primary.stop("immediate")

    def renew(self) -> None:
        """Let the standby follow a primary without a table, whatever a test has done to them."""
        if not is_alive(self.primary.pid):
            self.primary.restart()
        with psycopg.connect(self.primary.dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET ALL")
            connection.execute("SELECT pg_reload_conf()")
            _until(connection, "SELECT current_setting('synchronous_standby_names') = ''")
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        self._follow()

    def dsn_of_standby(self) -> str:
        """Its files are the primary's, and so are its passwords."""
        return self.primary.dsn.replace(f":{self.primary.port}/", f":{self.standby.port}/")

    def catch_up(self) -> None:
        with psycopg.connect(self.primary.dsn, autocommit=True) as connection:
            where = _value(connection, "SELECT pg_current_wal_lsn()")
        with psycopg.connect(self.dsn_of_standby(), autocommit=True) as connection:
            _until(connection, sql.SQL("SELECT pg_last_wal_replay_lsn() >= {}").format(where))

    def freeze(self) -> None:
        """From here on the standby lags."""
        self.catch_up()
        with psycopg.connect(self.dsn_of_standby(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
            connection.execute("SELECT pg_reload_conf()")
            _until(connection, "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")

    def fail_over(self) -> None:
        """The primary is gone for good and the standby takes writes."""
        os.kill(self.primary.pid, signal.SIGQUIT)
        with psycopg.connect(self.dsn_of_standby(), autocommit=True) as connection:
            assert _value(connection, "SELECT pg_promote(true, 30)")
            _until(connection, "SELECT NOT pg_is_in_recovery()")

    def _follow(self) -> None:
        """Put a copy of the primary's files in the place of the standby's own."""
        copy = (_find_binaries().directory / "pg_basebackup", "--dbname", self.primary.dsn, "--pgdata")
        how = ("--checkpoint=fast", "--write-recovery-conf", "--no-sync")
        with crashed(self.standby) as files:
            shutil.rmtree(files)
            subprocess.run([*copy, files, *how], check=True, capture_output=True, timeout=60)


@contextlib.contextmanager
def crashed(server: EmbeddedPostgres) -> Iterator[Path]:
    """The server's data directory while it is down."""
    files = server.directory / "run" / "data"
    os.kill(server.pid, signal.SIGQUIT)
    _wait_for_the_end(server.pid)
    yield files
    hand_over(files)
    server.restart()


def _wait_for_the_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, "the server does not end"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def hand_over(files: Path) -> None:
    account = _unprivileged_account()
    files.chmod(0o700)
    if account is not None:
        for path in (files, *files.rglob("*")):
            os.chown(path, *account, follow_symlinks=False)


def _value(connection: psycopg.Connection[tuple[object, ...]], query: str) -> object:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def _until(connection: psycopg.Connection[tuple[object, ...]], query: str | sql.Composed) -> None:
    deadline = time.monotonic() + 30
    while connection.execute(query).fetchone() != (True,):
        assert time.monotonic() < deadline, query
        time.sleep(0.01)
