"""Tables that are altered, exchanged and made anew under a running processor: the next batch is right."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from microbatch.errors import OutcomeUnknown
from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.processors.postgres.session import Session
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

WAYS = ("keys", "merge", "statement", "user's own")
AT = "2026-01-01 23:30:00+05"
TABLE_NAMES = (f"t{number}" for number in itertools.count())
BATCH_NAMES = (f"b{number}" for number in itertools.count())


class Shop:
    """One table, a session that alters it, and processors that write it."""

    def __init__(self, conninfo: str, control: psycopg.Connection[Any], stack: contextlib.ExitStack) -> None:
        self.conninfo = conninfo
        self.control = control
        self.stack = stack
        self.table = next(TABLE_NAMES)

    def run(self, *commands: str) -> None:
        for command in commands:
            self.control.execute(command.replace("ITEM", self.table).encode())

    def rows(self, what: str = "v::text", where: str = "true") -> list[Any]:
        query = f"SELECT {what} FROM ITEM WHERE {where} ORDER BY id".replace("ITEM", self.table)
        return [row[0] for row in self.control.execute(query.encode())]

    def processor(self, way: str, returning: Any = "*", conninfo: Any = None, **options: Any) -> PostgresProcessor:
        conninfo = conninfo or self.conninfo
        if way == "merge" and self.control.info.server_version < 170000:
            pytest.skip("MERGE … RETURNING needs PostgreSQL 17")
        if way == "user's own":
            back = "" if returning is None else f" RETURNING {', '.join(returning)}"
            processor = PostgresProcessor(conninfo, f"INSERT INTO {self.table} (v) VALUES (%s){back}", **options)
        else:
            options |= {"strategy": way, "returning": returning}
            processor = PostgresProcessor.insert_into(conninfo, self.table, ["v"], **options)
        self.stack.callback(processor.close)
        return processor

    @contextlib.contextmanager
    def lent(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            yield connection


@pytest.fixture
def shop(shared_database: str) -> Iterator[Shop]:
    conninfo = make_conninfo(shared_database, options="-c TimeZone=UTC")
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(psycopg.connect(conninfo, autocommit=True))
        shop = Shop(conninfo, control, stack)
        yield shop
        stack.close()
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(f"DROP TABLE IF EXISTS {shop.table} CASCADE".encode())


def a_batch(values: list[Any], **options: Any) -> Batch[Any]:
    return Batch([(value,) for value in values], id=next(BATCH_NAMES), deadline=time.monotonic() + 20, **options)


def write(processor: PostgresProcessor, *values: Any) -> list[Any]:
    results = processor.process(a_batch(list(values)))
    assert [result for result in results if isinstance(result, Exception)] == []
    return results


# Name: the type before, a value that it takes, the change, the value of the next jobs.
CHANGES: dict[str, tuple[str, Any, tuple[str, ...], Any]] = {
    "timestamp to timestamptz": ("timestamp", "2025-01-01", ("ALTER TABLE ITEM ALTER v TYPE timestamptz",), AT),
    "date to timestamptz": ("date", "2025-01-01", ("ALTER TABLE ITEM ALTER v TYPE timestamptz",), AT),
    "real to double": ("real", "1", ("ALTER TABLE ITEM ALTER v TYPE double precision",), "0.1"),
    "int to bigint": ("int", "1", ("ALTER TABLE ITEM ALTER v TYPE bigint",), "3000000000"),
    "int to numeric": ("int", "1", ("ALTER TABLE ITEM ALTER v TYPE numeric",), "1.5"),
    "numeric gets a scale": ("numeric", "1", ("ALTER TABLE ITEM ALTER v TYPE numeric(10, 2)",), "1.005"),
    "a wider varchar": ("varchar(3)", "abc", ("ALTER TABLE ITEM ALTER v TYPE varchar(9)",), "abcdef"),
    "text to an array": ("text", "{1,2}", ("ALTER TABLE ITEM ALTER v TYPE int[] USING v::int[]",), "{3, 4}"),
    "text to jsonb": ("text", "{}", ("ALTER TABLE ITEM ALTER v TYPE jsonb USING v::jsonb",), '{"a":  1}'),
    "made anew": ("int", "1", ("DROP TABLE ITEM", "CREATE TABLE ITEM (id bigserial PRIMARY KEY, v text)"), "x"),
    "swapped": (
        "timestamp",
        "2025-01-01",
        (
            "CREATE TABLE ITEM_new (id bigserial PRIMARY KEY, v timestamptz)",
            "ALTER TABLE ITEM RENAME TO ITEM_old",
            "ALTER TABLE ITEM_new RENAME TO ITEM",
        ),
        AT,
    ),
    "columns swapped": (
        "timestamp",
        "2025-01-01",
        ("ALTER TABLE ITEM ADD w timestamptz", "ALTER TABLE ITEM RENAME v TO u", "ALTER TABLE ITEM RENAME w TO v"),
        AT,
    ),
    "enum to text, dropped": (
        "ITEM_mood",
        "ok",
        ("ALTER TABLE ITEM ALTER v TYPE text", "DROP TYPE ITEM_mood"),
        "new",
    ),
    "domain exchanged": (
        "ITEM_code",
        "abc",
        (
            "ALTER DOMAIN ITEM_code RENAME TO ITEM_code_old",
            "CREATE DOMAIN ITEM_code AS varchar(9)",
            "ALTER TABLE ITEM ALTER v TYPE ITEM_code",
            "DROP DOMAIN ITEM_code_old",
        ),
        "abcdef",
    ),
    "its domain's name is another's": (
        "ITEM_long",
        "abc",
        ("ALTER DOMAIN ITEM_long RENAME TO ITEM_long_old", "CREATE DOMAIN ITEM_long AS varchar(3)"),
        "abcdef",
    ),
    "a column more": ("int", "1", ("ALTER TABLE ITEM ADD w int DEFAULT 7",), "2"),
    "a column less": ("int", "1", ("ALTER TABLE ITEM ADD w int", "ALTER TABLE ITEM DROP w"), "2"),
}


def prepare(shop: Shop, type_: str) -> None:
    if type_ == "ITEM_mood":
        shop.run("CREATE TYPE ITEM_mood AS ENUM ('ok')")
    if type_ == "ITEM_code":
        shop.run("CREATE DOMAIN ITEM_code AS varchar(3)")
    if type_ == "ITEM_long":
        shop.run("CREATE DOMAIN ITEM_long AS varchar(9)")
    shop.run(f"CREATE TABLE ITEM (id bigserial PRIMARY KEY, v {type_})")


def as_a_literal(shop: Shop, value: str) -> str:
    """What a plain INSERT of today makes of the value."""
    shop.control.execute(
        sql.SQL("INSERT INTO {} (v) VALUES ({})").format(sql.Identifier(shop.table), sql.Literal(value))
    )
    return str(shop.rows()[-1])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("returning", ["*", ["id"], None], ids=["all", "id", "nothing"])
def test_P4_no_value_is_read_as_the_type_that_its_column_had_yesterday(
    shop: Shop, way: str, change: str, returning: Any
) -> None:
    type_, before, commands, value = CHANGES[change]
    prepare(shop, type_)
    batches = ([value], [value] * 3, [value])
    processors = [shop.processor(way, returning) for _ in batches]
    for processor in processors:
        write(processor, before)
        write(processor, before, before)

    shop.run(*commands)
    expected, count = as_a_literal(shop, value), len(shop.rows("id"))

    # Each is the first one after the change to somebody.
    for processor, batch in zip(processors, batches, strict=True):
        results = write(processor, *batch)
        if returning is not None:
            ids = [row["id"] for row in results]
            assert shop.rows(where=f"id IN ({', '.join(map(str, ids))})") == [expected] * len(batch)
        write(processor, value)
    assert shop.rows()[count:] == [expected] * 8


@pytest.mark.parametrize("change", ["timestamp to timestamptz", "int to bigint", "enum to text, dropped", "swapped"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3])
def test_P4_nor_on_a_connection_that_is_lent(shop: Shop, way: str, change: str, size: int) -> None:
    type_, before, commands, value = CHANGES[change]
    prepare(shop, type_)
    with shop.lent() as connection:
        processor = shop.processor(way, ["id"], lambda: contextlib.nullcontext(connection))
        write(processor, before)
        write(processor, before, before)
        shop.run(*commands)
        expected, count = as_a_literal(shop, value), len(shop.rows("id"))
        write(processor, *[value] * size)
        assert shop.rows()[count:] == [expected] * size


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3])
def test_P4_nor_in_a_transaction_that_alters_the_table_itself(shop: Shop, way: str, size: int) -> None:
    """Twice in one transaction: both changes have the same id."""
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v date)")
    with shop.lent() as connection:
        processor = shop.processor(way, ["id"], lambda: contextlib.nullcontext(connection))
        write(processor, AT)
        with connection.transaction(force_rollback=True):
            for type_ in ("timestamp", "timestamptz", "date"):
                connection.execute(f"ALTER TABLE {shop.table} ALTER v TYPE {type_}".encode())
                write(processor, *[AT] * size)
                found = connection.execute(f"SELECT v, '{AT}'::{type_} FROM {shop.table} ORDER BY id DESC".encode())
                assert [a == b for a, b in found.fetchmany(size)] == [True] * size


def test_P4_nor_with_one_that_takes_json_since_then(shop: Shop) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)")
    with shop.lent() as connection:
        processor = shop.processor("statement", ["id"], lambda: contextlib.nullcontext(connection))
        write(processor, 1)
        with connection.transaction():
            connection.execute(f"ALTER TABLE {shop.table} ALTER v TYPE text".encode())
            write(processor, "[2]")
            connection.execute(f"ALTER TABLE {shop.table} ALTER v TYPE jsonb USING v::jsonb".encode())
            write(processor, [3], {"a": 4})
    assert shop.rows() == ["1", "[2]", "[3]", '{"a": 4}']


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3])
def test_P4_a_change_that_a_batch_waits_for_is_seen_by_it(shop: Shop, way: str, size: int) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v timestamp)")
    processor = shop.processor(way, ["id"])
    write(processor, "2025-01-01")
    write(processor, *["2025-01-01"] * size)
    results: list[Any] = []
    with shop.lent() as other:
        with other.transaction():
            other.execute(f"ALTER TABLE {shop.table} ALTER v TYPE timestamptz".encode())
            thread = threading.Thread(target=lambda: results.extend(write(processor, *[AT] * size)))
            thread.start()
            wait_for_a_waiter(shop, other.info.backend_pid)
        thread.join(20)
    assert not thread.is_alive()
    assert [row["id"] for row in results] == shop.rows("id", f"v = '{AT}'::timestamptz")
    assert len(results) == size


def wait_for_a_waiter(shop: Shop, blocker: int) -> None:
    deadline = time.monotonic() + 10
    question = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
    while shop.control.execute(question, [blocker]).fetchone() == (0,):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("way", WAYS)
def test_P3_a_bad_job_after_a_change_fails_alone_and_by_the_types_of_today(shop: Shop, way: str) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int CHECK (v > 0))")
    processor = shop.processor(way, ["id"])
    write(processor, 1, 2)
    shop.run("ALTER TABLE ITEM ALTER v TYPE bigint")
    results = processor.process(a_batch(["3000000000", "-1", "4000000000", "x", "5"]))
    assert [type(result) for result in results] == [
        dict,
        psycopg.errors.CheckViolation,
        dict,
        psycopg.errors.InvalidTextRepresentation,
        dict,
    ]
    assert "bigint" in str(results[3])
    assert shop.rows("v") == [1, 2, 3_000_000_000, 4_000_000_000, 5]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3])
def test_P3_fail_batch_blames_nobody_for_a_change(shop: Shop, way: str, size: int) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)")
    processor = shop.processor(way, on_job_error="fail_batch")
    write(processor, 1)
    write(processor, *range(size))
    for change in ("ADD w int", "DROP w", "ALTER v TYPE bigint", "ADD w text", "RENAME w TO x"):
        shop.run(f"ALTER TABLE ITEM {change}")
        write(processor, *[3_000_000_000 if "bigint" in change else 2] * size)
    # And one that deserves it keeps its error.
    assert [error.sqlstate for error in processor.process(a_batch(["x"]))] == ["22P02"]


FORGET = """
    CREATE SEQUENCE ITEM_times;
    CREATE FUNCTION ITEM_f() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN IF NEW.v > 100 AND nextval('ITEM_times') = 1 THEN EXECUTE 'DEALLOCATE ALL'; END IF; RETURN NULL; END$$;
    CREATE TRIGGER a AFTER INSERT ON ITEM WHEN_IT_DOES FOR EACH ROW EXECUTE FUNCTION ITEM_f()"""
AT_ONCE = FORGET.replace("WHEN_IT_DOES", "")
AT_THE_END = FORGET.replace("CREATE TRIGGER", "CREATE CONSTRAINT TRIGGER").replace(
    "WHEN_IT_DOES", "DEFERRABLE INITIALLY DEFERRED"
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3, 70])
@pytest.mark.parametrize("on_job_error", ["isolate", "fail_batch"])
def test_P4_statements_that_vanish_are_prepared_anew(shop: Shop, way: str, size: int, on_job_error: Any) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)")
    processor = shop.processor(way, on_job_error=on_job_error)
    write(processor, 1)
    write(processor, *range(size))
    for forget in ("DEALLOCATE ALL", "DISCARD ALL"):
        with processor._connections.visit() as session:
            assert session is not None
            session.connection.execute(forget.encode())
        assert [row["v"] for row in write(processor, *range(size))] == list(range(size))
    shop.run("TRUNCATE ITEM")
    shop.run(AT_ONCE)  # in the middle of the batch, ahead of its COMMIT
    values = list(range(100, 100 + size + 1))
    results = in_the_end(processor, a_batch(values))
    assert [row["v"] for row in results] == values == shop.rows("v")


@pytest.mark.parametrize("way", ["merge", "statement", "user's own"])
def test_P4_a_commit_that_vanishes_is_not_unknown(shop: Shop, way: str) -> None:
    """What is deferred comes last of all before it."""
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)", AT_THE_END)
    processor = shop.processor(way)
    write(processor, 1, 2)
    results = in_the_end(processor, a_batch([101, 102]))
    assert [row["v"] for row in results] == [101, 102] == shop.rows("v", "v > 100")


@pytest.mark.parametrize("way", WAYS)
def test_P3_statements_that_vanish_leave_isolation_as_it_is(shop: Shop, way: str) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int CHECK (v <> 105))")
    processor = shop.processor(way)
    write(processor, 1, 2)
    processor.process(a_batch([3, 105]))
    shop.run(AT_ONCE)
    values = list(range(101, 180))
    results = in_the_end(processor, a_batch(values))
    assert [row["v"] for row in results if not isinstance(row, Exception)] == [v for v in values if v != 105]
    assert isinstance(results[4], psycopg.errors.CheckViolation)
    assert sorted(shop.rows("v", "v > 100")) == [v for v in values if v != 105]


def in_the_end(processor: PostgresProcessor, batch: Batch[Any]) -> list[Any]:
    """It may be tried again, but nothing is unknown."""
    for _ in range(5):
        try:
            return processor.process(batch)
        except psycopg.Error as error:
            if not processor.is_retryable(error):
                raise
    raise AssertionError("it is never written")


SEQUENCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "another one": (
        "serial",
        (
            "CREATE SEQUENCE ITEM_s START 100000",
            "ALTER TABLE ITEM ALTER id SET DEFAULT nextval('ITEM_s')",
            "DROP SEQUENCE ITEM_id_seq",
        ),
    ),
    "another one, the old one stays": (
        "serial",
        ("CREATE SEQUENCE ITEM_s START 100000", "ALTER TABLE ITEM ALTER id SET DEFAULT nextval('ITEM_s')"),
    ),
    "identity made anew": (
        "int GENERATED ALWAYS AS IDENTITY",
        (
            "ALTER TABLE ITEM ALTER id DROP IDENTITY",
            "ALTER TABLE ITEM ALTER id ADD GENERATED ALWAYS AS IDENTITY (START 100000)",
        ),
    ),
    "renamed": ("serial", ("ALTER SEQUENCE ITEM_id_seq RENAME TO ITEM_other",)),
    "table made anew": ("serial", ("DROP TABLE ITEM", "CREATE TABLE ITEM (id serial PRIMARY KEY, v int)")),
    "table with identity made anew": (
        "int GENERATED ALWAYS AS IDENTITY",
        ("DROP TABLE ITEM", "CREATE TABLE ITEM (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)"),
    ),
    "a random uuid": (
        "serial",
        (
            "ALTER TABLE ITEM ALTER id DROP DEFAULT",
            "ALTER TABLE ITEM ALTER id TYPE uuid USING gen_random_uuid(), ALTER id SET DEFAULT gen_random_uuid()",
            "DROP SEQUENCE ITEM_id_seq",
        ),
    ),
}


@pytest.mark.parametrize("change", SEQUENCES)
@pytest.mark.parametrize("size", [1, 3, 50])
def test_P4_keys_are_drawn_from_where_the_table_has_them_from_today(shop: Shop, change: str, size: int) -> None:
    type_, commands = SEQUENCES[change]
    shop.run(f"CREATE TABLE ITEM (id {type_} PRIMARY KEY, v int)")
    processor = shop.processor("keys")
    write(processor, 0)
    write(processor, *range(size))
    shop.run(*commands)
    rounds = 40 if size == 1 else 2  # more than a block
    ids = [row["id"] for _ in range(rounds) for row in write(processor, *range(size))]
    assert len(set(ids)) == rounds * size
    if "100000" in " ".join(commands):
        assert min(ids) >= 100_000
    shop.run("INSERT INTO ITEM (v) SELECT 0 FROM generate_series(1, 100)")  # meets none of them


NOTICED = {
    "a trigger that changes the key": (
        "CREATE FUNCTION ITEM_f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.id = -NEW.v; RETURN NEW; END$$;"
        "CREATE TRIGGER a BEFORE INSERT ON ITEM FOR EACH ROW EXECUTE FUNCTION ITEM_f()",
        "id = -v",
    ),
    "one that had been disabled": ("ALTER TABLE ITEM ENABLE TRIGGER off", "id = -v - 1000"),
    "another default": ("ALTER TABLE ITEM ALTER id SET DEFAULT -nextval('ITEM_id_seq')", "id < 0"),
}


@pytest.mark.parametrize("change", NOTICED)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("lent", [False, True])
def test_P2_what_raises_no_error_is_noticed_by_the_next_batch(shop: Shop, change: str, size: int, lent: bool) -> None:
    command, holds = NOTICED[change]
    shop.run(
        "CREATE TABLE ITEM (id serial PRIMARY KEY, v int)",
        "CREATE FUNCTION ITEM_g() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.id = -NEW.v - 1000; RETURN NEW; END$$;"
        "CREATE TRIGGER off BEFORE INSERT ON ITEM FOR EACH ROW EXECUTE FUNCTION ITEM_g();"
        "ALTER TABLE ITEM DISABLE TRIGGER off",
    )
    with shop.lent() as connection:
        processor = shop.processor("auto", conninfo=(lambda: contextlib.nullcontext(connection)) if lent else None)
        write(processor, *range(1, size + 1))
        if processor.plan is None or processor.plan.strategy != "keys":
            pytest.skip("this table is not written by keys")
        shop.run(command)
        values = list(range(100, 100 + size))
        rows = write(processor, *values)
        assert [row["v"] for row in rows] == values
        assert [row["id"] for row in rows] == [shop.rows("id", f"v = {value}")[0] for value in values], (
            "each job has its own row"
        )
        assert shop.rows(f"({holds})::text", "v >= 100") == ["true"] * size


@pytest.mark.parametrize("size", [1, 3])
def test_P2_row_security_that_is_switched_on_is_noticed_by_the_next_batch(shop: Shop, size: int) -> None:
    role = f"role_{uuid.uuid4().hex}"
    shop.run(
        "CREATE TABLE ITEM (id serial PRIMARY KEY, v int)",
        f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT, INSERT ON ITEM TO {role};"
        f"GRANT USAGE ON SEQUENCE ITEM_id_seq TO {role}",
    )
    try:
        processor = shop.processor("auto", conninfo=make_conninfo(shop.conninfo, user=role, password="x"))
        write(processor, *range(size))
        shop.run("ALTER TABLE ITEM ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON ITEM USING (true) WITH CHECK (v > 0)")
        write(processor, *range(1, size + 1))
        assert processor.plan is not None
        assert processor.plan.strategy == "statement"
        assert processor.process(a_batch([-1]))[0].sqlstate == "42501"
        processor.close()
    finally:
        shop.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE ITEM ALTER v TYPE timestamptz USING v AT TIME ZONE 'UTC'",
        "ALTER TABLE ITEM ADD w int",
        "CREATE TRIGGER a BEFORE INSERT ON ITEM FOR EACH ROW EXECUTE FUNCTION nothing()",
    ],
)
def test_P4_a_lost_answer_and_a_change_before_the_retry(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, change: str, size: int, committed: bool
) -> None:
    shop.run(
        "CREATE OR REPLACE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NEW; END$$",
        "CREATE TABLE ITEM (id bigserial PRIMARY KEY, v timestamp)",
    )
    processor = shop.processor("auto")
    write(processor, "2025-01-01")
    # The link that the retry will find has everything prepared for the table as it was.
    links = processor._connections
    with links.visit() as kept:
        assert kept is not None
        write(processor, "2025-01-01", "2025-01-01")
        # What is there is compared as it is now; what is not, is read as it is now.
        batch = a_batch(["2026-01-01 23:30:00" if committed else AT] * size)
        with losing_the_answer(monkeypatch, committed), pytest.raises(OutcomeUnknown):
            processor.process(batch)
    shop.run(change)
    rows = processor.process(Batch(list(batch), id=batch.id, attempt=2, deadline=time.monotonic() + 20))
    was = dt.datetime(2026, 1, 1, 23, 30)
    is_new = "timestamptz" in change
    today = dt.datetime(2026, 1, 1, 18, 30, tzinfo=dt.timezone.utc) if is_new else was
    expected = (was.replace(tzinfo=dt.timezone.utc) if is_new else was) if committed else today
    assert [row["v"] for row in rows] == [expected] * size
    assert len(shop.rows("id", "v > '2025-06-01'")) == size


@contextlib.contextmanager
def losing_the_answer(monkeypatch: pytest.MonkeyPatch, committed: bool) -> Iterator[None]:
    """The link is cut behind the flight of a batch that inserts, or before it has left."""
    from microbatch.processors.postgres import keyed

    fly, moment = keyed.KeyedAttempt._fly, "land" if committed else "sync"
    act: Callable[[Any], Any] = getattr(keyed.Flight, moment)

    def lose(flight: Any) -> Any:
        if committed:
            act(flight)
        flight._connection.close()
        raise psycopg.OperationalError("the link is lost")

    def fly_and_lose(self: Any, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(keyed.Flight, moment, lose)
            return fly(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(keyed.KeyedAttempt, "_fly", fly_and_lose)
        yield


def test_P4_a_database_that_was_read_only_for_a_while_is_written_again(database: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    with psycopg.connect(database, autocommit=True, options="-c default_transaction_read_only=off") as control:
        control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v int)")
        control.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
        processor = PostgresProcessor.insert_into(database, "item", ["v"])
        with contextlib.closing(processor):
            for size in (1, 3):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
                    processor.process(a_batch([1] * size))
                assert processor.is_retryable(caught.value)
            control.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
            assert [row["v"] for row in write(processor, 1, 2)] == [1, 2]


def test_P4_the_slow_path_prepares_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """psycopg's own prepared statements keep the types of their parameters, too."""
    monkeypatch.setattr(writer, "is_supported", lambda connection: False)
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v timestamp)")
    processor = shop.processor("user's own", ["id"])
    for _ in range(8):
        write(processor, "2025-01-01")
    shop.run("ALTER TABLE ITEM ALTER v TYPE timestamptz")
    write(processor, AT)
    write(processor, AT, AT)
    assert len(shop.rows("id", f"v = '{AT}'::timestamptz")) == 3
    with shop.lent() as connection:
        write(shop.processor("user's own", ["id"], lambda: contextlib.nullcontext(connection)), AT)
        assert connection.prepare_threshold == 5


def test_P4_a_table_that_changes_all_the_time_is_no_jobs_fault(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)")
    processor = shop.processor("keys")
    write(processor, 1)
    look, numbers = writer.look_up, itertools.count()

    def change_behind(session: Session, *args: Any) -> Any:
        found = look(session, *args)
        shop.run(f"ALTER TABLE ITEM ADD w{next(numbers)} int")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(writer, "look_up", change_behind)
        shop.run("ALTER TABLE ITEM ADD w int")
        with pytest.raises(psycopg.Error) as caught:
            processor.process(a_batch([2, 3]))
    assert processor.is_retryable(caught.value)
    assert shop.rows("v") == [1]
    assert [row["v"] for row in write(processor, 2, 3)] == [2, 3]


def test_a_table_that_is_gone_is_an_error_and_comes_back(shop: Shop) -> None:
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v int)")
    processors = [shop.processor(way) for way in ("keys", "statement", "user's own")]
    for processor in processors:
        write(processor, 1)
    shop.run("DROP TABLE ITEM")
    for processor in processors[:2]:
        with pytest.raises(ValueError, match=f"there is no table {shop.table}"):
            processor.process(a_batch([1]))
    assert [error.sqlstate for error in processors[2].process(a_batch([1]))] == ["42P01"]
    shop.run("CREATE TABLE ITEM (id bigserial PRIMARY KEY, v text)")
    for processor in processors:
        assert [row["v"] for row in write(processor, "x", "y")] == ["x", "y"]
