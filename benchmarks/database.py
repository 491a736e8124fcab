"""The server that a benchmark runs on: one started for it, with fsync on, or the one that --dsn names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from microbatch.embedded import EmbeddedPostgres


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME=VALUE", help="of the server started here"
    )


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    """Its connection string."""
    if arguments.dsn:
        yield arguments.dsn
        return
    with EmbeddedPostgres(**dict(setting.split("=", 1) for setting in arguments.setting)) as embedded:
        yield embedded.dsn


def described(connection: psycopg.Connection[Any]) -> str:
    names = ("server_version", "fsync", "synchronous_commit", "wal_sync_method", "commit_delay")
    values = [connection.execute("SELECT current_setting(%s)", [name]).fetchone() for name in names]
    return ", ".join(f"{name} {value[0]}" for name, value in zip(names, values, strict=True) if value)
