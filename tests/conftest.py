"""One real PostgreSQL for the whole run, one fresh database for each test that asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from microbatch.embedded import EmbeddedPostgres, _find_binaries
from microbatch.errors import MissingExtra

# The background job of a shell, and so perhaps a run in CI, inherits an ignored Ctrl-C and would hand that down to
# the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def binaries() -> None:
    """Skips where no PostgreSQL can be had; there is no such excuse in CI."""
    try:
        _find_binaries()
    except MissingExtra as error:
        if os.environ.get("CI") or os.environ.get("MICROBATCH_CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres | SimpleNamespace]:
    """An `EmbeddedPostgres`, or of the server that `MICROBATCH_TEST_DSN` names only the `dsn`.

    It trades durability for speed: a test that crashes a server and counts rows brings its own.
    """
    given = os.environ.get("MICROBATCH_TEST_DSN")
    if given:
        yield SimpleNamespace(dsn=given)
        return
    request.getfixturevalue("binaries")
    embedded = EmbeddedPostgres(fsync="off", synchronous_commit="off", full_page_writes="off", shared_buffers="32MB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", memory_disk())
        embedded.start()
    try:
        yield embedded
    finally:
        embedded.stop()


def memory_disk() -> str | None:
    """A directory in memory, if there is room for the server: each new database is 300 files."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError:
        return None
    # As root the server's programs are copied there, and many a container lets nothing run in it.
    runs = not disk.f_flag & os.ST_NOEXEC and os.access("/dev/shm", os.W_OK | os.X_OK)
    return "/dev/shm" if runs and disk.f_bavail * disk.f_frsize > 4 << 30 else None


@pytest.fixture(scope="session")
def dsn(server: EmbeddedPostgres | SimpleNamespace) -> str:
    return server.dsn


@pytest.fixture
def database(dsn: str) -> Iterator[str]:
    """The connection string of a database that only this test knows."""
    with new_database(dsn) as conninfo:
        yield conninfo


@pytest.fixture(scope="module")
def shared_database(dsn: str) -> Iterator[str]:
    """One for a whole module, which sees to it that its tests do not meet: a new one takes longer than many a test."""
    with new_database(dsn) as conninfo:
        yield conninfo


@contextlib.contextmanager
def new_database(dsn: str) -> Iterator[str]:
    name = f"microbatch_{uuid.uuid4().hex}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield make_conninfo(dsn, dbname=name)
    # A new connection, because the test may have restarted the server.
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
