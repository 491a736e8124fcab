"""An encrypted connection, whose bytes may lie decrypted in the client while its socket is silent."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from microbatch import MicroBatcher
from microbatch.embedded import EmbeddedPostgres, EmbeddedServerError, _unprivileged_account
from microbatch.processors.postgres import PostgresProcessor

pytestmark = pytest.mark.database

TABLE = "CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL CHECK (key <> ''))"
INSERT = "INSERT INTO item (key) VALUES (%(key)s) RETURNING id, key"
MAKERS = {
    "statement": lambda conninfo: PostgresProcessor(conninfo, INSERT),
    "bulk": lambda conninfo: PostgresProcessor.insert_into(conninfo, "item", ["key"]),
}


@pytest.fixture(scope="module")
def encrypted(binaries: None) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        certificate, key = certified(Path(name))
        try:
            server = EmbeddedPostgres(ssl=True, ssl_cert_file=str(certificate), ssl_key_file=str(key)).start()
        except EmbeddedServerError as error:
            if "not supported by this build" not in str(error):
                raise
            pytest.skip("this server is built without TLS")
        with server, psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute(TABLE)
            yield make_conninfo(server.dsn, sslmode="verify-ca", sslrootcert=str(certificate))


def certified(directory: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key, where the server's account can read them."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory.chmod(0o755)
    certificate, key = directory / "server.crt", directory / "server.key"
    how = "req -new -x509 -days 2 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=localhost"
    command = ["openssl", *how.split(), "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    account = _unprivileged_account()
    if account is not None:
        os.chown(key, *account)
    return certificate, key


@pytest.mark.parametrize("way", MAKERS)
@pytest.mark.parametrize("size", [1, 16_384, 100_000])
def test_P2_every_job_has_its_own_row_over_tls(encrypted: str, way: str, size: int) -> None:
    """Records of TLS hold 16 KiB: answers and commands of more and of less than one."""
    with psycopg.connect(encrypted) as connection:
        assert connection.pgconn.ssl_in_use
    jobs: list[Any] = [{"key": f"{number:>6}".ljust(size, "x")} for number in range(100)]
    with MicroBatcher(MAKERS[way](encrypted)) as batcher:
        rows = [future.result(20) for future in batcher.submit_many(jobs)]

    assert [row["key"] for row in rows] == [job["key"] for job in jobs]


@pytest.mark.parametrize("way", MAKERS)
def test_P3_a_bad_job_fails_alone_over_tls(encrypted: str, way: str) -> None:
    jobs: list[Any] = [{"key": "" if number % 7 == 3 else "k" * 5000} for number in range(100)]
    with MicroBatcher(MAKERS[way](encrypted)) as batcher:
        errors = [future.exception(20) for future in batcher.submit_many(jobs)]

    assert [isinstance(error, psycopg.errors.CheckViolation) for error in errors] == [not job["key"] for job in jobs]
    assert sum(error is None for error in errors) == 86


UNTRUSTED = {
    "a root that does not know the server": {"sslrootcert": "other"},
    "another name": {"sslmode": "verify-full", "host": "127.0.0.1"},
    "no root": {"sslrootcert": "/nowhere/root.crt"},
}


@pytest.mark.parametrize("how", ["own", "lent"])
@pytest.mark.parametrize("why", UNTRUSTED)
def test_P9_a_server_that_is_not_trusted_is_not_tried_again(encrypted: str, tmp_path: Path, why: str, how: str) -> None:
    changes = dict(UNTRUSTED[why])
    if changes.get("sslrootcert") == "other":
        changes["sslrootcert"] = str(certified(tmp_path)[0])
    conninfo = make_conninfo(encrypted, **changes)
    source: Any = conninfo if how == "own" else lambda: psycopg.connect(conninfo)
    with MicroBatcher(PostgresProcessor(source, INSERT), delivery_timeout=15) as batcher:
        error = batcher.submit({"key": "k"}).exception()

    assert isinstance(error, psycopg.OperationalError)
    assert str(error).startswith(("connection failed: ", "connection is bad: "))
    assert batcher.stats().retries == 0
