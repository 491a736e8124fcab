"""Bad jobs among good ones: each fails alone, with psycopg's own error."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
import pytest
from databases import empty
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from microbatch import MicroBatcher
from microbatch.processors.postgres import BatchRolledBack, PostgresProcessor
from microbatch.processors.postgres.isolation import CHUNK
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

UPSERTS = Path(__file__).parent / "scripts" / "upserts.py"
INSERT = "INSERT INTO item (n, label, small, parent) VALUES (%(n)s, %(label)s, %(small)s, %(parent)s) RETURNING id, n"
TABLES = """
    CREATE TABLE parent (id integer PRIMARY KEY);
    INSERT INTO parent VALUES (1);
    CREATE TABLE item (
        id bigint GENERATED ALWAYS AS IDENTITY,
        n integer NOT NULL CONSTRAINT only_once UNIQUE,
        label text CONSTRAINT not_too_long CHECK (length(label) < 20),
        small smallint,
        parent integer CONSTRAINT has_parent REFERENCES parent,
        late integer,
        CONSTRAINT alone EXCLUDE USING btree (late WITH =),
        CONSTRAINT finally UNIQUE (late) DEFERRABLE INITIALLY DEFERRED
    );
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
        IF NEW.label = 'refuse' THEN RAISE EXCEPTION 'refused' USING ERRCODE = 'MB001', CONSTRAINT = 'a rule'; END IF;
        IF NEW.label = 'conflict' THEN RAISE EXCEPTION 'always' USING ERRCODE = '40001'; END IF;
        IF NEW.label = 'memory' THEN RAISE EXCEPTION 'always' USING ERRCODE = '53200'; END IF;
        IF NEW.label = 'slow' THEN PERFORM pg_sleep(1); END IF;
        RETURN NEW;
    END$$;
    CREATE TRIGGER refuse BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@pytest.fixture(scope="module")
def tables(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(TABLES)
    yield shared_database
    empty(shared_database)


@pytest.fixture
def control(tables: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute("TRUNCATE item RESTART IDENTITY")
        yield connection


@pytest.fixture
def processor(tables: str, control: psycopg.Connection[Any]) -> Iterator[PostgresProcessor]:
    processor = PostgresProcessor(tables, INSERT)
    yield processor
    processor.close()


def job(n: Any, **others: Any) -> dict[str, Any]:
    return {"n": n, "label": "good", "small": 1, "parent": 1} | others


def jobs(*numbers: int) -> list[dict[str, Any]]:
    return [job(n) for n in numbers]


def a_batch(jobs: list[Any], attempt: int = 1, deadline: float | None = None) -> Batch[Any]:
    return Batch(jobs, id="b1", attempt=attempt, deadline=deadline)


def stored(control: psycopg.Connection[Any]) -> list[int]:
    return [n for (n,) in control.execute("SELECT n FROM item ORDER BY n").fetchall()]


class Bad(NamedTuple):
    job: Any
    error: type[Exception]
    sqlstate: str | None = None
    constraint: str | None = None


BAD = {
    "not null": Bad(job(None), psycopg.errors.NotNullViolation, "23502"),
    "unique, against the table": Bad(job(-1), psycopg.errors.UniqueViolation, "23505", "only_once"),
    "unique, against a neighbour": Bad(job(0), psycopg.errors.UniqueViolation, "23505", "only_once"),
    "check": Bad(job(999, label="x" * 20), psycopg.errors.CheckViolation, "23514", "not_too_long"),
    "foreign key": Bad(job(999, parent=2), psycopg.errors.ForeignKeyViolation, "23503", "has_parent"),
    "text for an integer": Bad(job("abc"), psycopg.errors.InvalidTextRepresentation, "22P02"),
    "out of range": Bad(job(999, small=2**20), psycopg.errors.NumericValueOutOfRange, "22003"),
    "far out of range": Bad(job(2**80), psycopg.errors.NumericValueOutOfRange, "22003"),
    "NUL": Bad(job(999, label="\0"), psycopg.DataError),
    "lone surrogate": Bad(job(999, label="\ud800"), UnicodeEncodeError),
    "unadaptable": Bad(job(999, label=object()), psycopg.ProgrammingError),
    "missing key": Bad({"n": 999}, psycopg.ProgrammingError),
    "wrong kind": Bad(5, TypeError),
    "sequence for a mapping": Bad((999, "", 1, 1), TypeError),
    "trigger": Bad(job(999, label="refuse"), psycopg.DatabaseError, "MB001", "a rule"),
}


@pytest.mark.parametrize("place", [0, CHUNK, 2 * CHUNK], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_P3_a_bad_job_fails_alone_whatever_it_suffers_from(
    processor: PostgresProcessor, control: psycopg.Connection[Any], kind: str, place: int
) -> None:
    bad = BAD[kind]
    control.execute("INSERT INTO item (n) VALUES (-1)")
    if kind == "unique, against a neighbour" and place == 0:
        place = 1  # the earlier one wins
    batch = jobs(*range(2 * CHUNK))
    batch.insert(place, bad.job)

    results = processor.process(a_batch(batch))

    error = results.pop(place)
    assert isinstance(error, bad.error)
    assert getattr(error, "sqlstate", None) == bad.sqlstate
    if bad.constraint:
        assert error.diag.constraint_name == bad.constraint
    assert [row["n"] for row in results] == list(range(2 * CHUNK))
    assert stored(control) == [-1, *range(2 * CHUNK)]
    ids = dict(control.execute("SELECT id, n FROM item").fetchall())
    assert all(ids[row["id"]] == row["n"] for row in results)


def test_P3_all_kinds_at_once(processor: PostgresProcessor, control: psycopg.Connection[Any]) -> None:
    control.execute("INSERT INTO item (n) VALUES (-1)")
    batch = [job(0)]
    for number, bad in enumerate(BAD.values()):
        batch += [bad.job, job(1000 + number)]

    results = processor.process(a_batch(batch))

    assert [row["n"] for row in results[::2]] == [0, *range(1000, 1000 + len(BAD))]
    for bad, error in zip(BAD.values(), results[1::2], strict=True):
        assert isinstance(error, bad.error)
        assert getattr(error, "sqlstate", None) == bad.sqlstate


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), ()], ids=["short", "long", "empty"])
def test_P3_a_sequence_of_the_wrong_length_fails_alone(
    tables: str, control: psycopg.Connection[Any], values: tuple[int, ...]
) -> None:
    processor = PostgresProcessor(tables, "INSERT INTO item (n, small) VALUES (%s, %s) RETURNING n")

    first, error, last = processor.process(a_batch([(5, 1), values, (6, 1)]))
    processor.close()

    assert (first, last) == ({"n": 5}, {"n": 6})
    assert isinstance(error, psycopg.ProgrammingError)


@pytest.mark.parametrize("constraint", ["alone", "finally"], ids=["exclusion", "deferred"])
def test_P3_exclusion_and_deferred_constraints(tables: str, control: psycopg.Connection[Any], constraint: str) -> None:
    other = {"alone": "finally", "finally": "alone"}[constraint]
    with contextlib.ExitStack() as stack:
        definition = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %s"
        (text,) = control.execute(definition, (other,)).fetchone()  # type: ignore[misc]
        control.execute(sql.SQL("ALTER TABLE item DROP CONSTRAINT {}").format(sql.Identifier(other)))
        restore = sql.SQL("ALTER TABLE item ADD CONSTRAINT {} ").format(sql.Identifier(other)) + sql.SQL(text)
        stack.callback(lambda: control.execute("TRUNCATE item") and control.execute(restore))
        processor = PostgresProcessor(tables, "INSERT INTO item (n, late) VALUES (%s, %s) RETURNING n")
        batch = [(n, n) for n in range(100)]
        batch[70] = (70, 3)

        results = processor.process(a_batch(batch))
        processor.close()

        error = results[70]
        assert isinstance(error, (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation))
        assert error.diag.constraint_name == constraint
        assert stored(control) == [n for n in range(100) if n != 70]


@pytest.mark.parametrize("distance", [1, CHUNK, 3 * CHUNK], ids=["neighbours", "next chunk", "far"])
def test_P3_the_earlier_of_two_that_exclude_each_other_wins(
    processor: PostgresProcessor, control: psycopg.Connection[Any], distance: int
) -> None:
    """Also when the earlier one's chunk fails because of another, so that it is tried after the later one."""
    batch = jobs(*range(4 * CHUNK))
    batch[0] = job(None)
    batch[1] = job(5000, label="earlier")
    batch[1 + distance] = job(5000, label="later")

    results = processor.process(a_batch(batch))

    assert results[1]["n"] == 5000
    assert isinstance(results[1 + distance], psycopg.errors.UniqueViolation)
    assert control.execute("SELECT label FROM item WHERE n = 5000").fetchall() == [("earlier",)]


def test_P3_a_job_that_always_meets_a_passing_error_meets_it_alone_in_the_end(
    tables: str, control: psycopg.Connection[Any]
) -> None:
    for label in ("conflict", "memory"):
        control.execute("TRUNCATE item")
        with MicroBatcher(PostgresProcessor(tables, INSERT), delivery_timeout=2.5) as batcher:
            *good, bad = batcher.submit_many([*jobs(*range(50)), job(50, label=label)])

            assert [future.result(5)["n"] for future in good] == list(range(50))
            error = bad.exception(5)
        assert error is not None
        assert getattr(error.__cause__, "sqlstate", None) in ("40001", "53200", None)
        assert stored(control) == list(range(50))


@pytest.mark.parametrize("whose", ["session", "database"])
def test_P3_a_job_that_meets_a_timeout_fails_alone(tables: str, control: psycopg.Connection[Any], whose: str) -> None:
    """It is tried again with the others, and then alone."""
    name = sql.Identifier(control.info.dbname)
    with contextlib.ExitStack() as stack:
        if whose == "database":
            control.execute(sql.SQL("ALTER DATABASE {} SET statement_timeout = 500").format(name))
            stack.callback(control.execute, sql.SQL("ALTER DATABASE {} RESET statement_timeout").format(name))
        conninfo = make_conninfo(tables, options="-c statement_timeout=500" if whose == "session" else "")
        with MicroBatcher(PostgresProcessor(conninfo, INSERT)) as batcher:
            *good, slow = batcher.submit_many([*jobs(*range(50)), job(50, label="slow")])

            assert [future.result(15)["n"] for future in good] == list(range(50))
            assert getattr(slow.exception(15), "sqlstate", None) == "57014"
    assert stored(control) == list(range(50))


def test_P3_a_job_whose_row_is_locked_fails_alone(tables: str, control: psycopg.Connection[Any]) -> None:
    control.execute("INSERT INTO item (n) SELECT generate_series(0, 49)")
    conninfo = make_conninfo(tables, options="-c lock_timeout=100")
    statement = "UPDATE item SET label = 'seen' WHERE n = %(n)s RETURNING n"
    with psycopg.connect(tables) as locker:
        locker.execute("SELECT FROM item WHERE n = 7 FOR UPDATE")
        with MicroBatcher(PostgresProcessor(conninfo, statement)) as batcher:
            futures = batcher.submit_many(jobs(*range(50)))
            errors = {n: future.exception(15) for n, future in enumerate(futures)}

    assert {n: getattr(error, "sqlstate", None) for n, error in errors.items() if error} == {7: "55P03"}
    assert control.execute("SELECT count(*) FROM item WHERE label = 'seen'").fetchone() == (49,)


@pytest.mark.parametrize("client_encoding", ["latin1", "utf8"])
def test_P3_a_character_that_the_database_cannot_hold(dsn: str, client_encoding: str) -> None:
    name = sql.Identifier(f"latin_{os.urandom(4).hex()}")
    create = sql.SQL("CREATE DATABASE {} ENCODING latin1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").format(name)
    with psycopg.connect(dsn, autocommit=True) as control:
        control.execute(create)
        try:
            conninfo = make_conninfo(dsn, dbname=name._obj[0], client_encoding=client_encoding)
            with psycopg.connect(conninfo) as connection:
                connection.execute('CREATE TABLE item ("ü" text)')
            processor = PostgresProcessor(conninfo, 'INSERT INTO item ("ü") VALUES (%s) RETURNING *')
            first, euro, last = processor.process(a_batch([("ä",), ("€",), ("ß",)]))
            processor.close()
        finally:
            control.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    assert (first, last) == ({"ü": "ä"}, {"ü": "ß"})
    if client_encoding == "utf8":
        assert getattr(euro, "sqlstate", None) == "22P05"
    else:
        assert isinstance(euro, UnicodeEncodeError)


# Against a model


EXAMPLES = int(os.environ.get("MICROBATCH_GUARD_TRIALS", "0")) * 20 or 25
KINDS = st.sampled_from(["good", "good", "good", "null", "check", "NUL", "text", "trigger", "twice", "kind"])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(KINDS, min_size=1, max_size=200), isolates=st.booleans())
def test_P2_P3_random_mixes(tables: str, control: psycopg.Connection[Any], kinds: list[str], isolates: bool) -> None:
    control.execute("TRUNCATE item")
    batch = [make(n) for n, make in enumerate(MAKERS[kind] for kind in kinds)]
    expected = model(kinds)
    processor = PostgresProcessor(tables, INSERT, on_job_error="isolate" if isolates else "fail_batch")

    results = processor.process(a_batch(batch))
    processor.close()

    failed = [n for n, result in enumerate(results) if isinstance(result, Exception)]
    if isolates or not any(expected.values()):
        assert {n: code_of(results[n]) for n in failed} == {n: code for n, code in expected.items() if code}
        assert all(results[n]["n"] == batch[n]["n"] for n in expected if not expected[n])
        assert stored(control) == sorted(batch[n]["n"] for n in expected if not expected[n])
    else:
        culprits = {n: code_of(results[n]) for n in failed if not isinstance(results[n], BatchRolledBack)}
        assert culprits.items() <= expected.items()
        assert culprits
        assert len(failed) == len(batch)
        assert stored(control) == []


MAKERS: dict[str, Callable[[int], Any]] = {
    "good": lambda n: job(n),
    "null": lambda n: job(None),
    "check": lambda n: job(n, label="x" * 20),
    "NUL": lambda n: job(n, label="\0"),
    "text": lambda n: job("abc"),
    "trigger": lambda n: job(n, label="refuse"),
    "twice": lambda n: job(5000),
    "kind": lambda n: n,
}
CODES = {
    "null": "23502",
    "check": "23514",
    "NUL": "DataError",
    "text": "22P02",
    "trigger": "MB001",
    "kind": "TypeError",
}


def model(kinds: list[str]) -> dict[int, str | None]:
    """What becomes of each job: the code of its error, or None."""
    expected = {n: CODES.get(kind) for n, kind in enumerate(kinds)}
    twice = [n for n, kind in enumerate(kinds) if kind == "twice"]
    return expected | dict.fromkeys(twice[1:], "23505")


def code_of(error: Exception) -> str:
    return getattr(error, "sqlstate", None) or type(error).__name__


# Batch as a whole, order, and other people's connections


def test_P3_fail_batch_keeps_a_batch_whole(tables: str, control: psycopg.Connection[Any]) -> None:
    processor = PostgresProcessor(tables, INSERT, on_job_error="fail_batch")
    batch = jobs(*range(100))
    batch[60] = job(60, label="x" * 20)

    results = processor.process(a_batch(batch))
    processor.close()

    assert results[60].diag.constraint_name == "not_too_long"
    assert {type(result) for n, result in enumerate(results) if n != 60} == {BatchRolledBack}
    assert results[0].job is batch[60]
    assert stored(control) == []


@pytest.mark.parametrize("way", ["statement", "insert_into"])
def test_sort_key_keeps_upserts_of_several_processes_from_deadlocking(database: str, way: str) -> None:
    """And without it they do, again and again; either way each job counts once."""
    with psycopg.connect(database, autocommit=True) as control:
        control.execute("CREATE TABLE item (n int PRIMARY KEY, hits int NOT NULL DEFAULT 1)")
        control.execute(PAUSES)
        name = sql.Identifier(control.info.dbname)
        control.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '20ms'").format(name))
        assert upserted(control, database, "sorted", way) == [0, 0, 0]
        assert sum(upserted(control, database, "unsorted", way)) > 0
        assert control.execute("SELECT count(*), min(hits), max(hits) FROM item").fetchone() == (50, 60, 60)


# A batch holds the locks of its first rows while others take theirs, however short their slices of the processor are.
PAUSES = """
    CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END';
    CREATE TRIGGER pause BEFORE INSERT ON item FOR EACH ROW WHEN (NEW.n % 10 = 0) EXECUTE FUNCTION pause()
"""


def upserted(control: psycopg.Connection[Any], database: str, order: str, way: str) -> list[int]:
    """How many batches of each of three processes met a deadlock."""
    command = [sys.executable, str(UPSERTS), database]
    control.execute("SELECT pg_advisory_lock(1)")
    processes = [
        subprocess.Popen([*command, str(lane), order, way], stdout=subprocess.PIPE, text=True) for lane in range(3)
    ]
    try:
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while control.execute(waiting).fetchone() != (3,):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        control.execute("SELECT pg_advisory_unlock(1)")
        return [int(process.communicate(timeout=90)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_sort_key_leaves_every_job_its_own_row(tables: str, control: psycopg.Connection[Any]) -> None:
    processor = PostgresProcessor(tables, INSERT, sort_key=lambda job: -job["n"])
    batch: list[Any] = [*jobs(3, 1, 2), {"label": "no key"}, 5, job("text"), *jobs(4)]

    results = processor.process(a_batch(batch))
    processor.close()

    assert [results[i]["n"] for i in (0, 1, 2, 6)] == [3, 1, 2, 4]
    assert [type(results[i]) for i in (3, 4, 5)] == [
        psycopg.ProgrammingError,
        TypeError,
        psycopg.errors.InvalidTextRepresentation,
    ]
    assert [n for (n,) in control.execute("SELECT n FROM item ORDER BY id").fetchall()] == [4, 3, 2, 1]


@pytest.mark.parametrize("kind", ["callable", "autocommit", "pool"])
def test_P3_on_connections_of_others(tables: str, control: psycopg.Connection[Any], kind: str) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "pool":
            source: Any = stack.enter_context(psycopg_pool.ConnectionPool(tables, min_size=1, max_size=2, open=True))
        else:
            connection = stack.enter_context(psycopg.connect(tables, autocommit=kind == "autocommit"))
            source = lambda: contextlib.nullcontext(connection)  # noqa: E731
        processor = PostgresProcessor(source, INSERT)
        for start in (0, 100):
            batch = jobs(*range(start, start + 100))
            batch[50] = job(None)

            results = processor.process(a_batch(batch))

            assert isinstance(results.pop(50), psycopg.errors.NotNullViolation)
            assert [row["n"] for row in results] == [n for n in range(start, start + 100) if n != start + 50]
    assert stored(control) == [n for n in range(200) if n % 100 != 50]


@pytest.mark.parametrize("outer", ["commit", "rollback"])
def test_P3_inside_the_transaction_of_somebody_else(tables: str, control: psycopg.Connection[Any], outer: str) -> None:
    with psycopg.connect(tables) as connection:
        connection.execute("INSERT INTO item (n) VALUES (-1)")
        processor = PostgresProcessor(lambda: contextlib.nullcontext(connection), INSERT)
        batch = jobs(*range(100))
        batch[50] = job(None)
        batch[70] = job(-1)

        results = processor.process(a_batch(batch))

        assert isinstance(results[50], psycopg.errors.NotNullViolation)
        assert isinstance(results[70], psycopg.errors.UniqueViolation)
        assert connection.info.transaction_status == TransactionStatus.INTRANS
        getattr(connection, outer)()
    good = [n for n in range(-1, 100) if n not in (50, 70)]
    assert stored(control) == (good if outer == "commit" else [])


def test_P5_a_lock_is_not_waited_for_beyond_the_deadline(tables: str, control: psycopg.Connection[Any]) -> None:
    control.execute("INSERT INTO item (n) VALUES (7)")
    with psycopg.connect(tables) as locker:
        locker.execute("LOCK TABLE item")
        with MicroBatcher(PostgresProcessor(tables, INSERT), delivery_timeout=1.5) as batcher:
            began = time.monotonic()
            error = batcher.submit(job(8)).exception(10)
            took = time.monotonic() - began
    assert error is not None
    assert took < 2.5
    assert stored(control) == [7]
