"""`insert_into` against single INSERTs: the same rows, the same errors, on tables that could tell the difference.

Each shape is written once by single INSERTs and once by a batcher, and both times the same questions are asked: with no
fault, with a lost batch, with a lost answer, and with a bad job among the good ones.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from proxy import Harm, Message, Once, Proxy, is_commit, is_committed
from psycopg import sql
from psycopg.conninfo import make_conninfo
from test_postgres_keys import behind_answer, is_insert

from microbatch import MicroBatcher
from microbatch.processors.postgres import BatchRolledBack, PostgresProcessor
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

ENDS = psycopg.errors.SequenceGeneratorLimitExceeded
NUMBER = itertools.count(1)
LOGS = (
    "CREATE TABLE log (n int, number bigint);"
    "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {}; RETURN NULL; END$$;"
    "CREATE TRIGGER a AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION f()"
)
IN_LOG = "SELECT n, number = (SELECT id FROM item WHERE item.n = log.n) FROM log ORDER BY n"
SERIAL = "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL)"
ROWS = "SELECT n FROM item ORDER BY n"
PARTS = "CREATE TABLE p{0} PARTITION OF item FOR VALUES {1};"
HASH = PARTS.format(0, "WITH (MODULUS 2, REMAINDER 0)") + PARTS.format(1, "WITH (MODULUS 2, REMAINDER 1)")


@dataclass(frozen=True)
class Shape:
    """A table `item` that jobs `(n,)` go into; the *question* has the same answer however they are written."""

    definition: str
    way: str
    question: str = ROWS
    since: int = 0
    bad: Any = None  # refused by the table
    prepare: str = ""  # once more before the jobs


SHAPES = {
    # A row that knows its number.
    "a default reads currval": Shape(
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, code text DEFAULT 'C' || currval('item_id_seq'))",
        "merge",
        "SELECT n, code = 'C' || id FROM item ORDER BY n",
    ),
    "a default reads lastval in a function": Shape(
        "CREATE FUNCTION last() RETURNS bigint LANGUAGE sql AS 'SELECT lastval()';"
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, code bigint DEFAULT last())",
        "merge",
        "SELECT n, code = id FROM item ORDER BY n",
    ),
    "a function behind a function reads lastval": Shape(
        "CREATE FUNCTION last() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT lastval(); END;"
        "CREATE FUNCTION code() RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RETURN last(); END';"
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, code bigint DEFAULT code())",
        "merge",
        "SELECT n, code = id FROM item ORDER BY n",
    ),
    "a check reads currval": Shape(
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, CHECK (id = currval('item_id_seq')))", "merge"
    ),
    "a generated column reads lastval": Shape(
        "CREATE FUNCTION last(int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT lastval()';"
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, c bigint GENERATED ALWAYS AS (last(n)) STORED)",
        "merge",
        "SELECT n, c = id FROM item ORDER BY n",
    ),
    "a domain reads lastval": Shape(
        "CREATE DOMAIN own AS bigint DEFAULT lastval() CHECK (VALUE = lastval());"
        "CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL, c own)",
        "merge",
        "SELECT n, c = id FROM item ORDER BY n",
    ),
    "a trigger reads currval": Shape(
        f"{SERIAL};" + LOGS.format("INSERT INTO log VALUES (NEW.n, currval('item_id_seq'))"), "statement", IN_LOG
    ),
    "a trigger reads LastVal": Shape(
        f"{SERIAL};" + LOGS.format("INSERT INTO log VALUES (NEW.n, LastVal())"), "statement", IN_LOG
    ),
    "a trigger reads the sequence": Shape(
        f"{SERIAL};" + LOGS.format("INSERT INTO log SELECT NEW.n, last_value FROM item_id_seq"), "statement", IN_LOG
    ),
    "a trigger calls what reads lastval": Shape(
        f"CREATE FUNCTION last() RETURNS bigint LANGUAGE sql AS 'SELECT lastval()'; {SERIAL};"
        + LOGS.format("INSERT INTO log VALUES (NEW.n, last())"),
        "statement",
        IN_LOG,
    ),
    "a trigger writes where a default reads currval": Shape(
        f"{SERIAL};"
        + LOGS.format("INSERT INTO log (n) VALUES (NEW.n)")
        + "; ALTER TABLE log ALTER number SET DEFAULT currval('item_id_seq')",
        "statement",
        IN_LOG,
    ),
    "a trigger reads a view on lastval": Shape(
        f"CREATE VIEW last AS SELECT lastval() AS number; {SERIAL};"
        + LOGS.format("INSERT INTO log SELECT NEW.n, number FROM last"),
        "statement",
        IN_LOG,
    ),
    "a trigger of a partition reads currval": Shape(
        f"CREATE TABLE item (id serial PRIMARY KEY, n int NOT NULL) PARTITION BY HASH (id); {HASH}"
        + LOGS.format("INSERT INTO log VALUES (NEW.n, currval('item_id_seq'))").replace("ON item", "ON p0")
        + "; CREATE TRIGGER a AFTER INSERT ON p1 FOR EACH ROW EXECUTE FUNCTION f()",
        "statement",
        IN_LOG,
    ),
    "a trigger that asks nothing": Shape(
        f"{SERIAL};" + LOGS.format("INSERT INTO log VALUES (NEW.n, NEW.id)"), "keys", IN_LOG
    ),
    # A row that does not stay where it is found.
    "a trigger takes its row away": Shape(
        f"{SERIAL};" + LOGS.format("DELETE FROM item WHERE id = NEW.id; INSERT INTO log VALUES (NEW.n)"),
        "merge",
        "SELECT (SELECT count(*) FROM item), n FROM log ORDER BY n",
    ),
    "a trigger gives its row another key": Shape(
        f"{SERIAL};" + LOGS.format("UPDATE item SET n = NEW.n, id = -NEW.id WHERE id = NEW.id"),
        "merge",
        "SELECT n, id < 0 FROM item ORDER BY n",
    ),
    "a trigger changes its row": Shape(
        f"{SERIAL}; ALTER TABLE item ADD note text;" + LOGS.format("UPDATE item SET note = 'seen' WHERE id = NEW.id"),
        "keys",
        "SELECT n, note FROM item ORDER BY n",
    ),
    "a trigger takes other rows away": Shape(
        f"{SERIAL};" + LOGS.format("DELETE FROM log WHERE n = NEW.n - 2; INSERT INTO log VALUES (NEW.n)"),
        "keys",
        "SELECT n FROM log ORDER BY n",
    ),
    # A key that is not just the next number.
    "uuidv7": Shape(
        "CREATE TABLE item (id uuid PRIMARY KEY DEFAULT uuidv7(), n int NOT NULL, at timestamptz"
        " DEFAULT clock_timestamp())",
        "merge",
        "SELECT n, at - uuid_extract_timestamp(id) BETWEEN interval '-1s' AND interval '1s' FROM item ORDER BY n",
        since=180000,
    ),
    "a date and a number": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id text PRIMARY KEY DEFAULT to_char(clock_timestamp(), 'YYYYMMDD-')"
        " || nextval('s'), n int NOT NULL)",
        "merge",
        "SELECT n, id LIKE to_char(clock_timestamp(), 'YYYYMMDD-%') FROM item ORDER BY n",
    ),
    "an epoch and a number": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id bigint PRIMARY KEY DEFAULT"
        " (extract(epoch FROM clock_timestamp())::bigint << 20) | nextval('s'), n int NOT NULL)",
        "merge",
    ),
    "numeric": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id numeric(10, 2) PRIMARY KEY DEFAULT nextval('s'), n int NOT NULL)",
        "merge",
    ),
    "padded text": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id varchar(8) PRIMARY KEY DEFAULT rpad(nextval('s')::text, 8),"
        " n int NOT NULL)",
        "merge",
    ),
    "an epoch without a cast": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id bigint PRIMARY KEY DEFAULT"
        " extract(epoch FROM now()) * 1000000 + nextval('s'), n int NOT NULL)",
        "merge",
    ),
    "a number times one": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id int PRIMARY KEY DEFAULT nextval('s') * 1.0, n int NOT NULL)", "merge"
    ),
    "every other number": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id bigint PRIMARY KEY DEFAULT nextval('s') * 2, n int NOT NULL)",
        "merge",
        "SELECT n, id % 2 FROM item ORDER BY n",
    ),
    "a sequence by its name": Shape(
        "CREATE SEQUENCE s; CREATE TABLE item (id bigint PRIMARY KEY DEFAULT nextval('s'::text), n int NOT NULL)",
        "merge",
    ),
    "another nextval": Shape(
        "CREATE SEQUENCE s; CREATE FUNCTION nextval(regclass) RETURNS bigint LANGUAGE sql AS"
        " 'SELECT 1000 + pg_catalog.nextval($1)'; SELECT set_config('search_path', current_schema || ', pg_catalog',"
        " false); CREATE TABLE item (id bigint PRIMARY KEY DEFAULT nextval('s'::regclass), n int NOT NULL)",
        "merge",
        "SELECT n, id > 1000 FROM item ORDER BY n",
    ),
    "a domain over a number": Shape(
        "CREATE DOMAIN number AS bigint CHECK (VALUE > 0); CREATE SEQUENCE s;"
        "CREATE TABLE item (id number PRIMARY KEY DEFAULT nextval('s'), n int NOT NULL)",
        "merge",
    ),
    "a key that is generated from the drawn one": Shape(
        "CREATE TABLE item (id serial, half int GENERATED ALWAYS AS (id / 2) STORED, n int NOT NULL,"
        " PRIMARY KEY (id, half))",
        "merge",
    ),
    # A key that ON CONFLICT does not take, or not alone.
    "columns beside the key": Shape(
        "CREATE TABLE item (id serial, n int NOT NULL, label text, PRIMARY KEY (id) INCLUDE (n, label))", "keys"
    ),
    "an UPDATE rule": Shape(f"{SERIAL}; CREATE RULE r AS ON UPDATE TO item DO INSTEAD NOTHING", "statement"),
    "a rule that is off": Shape(
        f"{SERIAL}; CREATE RULE r AS ON UPDATE TO item DO INSTEAD NOTHING; ALTER TABLE item DISABLE RULE r", "statement"
    ),
    "a temporal key": Shape(
        "CREATE EXTENSION IF NOT EXISTS btree_gist SCHEMA public;"
        "CREATE TABLE item (id serial, valid int4range DEFAULT '[1,5)', n int NOT NULL,"
        " PRIMARY KEY (id, valid WITHOUT OVERLAPS))",
        "merge",
        since=180000,
    ),
    "a second constraint, deferrable": Shape(f"{SERIAL}; ALTER TABLE item ADD UNIQUE (id) DEFERRABLE", "merge"),
    "a second constraint in another order, deferrable": Shape(
        "CREATE TABLE item (id serial, n int NOT NULL, PRIMARY KEY (id, n), UNIQUE (n, id) DEFERRABLE)", "merge"
    ),
    "a deferrable constraint on more than the key": Shape(
        f"{SERIAL}; ALTER TABLE item ADD UNIQUE (id, n) DEFERRABLE", "keys"
    ),
    # Keys that are drawn.
    "identity always": Shape(
        "CREATE TABLE item (n int NOT NULL, id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)", "keys"
    ),
    "a sequence of another schema": Shape(
        'CREATE SCHEMA IF NOT EXISTS "Other One"; DROP SEQUENCE IF EXISTS "Other One"."S \'s";'
        'CREATE SEQUENCE "Other One"."S \'s"; CREATE TABLE item (id int PRIMARY KEY DEFAULT'
        " nextval('\"Other One\".\"S ''s\"'), n int NOT NULL)",
        "keys",
    ),
    "a sequence that was renamed": Shape(f"{SERIAL}; ALTER SEQUENCE item_id_seq RENAME TO other", "keys"),
    "a sequence that nobody owns": Shape(f"{SERIAL}; ALTER SEQUENCE item_id_seq OWNED BY NONE", "keys"),
    "list partitions": Shape(
        "CREATE TABLE item (id serial, n int NOT NULL, PRIMARY KEY (id, n)) PARTITION BY LIST (n);"
        + PARTS.format(0, "IN (1, 2)")
        + "CREATE TABLE p1 PARTITION OF item DEFAULT",
        "keys",
    ),
    "partitions of partitions": Shape(
        "CREATE TABLE item (id bigserial PRIMARY KEY, n int NOT NULL) PARTITION BY RANGE (id);"
        "CREATE TABLE p PARTITION OF item FOR VALUES FROM (MINVALUE) TO (MAXVALUE) PARTITION BY HASH (id);"
        + HASH.replace("OF item", "OF p"),
        "keys",
    ),
    "one partition": Shape(
        "CREATE TABLE root (id bigserial PRIMARY KEY, n int NOT NULL) PARTITION BY HASH (id);"
        "CREATE TABLE item PARTITION OF root FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        "keys",
    ),
    "a child of a table": Shape(
        "CREATE TABLE base (id bigserial, n int NOT NULL); CREATE TABLE item (PRIMARY KEY (id)) INHERITS (base)", "keys"
    ),
    "the drawn part last": Shape(
        "CREATE TABLE item (n int, id serial, PRIMARY KEY (n, id))", "keys", bad="not a number"
    ),
    "two drawn parts": Shape(
        "CREATE TABLE item (id serial, other uuid DEFAULT gen_random_uuid(), n int NOT NULL, PRIMARY KEY (id, other))",
        "keys",
    ),
    "a part that is cut": Shape(
        "CREATE TABLE item (n varchar(3), id serial, PRIMARY KEY (n, id))",
        "keys",
        bad="10th",
        prepare="INSERT INTO item SELECT '10t', g FROM generate_series(1, 300) g ON CONFLICT DO NOTHING",
    ),
    "a part that is padded": Shape(
        "CREATE TABLE item (n char(4), id serial, PRIMARY KEY (n, id))", "keys", bad="10 th"
    ),
    "a part that is rounded": Shape(
        "CREATE TABLE item (n numeric(6, 1), id serial, PRIMARY KEY (n, id))", "keys", bad="ten"
    ),
    "a part of a domain": Shape(
        "CREATE DOMAIN tenant AS int CHECK (VALUE > 0); CREATE TABLE item (n tenant, id serial, PRIMARY KEY (id, n))",
        "keys",
        bad=-1,
    ),
    "a part of a domain over text": Shape(
        "CREATE DOMAIN tenant AS varchar(2); CREATE TABLE item (n tenant, id serial, PRIMARY KEY (id, n))",
        "keys",
        bad="long",
    ),
    "a part whose operators are out of sight": Shape(
        "CREATE SCHEMA IF NOT EXISTS away; CREATE EXTENSION IF NOT EXISTS ltree SCHEMA away;"
        "CREATE TABLE item (n away.ltree, id serial, PRIMARY KEY (id, n))",
        "merge",
    ),
    "a part in citext": Shape(
        "CREATE EXTENSION IF NOT EXISTS citext SCHEMA public;"
        "CREATE TABLE item (n public.citext, id serial, PRIMARY KEY (id, n), CHECK (n <> 'TEN'))",
        "keys",
        bad="ten",
    ),
}


# Without and with drawn keys.
LOST: dict[str, tuple[Callable[[], Callable[[Message], bool]], Callable[[], Callable[[Message], bool]]]] = {
    "batch lost": (lambda: is_commit, lambda: is_insert),
    "answer lost": (lambda: is_committed, behind_answer),
}


def prepared(conninfo: str, definition: str) -> str:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(definition.encode())
    return conninfo


@pytest.fixture(scope="module")
def place(shared_database: str) -> Iterator[Callable[[], str]]:
    """Connection strings, each with an empty schema of its own."""
    with psycopg.connect(shared_database, autocommit=True) as connection:

        def new() -> str:
            # A reader anywhere in the database would change every other way.
            for (old,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'shape%'").fetchall():
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(old)))
            name = f"shape{next(NUMBER)}"
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
            return make_conninfo(shared_database, options=f"-csearch_path={name},public")

        yield new


def single(conninfo: str, jobs: list[Any]) -> list[str]:
    """What becomes of each job as an INSERT of its own."""
    outcomes = []
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for job in jobs:
            try:
                connection.execute("INSERT INTO item (n) VALUES (%s)", (None if job is None else str(job),))
            except psycopg.Error as error:
                outcomes.append(f"failed {error.sqlstate}")
            else:
                outcomes.append("written")
    return outcomes


def batched(conninfo: str, jobs: list[Any], fault: str, way: str) -> list[str]:
    with Proxy(conninfo) as proxy:
        processor = PostgresProcessor.insert_into(proxy.conninfo, "item", ["n"])
        with MicroBatcher(processor, delivery_timeout=20) as batcher:
            batcher.execute((jobs[0],))
            assert processor.plan is not None
            assert processor.plan.strategy == way, processor.plan
            if fault in LOST:
                proxy.plan = plan = Once(LOST[fault][way == "keys"](), Harm.CUT)
            futures = batcher.submit_many([(job,) for job in jobs[1:]])
            wait(futures, 30)
            assert fault not in LOST or plan.fired.is_set()
    errors = [future.exception(0) for future in futures]
    for future, job in zip(futures, jobs[1:], strict=True):
        if future.exception(0) is None:
            assert str(future.result()["n"]).strip().removesuffix(".0") == str(job)
    return ["written"] + [outcome(error) for error in errors]


def outcome(error: BaseException | None) -> str:
    if error is None:
        return "written"
    return f"failed {error.sqlstate}" if isinstance(error, psycopg.Error) else repr(error)


def asked(conninfo: str, question: str) -> list[Any]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(question.encode()).fetchall()


@pytest.mark.parametrize("fault", ["no fault", "isolation", *LOST])
@pytest.mark.parametrize("name", SHAPES)
def test_P2_P4_what_a_batch_writes_is_what_single_inserts_write(
    place: Callable[[], str], name: str, fault: str
) -> None:
    shape = SHAPES[name]
    jobs: list[Any] = [*range(1, 6), *([shape.bad] if fault == "isolation" else []), *range(6, 10)]
    seen = []
    for write in (single, batched):
        conninfo = place()
        with psycopg.connect(conninfo, autocommit=True) as connection:
            if connection.info.server_version < shape.since:
                pytest.skip("this PostgreSQL cannot have it")
            connection.execute(shape.definition.encode())
            connection.execute(shape.prepare.encode())
            way = "statement" if shape.way == "merge" and connection.info.server_version < 170000 else shape.way
        outcomes = single(conninfo, jobs) if write is single else batched(conninfo, jobs, fault, way)
        seen.append((outcomes, asked(conninfo, shape.question)))

    assert seen[0] == seen[1]


# Sequences that end.


@pytest.mark.parametrize("on_job_error", ["isolate", "fail_batch"])
@pytest.mark.parametrize(
    "begin", ["MAXVALUE 6", "START 95 MAXVALUE 100", "MINVALUE -6 MAXVALUE -1 INCREMENT -1 CACHE 4"]
)
def test_P3_a_sequence_that_ends_gives_what_it_still_has(
    place: Callable[[], str], begin: str, on_job_error: Any
) -> None:
    conninfo = prepared(
        place(),
        f"CREATE SEQUENCE s {begin}; CREATE TABLE item (id int PRIMARY KEY DEFAULT nextval('s'), n int NOT NULL)",
    )
    processor = PostgresProcessor.insert_into(conninfo, "item", ["n"], strategy="keys", on_job_error=on_job_error)

    results = processor.process(Batch([(n,) for n in range(10)], id="b1"))

    processor.close()
    if on_job_error == "fail_batch":
        assert [type(result) for result in results] == [BatchRolledBack] * 6 + [ENDS] + [BatchRolledBack] * 3
        assert asked(conninfo, ROWS) == []
    else:
        assert [row["n"] for row in results[:6]] == list(range(6))
        assert [type(result) for result in results[6:]] == [ENDS] * 4
        assert asked(conninfo, ROWS) == [(n,) for n in range(6)]


def test_P3_a_sequence_that_was_set_just_before_its_end_gives_what_it_still_has(place: Callable[[], str]) -> None:
    conninfo = prepared(
        place(),
        "CREATE SEQUENCE s MAXVALUE 100000; SELECT setval('s', 99998, false);"
        "CREATE TABLE item (id int PRIMARY KEY DEFAULT nextval('s'), n int NOT NULL)",
    )
    processor = PostgresProcessor.insert_into(conninfo, "item", ["n"], strategy="keys")

    assert [row["id"] for row in processor.process(Batch([(1,), (2,)], id="b1"))] == [99998, 99999]
    first, second = processor.process(Batch([(3,), (4,)], id="b2"))

    processor.close()
    assert first["id"] == 100000
    assert type(second) is ENDS


# Ways that cannot be had.


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (SHAPES["uuidv7"].definition.replace("uuidv7()", "md5(now()::text)::uuid"), "key column id is no integer"),
        (SHAPES["a trigger reads currval"].definition, "as function f does"),
        (SHAPES["an UPDATE rule"].definition, "it has rules"),
        (SHAPES["a second constraint, deferrable"].definition, "another constraint on the same columns"),
        (SHAPES["a part whose operators are out of sight"].definition, "operator does not exist"),
        (
            f"{SERIAL}; CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.id = 7; RETURN NEW; END$$;"
            "CREATE TRIGGER a BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION f();"
            "ALTER TABLE item ENABLE REPLICA TRIGGER a",
            "a BEFORE ROW INSERT trigger",
        ),
        (
            f"{SERIAL}; CREATE LANGUAGE hidden HANDLER plpgsql_call_handler;"
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE hidden AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER a AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION f()",
            "trigger function f, which may ask for the number of its row, cannot be read",
        ),
        (
            "CREATE LANGUAGE hidden HANDLER plpgsql_call_handler; CREATE FUNCTION f() RETURNS int LANGUAGE hidden AS"
            " 'BEGIN RETURN 1; END'; CREATE TABLE item (id serial PRIMARY KEY, n int, m int DEFAULT f())",
            "function f, which may ask for the number of its row, cannot be read",
        ),
        (
            "CREATE TABLE item (id serial, n int) PARTITION BY LIST (n); CREATE FOREIGN DATA WRAPPER nothing;"
            "CREATE SERVER away FOREIGN DATA WRAPPER nothing;"
            "CREATE FOREIGN TABLE p PARTITION OF item DEFAULT SERVER away",
            "one of its partitions is a foreign table",
        ),
    ],
)
def test_drawn_keys_that_cannot_be_had_are_refused_with_the_reason(database: str, definition: str, reason: str) -> None:
    processor = PostgresProcessor.insert_into(prepared(database, definition), "item", ["n"], strategy="keys")
    with pytest.raises(ValueError, match=f"strategy='keys' cannot be had for table item: .*{reason}"):
        processor.open()
    processor.close()


def test_an_event_trigger_that_asks_for_numbers_is_reason_enough(database: str) -> None:
    prepared(
        database,
        f"{SERIAL}; CREATE FUNCTION e() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM lastval(); EXCEPTION WHEN OTHERS THEN NULL; END$$;"
        "CREATE EVENT TRIGGER watch ON ddl_command_end EXECUTE FUNCTION e()",
    )
    processor = PostgresProcessor.insert_into(database, "item", ["n"])
    processor.open()
    processor.close()
    assert processor.plan is not None
    assert processor.plan.strategy != "keys"


def test_inside_a_users_transaction_a_table_is_looked_at_without_harm(database: str) -> None:
    """The server refuses drawn keys for it, and its error would end the transaction."""
    prepared(database, SHAPES["a part whose operators are out of sight"].definition)
    with psycopg.connect(database) as connection:
        connection.execute("SELECT 1")
        processor = PostgresProcessor.insert_into(lambda: contextlib.nullcontext(connection), "item", ["n"])
        assert [row["n"] for row in processor.process(Batch([("a",), ("b",)], id="b1"))] == ["a", "b"]
        connection.commit()
    assert asked(database, "SELECT count(*) FROM item") == [(2,)]
