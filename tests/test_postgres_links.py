"""The way to the server: how long it may take to make a link, what is tried again, and what is kept of it."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest
from databases import empty

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor

pytestmark = pytest.mark.database

INSERT = "INSERT INTO item (n) VALUES (%(n)s) RETURNING n"
WAYS: dict[str, Callable[[Any], PostgresProcessor]] = {
    "statement": lambda conninfo: PostgresProcessor(conninfo, INSERT),
    "insert_into": lambda conninfo: PostgresProcessor.insert_into(conninfo, "item", ["n"]),
}


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, n int CHECK (n >= 0))")
    yield shared_database
    empty(shared_database)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seconds", [86_400 * 30.0, 86_400 * 50.0, 1e9, threading.TIMEOUT_MAX])
def test_P5_a_deadline_beyond_what_a_server_can_count_is_kept(database: str, way: str, seconds: float) -> None:
    with MicroBatcher(WAYS[way](database), delivery_timeout=seconds) as batcher:
        futures = batcher.submit_many([{"n": 1}, {"n": -1}, {"n": 2}])

        assert [type(future.exception(20)) for future in futures] == [
            type(None),
            psycopg.errors.CheckViolation,
            type(None),
        ]


@pytest.mark.parametrize("way", WAYS)
def test_P5_a_connection_that_was_lent_is_not_kept_in_memory(database: str, way: str) -> None:
    lent: list[weakref.ref[Any]] = []

    def connect() -> Any:
        connection = psycopg.connect(database, autocommit=True)
        lent.append(weakref.ref(connection))
        return connection

    with MicroBatcher(WAYS[way](connect)) as batcher:
        for n in range(5):
            batcher.execute({"n": n})
        gc.collect()

        assert [connection() for connection in lent[:-1]] == [None] * 4


@pytest.mark.parametrize("way", WAYS)
def test_a_pools_connection_keeps_nothing_of_a_processor_that_is_gone(database: str, way: str) -> None:
    with psycopg_pool.ConnectionPool(database, min_size=1, max_size=2, open=True) as pool:
        with contextlib.closing(WAYS[way](pool)) as processor, MicroBatcher(processor) as batcher:
            batcher.execute({"n": 1})
        gone = weakref.ref(processor._writer)
        del processor, batcher
        gc.collect()

        assert gone() is None
