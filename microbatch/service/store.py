"""The status store: what became of jobs, for every worker process, and which keys have been used.

A completed job's entry is written with its row (`writer`). What did not get there is noted here, and such a note is a
fence as well: its id being taken, no transaction that is still under way can write the row any more.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
from psycopg import sql

from microbatch.batcher import MicroBatcher
from microbatch.events import JobFailed
from microbatch.job import JobFuture
from microbatch.processors.postgres import PostgresProcessor

from .failures import Failure
from .settings import ServiceError
from .writer import FAILED, STATUS_TABLE

_log = logging.getLogger("microbatch.service")

SECRET_TABLE = "microbatch_secret"
DDL = f"""\
CREATE TABLE IF NOT EXISTS {STATUS_TABLE} (
    id text PRIMARY KEY,
    key bytea UNIQUE,
    fingerprint bytea,
    status text NOT NULL,
    result json NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS {STATUS_TABLE}_at ON {STATUS_TABLE} (at);
CREATE TABLE IF NOT EXISTS {SECRET_TABLE} (
    alone boolean PRIMARY KEY DEFAULT true CHECK (alone),
    secret bytea NOT NULL
)"""
_LOCK = 0x6D6273737473
_READ_SECONDS = 5.0
_NO_ID = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One job in the store; *result* is JSON, of a row or of a `Failure`."""

    id: str
    status: str
    result: str
    fingerprint: bytes | None = None


class Store(Protocol):
    """What is asked about jobs that this process does not know; *is_shared* with other processes."""

    is_shared: bool

    def find(self, job_id: str) -> Entry | None:
        """The entry of a job. Blocks up to 5 seconds; raises what the database's absence raises."""

    def find_keys(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entries of jobs by their keys; as `find`."""

    def note(self, job_id: str, failure: Failure) -> None:
        """Write down, some time soon, that this job left nothing. Never blocks and never raises."""

    def settle(self, job_id: str, failure: Failure) -> Entry | None:
        """See to it that a job without an entry never gets one: the entry that is there from now on; as `find`."""

    def ping(self) -> None:
        """As `find`; returns when the database answers."""

    def flush(self, timeout: float) -> None:
        """Wait until what was noted is written."""


class PostgresStore:
    """In two tables beside the rows; one connection per process to read, another to note."""

    is_shared = True

    def __init__(self, conninfo: str, store: sql.Identifier, name: str) -> None:
        self._reads: MicroBatcher[Any, Any] = MicroBatcher(
            PostgresProcessor(conninfo, _READ.format(store=store), commit_guard="none"),
            max_batch_size=1000,
            delivery_timeout=_READ_SECONDS,
            history=0,
            name=f"{name}-status",
        )
        self._notes: MicroBatcher[Any, Any] = MicroBatcher(
            PostgresProcessor(conninfo, _NOTE.format(store=store)), history=0, name=f"{name}-notes"
        )
        self._notes.on(JobFailed, _not_noted)

    def find(self, job_id: str) -> Entry | None:
        return _entry(self._reads.execute({"id": job_id, "key": None}))

    def find_keys(self, keys: Sequence[bytes]) -> list[Entry | None]:
        futures = self._reads.submit_many([{"id": _NO_ID, "key": key} for key in keys])
        return [_entry(future.result()) for future in futures]

    def note(self, job_id: str, failure: Failure) -> None:
        try:
            self._submit_note(job_id, failure)
        except Exception:  # full, or closing: the owner still knows
            _log.warning("a failed job is not in the status store: it does not take notes", exc_info=True)

    def settle(self, job_id: str, failure: Failure) -> Entry | None:
        self._submit_note(job_id, failure, delivery_timeout=_READ_SECONDS).result()
        return self.find(job_id)

    def ping(self) -> None:
        self.find(_NO_ID)

    def flush(self, timeout: float) -> None:
        self._notes.flush(timeout)

    def _submit_note(self, job_id: str, failure: Failure, **options: Any) -> JobFuture[Any]:
        note = {"id": job_id, "status": FAILED, "result": json.dumps(failure.as_json())}
        return self._notes.submit(note, submit_timeout=0.0, **options)


class MemoryStore:
    """Nothing beyond what its one process remembers; see `known`."""

    is_shared = False

    def __init__(self, conninfo: str, name: str) -> None:
        processor = PostgresProcessor(conninfo, "SELECT 1", commit_guard="none")
        self._reads: MicroBatcher[Any, Any] = MicroBatcher(
            processor, delivery_timeout=_READ_SECONDS, history=0, name=f"{name}-ping"
        )

    def find(self, job_id: str) -> Entry | None:
        return None

    def find_keys(self, keys: Sequence[bytes]) -> list[Entry | None]:
        return [None] * len(keys)

    def note(self, job_id: str, failure: Failure) -> None:
        pass

    def settle(self, job_id: str, failure: Failure) -> Entry | None:
        return None

    def ping(self) -> None:
        self._reads.execute(())

    def flush(self, timeout: float) -> None:
        pass


_READ = sql.SQL(
    "SELECT id, status, result::text, fingerprint FROM {store} WHERE id = %(id)s::text OR key = %(key)s::bytea LIMIT 1"
)
_NOTE = sql.SQL(
    "INSERT INTO {store} (id, status, result) VALUES (%(id)s::text, %(status)s::text, %(result)s::json)"
    " ON CONFLICT (id) DO NOTHING"
)


def make_tables(connection: psycopg.Connection[Any]) -> sql.Identifier:
    """Create the tables where they are missing; the qualified name of the one with the entries.

    Raises:
        ServiceError: this role may not create or use them.
    """
    try:
        if not _are_there(connection):
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
                connection.execute(DDL.encode())
        (schema,) = connection.execute(
            "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = to_regclass(%s)", [STATUS_TABLE]
        ).fetchone() or ("",)
    except psycopg.Error as error:
        if error.sqlstate is None:
            raise
        raise ServiceError(
            f"cannot create {STATUS_TABLE} and {SECRET_TABLE} (SQLSTATE {error.sqlstate}): have `microbatch init-db"
            " --service` run by the owner of the schema, or set MICROBATCH_STORE=memory for a single process"
        ) from None
    return sql.Identifier(str(schema), STATUS_TABLE)


def shared_secret(connection: psycopg.Connection[Any]) -> bytes:
    """The key of all ids, made by the first process that asks."""
    look = f"SELECT secret FROM {SECRET_TABLE}".encode()
    row = connection.execute(look).fetchone()
    if row is None:
        make = f"INSERT INTO {SECRET_TABLE} (secret) VALUES (%s) ON CONFLICT DO NOTHING".encode()
        connection.execute(make, [secrets.token_bytes(32)])
        row = connection.execute(look).fetchone() or (b"",)
    return bytes(row[0])


def _are_there(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute("SELECT to_regclass(%s), to_regclass(%s)", [STATUS_TABLE, SECRET_TABLE]).fetchone()
    return row is not None and None not in row


def _entry(row: Any) -> Entry | None:
    return None if row is None else Entry(row["id"], row["status"], row["result"], row["fingerprint"])


def _not_noted(event: JobFailed) -> None:
    _log.warning("a failed job is not in the status store: %s", type(event.error).__name__)
