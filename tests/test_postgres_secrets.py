"""A password is in no log, no repr, no error and no figure, whatever happens to the connection that needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Once, Proxy, is_commit, is_committed, mentions
from psycopg import sql
from psycopg.conninfo import make_conninfo

from microbatch import MicroBatcher
from microbatch.errors import MicrobatchError
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.guard import DDL
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

SECRET = "s3cret-p4ssword"
INSERT = "INSERT INTO item (n) VALUES (%(n)s) RETURNING n"


@pytest.fixture
def conninfo(shared_database: str) -> Iterator[str]:
    """Of a role whose password is the secret."""
    role = sql.Identifier(f"secret_{os.urandom(4).hex()}")
    with psycopg.connect(shared_database, autocommit=True) as control:
        control.execute("CREATE TABLE item (n integer UNIQUE NOT NULL)")
        control.execute(DDL)
        control.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, SECRET))
        control.execute(sql.SQL("GRANT ALL ON item, microbatch_ledger TO {}").format(role))
    yield make_conninfo(shared_database, user=role._obj[0], password=SECRET)
    empty(shared_database)
    with psycopg.connect(shared_database, autocommit=True) as control:
        control.execute(sql.SQL("DROP OWNED BY {}").format(role))
        control.execute(sql.SQL("DROP ROLE {}").format(role))


def told_by(error: BaseException) -> list[str]:
    """Everything that an error tells to those who look: its chain, its attributes, its frames' text, its pickle."""
    told = [*traceback.format_exception(error)]
    while error is not None:  # type: ignore[redundant-expr]
        told += [repr(error), str(error), repr(vars(error)), repr(error.args)]
        with contextlib.suppress(Exception):
            told.append(pickle.dumps(error).decode("latin1"))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return told


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def refused(conninfo: str) -> str:
    return make_conninfo(conninfo, port=unused_port())


def wrong(conninfo: str) -> str:
    return make_conninfo(conninfo, password=SECRET + "x")


def missing(conninfo: str) -> str:
    return make_conninfo(conninfo, dbname="no_such_database")


def the_same(conninfo: str) -> str:
    return conninfo


@pytest.mark.parametrize("change", [the_same, refused, wrong, missing])
@pytest.mark.parametrize("guard", ["auto", "xid", "none"])
def test_the_password_shows_nowhere(
    conninfo: str, caplog: pytest.LogCaptureFixture, change: Callable[[str], str], guard: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    processor = PostgresProcessor(change(conninfo), INSERT, commit_guard=guard)
    told: list[str] = [repr(processor), str(processor)]
    with MicroBatcher(processor, delivery_timeout=1.0) as batcher:
        futures = batcher.submit_many([{"n": n} for n in (1, None, 1, 2)])
        for future in futures:
            error = future.exception(10)
            told += [repr(future), *(told_by(error) if error else [])]
        told += [repr(batcher), repr(batcher.stats())]
    told.append(caplog.text)
    told += [repr(vars(record)) for record in caplog.records]

    assert [text for text in told if SECRET in text] == []
    assert len(told) > 8


@pytest.mark.parametrize(
    ("is_it", "harm"),
    [(mentions("INSERT"), Harm.CUT), (is_commit, Harm.CUT), (is_committed, Harm.CUT), (is_committed, Harm.STALL)],
    ids=["before", "COMMIT", "its answer", "silence"],
)
@pytest.mark.parametrize("guard", ["ledger", "xid", "none"])
def test_the_password_does_not_show_when_the_link_breaks(
    conninfo: str, caplog: pytest.LogCaptureFixture, is_it: Any, harm: Harm, guard: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with Proxy(conninfo, Once(is_it, harm)) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard=guard)
        with MicroBatcher(processor, delivery_timeout=1.0) as batcher:
            error = batcher.submit({"n": 1}).exception(10)
            told += told_by(error) if error else []
            told += [repr(batcher.stats()), repr(batcher)]
    told += [caplog.text, *(repr(vars(record)) for record in caplog.records)]

    assert [text for text in told if SECRET in text] == []


def test_no_error_of_process_open_and_close_shows_it(conninfo: str) -> None:
    told: list[str] = []
    for changed in (refused(conninfo), wrong(conninfo), missing(conninfo)):
        processor = PostgresProcessor(changed, INSERT)
        for call in (processor.open, lambda: processor.process(Batch([{"n": 1}], id="b1")), processor.close):  # noqa: B023
            try:
                call()
            except (psycopg.Error, MicrobatchError) as error:
                told += told_by(error)

    assert told
    assert [text for text in told if SECRET in text] == []
