"""The server that a benchmark runs on: one started for it, with fsync on, or the one that --dsn names."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from report import machine
from slow_fsync import slow_fsync

from microbatch.embedded import EmbeddedPostgres


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME=VALUE", help="of the server started here"
    )
    parser.add_argument(
        "--fsync", type=float, default=0.0, metavar="MILLISECONDS", help="that its disk takes longer at each commit"
    )


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    """Its connection string."""
    if arguments.dsn:
        yield arguments.dsn
        return
    settings = dict(setting.split("=", 1) for setting in arguments.setting)
    slower = slow_fsync(arguments.fsync) if arguments.fsync else nullcontext()
    with slower, EmbeddedPostgres(**settings) as embedded:
        yield embedded.dsn


@contextmanager
def bench(title: str, create: str, drop: str, arguments: argparse.Namespace) -> Iterator[str]:
    """A connection string where *create* was carried out and *drop* will be; says what runs, and where."""
    with server(arguments) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        print(f"{title}\n\n{machine('microbatch', 'psycopg')}")
        print(f"  server    {described(connection)}")
        shown = {name: value for name, value in vars(arguments).items() if name != "dsn"}
        print(f"  settings  {shown}; medians, in brackets the extremes\n")
        connection.execute(create.encode())
        try:
            yield dsn
        finally:
            connection.execute(drop.encode())


def described(connection: psycopg.Connection[Any]) -> str:
    names = ("server_version", "fsync", "synchronous_commit", "wal_sync_method", "commit_delay")
    values = [connection.execute("SELECT current_setting(%s)", [name]).fetchone() for name in names]
    return ", ".join(f"{name} {value[0]}" for name, value in zip(names, values, strict=True) if value)


@contextmanager
def delayed(dsn: str, milliseconds: float) -> Iterator[str]:
    """The same server so many milliseconds away, each way; over TCP only."""
    parts = conninfo_to_dict(dsn)
    target = [str(parts.get("host", "localhost")), str(parts.get("port", 5432))]
    program = [sys.executable, str(Path(__file__).with_name("delay.py")), *target, str(milliseconds)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            port = proxy.stdout.readline().strip()
            yield make_conninfo(dsn, host="127.0.0.1", port=port, sslmode="disable")
        finally:
            proxy.terminate()
