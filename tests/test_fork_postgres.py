"""`PostgresProcessor` across a fork: the child has connections of its own, the parent's stay the parent's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytestmark = pytest.mark.database

# A child that fails ends with a traceback on stderr and another exit code than 0.
PREAMBLE = """
import gc, json, os, sys, threading, time
import psycopg, psycopg_pool
from microbatch.processors.postgres import PostgresProcessor
from microbatch.protocols import Batch

database = os.environ["DATABASE"]
told = {}

def who(processor, seconds=0, marker=0):
    '''The session that served a batch, and the parameter that came back with it.'''
    row, = processor.process(Batch([(marker, seconds)], id=f"{os.getpid()}-{marker}"))
    assert row["marker"] == marker, row
    return row["pid"]

def make(conninfo=database):
    return PostgresProcessor(
        conninfo, "SELECT pg_backend_pid() AS pid, %s AS marker FROM (SELECT pg_sleep(%s)) AS pause"
    )

def in_child(work):
    '''What work() returns in a forked child, which then ends as a program ends, finalisers and all.'''
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(write, "w") as pipe:
            json.dump(work(), pipe)
        sys.exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(answer)
"""


def run(database: str, script: str) -> dict[str, Any]:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside a thread.
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            PREAMBLE + textwrap.dedent(script) + "\nprint(json.dumps(told))",
        ],
        env={**os.environ, "DATABASE": database},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_parent_and_child_use_connections_of_their_own(database: str) -> None:
    told = run(
        database,
        """
        processor = make()
        told["before"] = who(processor)
        told["child"] = in_child(lambda: [who(processor, marker=n) for n in range(3)])
        told["after"] = who(processor)
        processor.close()
        """,
    )

    assert told["before"] == told["after"]
    assert len(set(told["child"])) == 1
    assert told["before"] not in told["child"]


@pytest.mark.parametrize(
    "ending",
    [
        "processor.close()",
        "processor.open(); processor.close()",
        "globals().pop('processor'); gc.collect()",
        "pass",
    ],
    ids=["closes", "opens and closes", "drops the processor", "does nothing"],
)
def test_a_child_ends_without_ending_the_parents_session(database: str, ending: str) -> None:
    told = run(
        database,
        f"""
        processor = make()
        told["before"] = who(processor)

        def child():
            {ending}

        in_child(child)
        told["after"] = who(processor)
        processor.close()
        """,
    )

    assert told["before"] == told["after"]


def test_a_fork_in_the_middle_of_a_batch_disturbs_neither_side(database: str) -> None:
    told = run(
        database,
        """
        processor = make()
        told["before"] = who(processor)
        busy = threading.Thread(target=lambda: told.update(busy=who(processor, seconds=1, marker=7)))
        busy.start()
        time.sleep(0.3)
        told["child"] = in_child(lambda: [who(processor, marker=n) for n in range(5)])
        busy.join()
        told["after"] = who(processor)
        processor.close()
        """,
    )

    assert told["before"] == told["busy"] == told["after"]
    assert told["before"] not in told["child"]


def test_a_child_cannot_cut_the_batch_of_its_parent(database: str) -> None:
    told = run(
        database,
        """
        processor = make()
        processor.open()
        batch = Batch([(7, 1)], id="shared")
        busy = threading.Thread(target=lambda: told.update(busy=processor.process(batch)[0]["marker"]))
        busy.start()
        time.sleep(0.3)
        in_child(lambda: processor.abandon(batch))
        busy.join()
        processor.close()
        """,
    )

    assert told["busy"] == 7


def test_grandchildren_connect_for_themselves_too(database: str) -> None:
    told = run(
        database,
        """
        processor = make()
        told["parent"] = who(processor)

        def child():
            mine = who(processor)
            return [mine, in_child(lambda: who(processor)), who(processor)]

        told["child"] = in_child(child)
        told["after"] = who(processor)
        processor.close()
        """,
    )

    child, grandchild, child_again = told["child"]
    assert (told["parent"], child) == (told["after"], child_again)
    assert len({told["parent"], child, grandchild}) == 3


def test_a_pool_opened_before_the_fork_is_refused_in_the_child(database: str) -> None:
    told = run(
        database,
        """
        def attempt():
            try:
                return who(processor)
            except RuntimeError as error:
                return str(error)

        # Not in a `with`, which the child would leave, too, and close the connection of its parent.
        pool = psycopg_pool.ConnectionPool(database, min_size=1, open=True)
        pool.wait()
        processor = make(pool)
        told["child"] = in_child(attempt)
        told["parent"] = attempt()
        pool.close()
        """,
    )

    assert "opened before the fork" in told["child"]
    assert isinstance(told["parent"], int)


def test_a_pool_opened_in_the_child_serves_it(database: str) -> None:
    told = run(
        database,
        """
        pool = psycopg_pool.ConnectionPool(database, min_size=1, open=False)
        processor = make(pool)

        def child():
            with pool:
                return who(processor)

        told["child"] = in_child(child)
        """,
    )

    assert isinstance(told["child"], int)
