"""P4 where a batch writes to a foreign table, whose server commits first and on its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from proxy import Harm, Once, Proxy, is_committed
from psycopg.conninfo import conninfo_to_dict

from microbatch import MicroBatcher
from microbatch.processors.postgres import CommitUnknown, PostgresProcessor
from microbatch.processors.postgres.guard import DDL

pytestmark = [pytest.mark.database, pytest.mark.timeout(60)]

# The other server is this one again. It takes its time for a commit of rows above 1000.
FAR = """
    CREATE EXTENSION IF NOT EXISTS postgres_fdw;
    CREATE TABLE far (n int);
    CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN IF NEW.n > 1000 THEN PERFORM pg_sleep(1); END IF; RETURN NULL; END$$;
    CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON far DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dawdle();
    ALTER TABLE far ADD CONSTRAINT once UNIQUE (n) DEFERRABLE INITIALLY DEFERRED;
    CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{host}', port '{port}', dbname '{dbname}');
    CREATE USER MAPPING FOR CURRENT_USER SERVER elsewhere OPTIONS (user '{user}', password '{password}');
    CREATE FOREIGN TABLE abroad (n int) SERVER elsewhere OPTIONS (table_name 'far');
    CREATE TABLE home (n int);
"""
SHAPES = {
    "the table itself": "CREATE FOREIGN TABLE item (n int) SERVER elsewhere OPTIONS (table_name 'far')",
    "a view": "CREATE VIEW item AS SELECT n FROM abroad",
    "a partition": """CREATE TABLE item (n int) PARTITION BY RANGE (n);
        CREATE FOREIGN TABLE part PARTITION OF item FOR VALUES FROM (0) TO (9999)
        SERVER elsewhere OPTIONS (table_name 'far')""",
    "a rule": """CREATE TABLE item (n int);
        CREATE RULE also AS ON INSERT TO item DO INSTEAD INSERT INTO abroad VALUES (NEW.n)""",
    "a trigger": """CREATE TABLE item (id bigserial PRIMARY KEY, n int);
        CREATE FUNCTION also() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN INSERT INTO abroad VALUES (NEW.n); RETURN NULL; END$$;
        CREATE TRIGGER also AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION also()""",
}


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    given = {"password": "", **conninfo_to_dict(shared_database)}
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(FAR.format(**given))
        connection.execute(DDL)
    yield shared_database
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute("DROP EXTENSION postgres_fdw CASCADE")
    empty(shared_database)


def bulk(conninfo: str, **options: Any) -> PostgresProcessor:
    return PostgresProcessor.insert_into(conninfo, "item", ["n"], returning=None, **options)


def statement(conninfo: str, **options: Any) -> PostgresProcessor:
    return PostgresProcessor(conninfo, "INSERT INTO item (n) VALUES (%s)", **options)


def ask(conninfo: str, query: str) -> Any:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(query).fetchall()


def end_in_commit(conninfo: str) -> None:
    """End the server process of the batch once its COMMIT is on its way elsewhere."""
    mine = "FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active' AND application_name = 'microbatch'"
    end = time.monotonic() + 20
    while not ask(conninfo, f"SELECT pg_terminate_backend(pid) {mine} AND query_start < now() - interval '0.3 s'"):
        assert time.monotonic() < end, "there is no COMMIT"
        time.sleep(0.02)


def settled(conninfo: str) -> int:
    """How many rows are there when nothing is open any more."""
    end = time.monotonic() + 20
    while ask(conninfo, "SELECT 1 FROM pg_stat_activity WHERE backend_xid IS NOT NULL") and time.monotonic() < end:
        time.sleep(0.02)
    return int(ask(conninfo, "SELECT count(*) FROM far")[0][0])


@pytest.mark.parametrize("guard", ["ledger", "xid"])
@pytest.mark.parametrize("make", [bulk, statement])
@pytest.mark.parametrize("shape", SHAPES)
def test_P4_a_commit_that_was_carried_out_elsewhere_alone_is_unknown_and_not_repeated(
    database: str, shape: str, make: Callable[..., PostgresProcessor], guard: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SHAPES[shape])
    with MicroBatcher(make(database, commit_guard=guard)) as batcher:
        futures = batcher.submit_many([(2001,), (2002,)])
        end_in_commit(database)
        errors = [future.exception(30) for future in futures]

    assert settled(database) == 2
    assert all(isinstance(error, CommitUnknown) and "foreign table" in str(error) for error in errors), errors
    assert [error.lookup for error in errors] == [None] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("guard", ["ledger", "xid"])
def test_P4_foreign_tables_that_a_batch_does_not_write_to_change_nothing(database: str, guard: str) -> None:
    with Proxy(database) as proxy:
        processor = PostgresProcessor(proxy.conninfo, "INSERT INTO home (n) VALUES (%s)", commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor) as batcher:
            for number in range(3):
                proxy.plan = Once(is_committed, Harm.CUT)
                assert [future.exception(30) for future in batcher.submit_many([(number,), (number,)])] == [None] * 2
            proxy.plan = Once(lambda message: message.to_server and message.query == "COMMIT", Harm.CUT)
            assert batcher.submit((3,)).exception(30) is None
    assert ask(database, "SELECT n FROM home ORDER BY n") == [(0,), (0,), (1,), (1,), (2,), (2,), (3,)]


def test_P4_a_commit_that_was_carried_out_here_is_completed(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SHAPES["the table itself"])
    with Proxy(database, Once(is_committed, Harm.CUT)) as proxy, MicroBatcher(bulk(proxy.conninfo)) as batcher:
        assert batcher.submit((1,)).exception(30) is None
    assert settled(database) == 1


def test_P3_what_the_other_server_refuses_at_commit_has_left_nothing(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SHAPES["the table itself"])
    with MicroBatcher(bulk(database)) as batcher:
        assert batcher.submit((1,)).exception(30) is None
        assert isinstance(batcher.submit((1,)).exception(30), psycopg.errors.UniqueViolation)
    assert settled(database) == 1


def test_P4_a_server_that_is_made_while_the_batcher_runs_is_thought_of(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE item (n int); CREATE SCHEMA later; DROP EXTENSION postgres_fdw CASCADE")
    with MicroBatcher(statement(database)) as batcher:
        batcher.execute((1,))
        given = {"password": "", **conninfo_to_dict(database)}
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("DROP TABLE item, far, home; DROP FUNCTION dawdle")
            connection.execute(FAR.format(**given))
            connection.execute(SHAPES["the table itself"])
        future = batcher.submit((2001,))
        thread = threading.Thread(target=end_in_commit, args=[database])
        thread.start()
        error = future.exception(30)
        thread.join()
    assert isinstance(error, CommitUnknown)
    assert settled(database) == 1
