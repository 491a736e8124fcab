"""A database that several tests use, one after the other."""

from __future__ import annotations

import time

import psycopg

_OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def empty(conninfo: str) -> None:
    """End every other session and drop everything in the schema `public`."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        deadline = time.monotonic() + 20
        while connection.execute(f"SELECT pg_terminate_backend(pid) {_OTHERS}").fetchall():
            assert time.monotonic() < deadline, "a session does not end"
            time.sleep(0.005)
        connection.execute("SET client_min_messages = warning")
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
