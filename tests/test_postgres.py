"""`PostgresProcessor` against a real server: results, bad jobs, connections, a lost COMMIT."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
import pytest
from databases import empty
from proxy import Harm, Once, Proxy, behind_commit, is_commit, is_committed, mentions
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

from microbatch.errors import MissingExtra, OutcomeUnknown, ProcessorContractError
from microbatch.processors.postgres import BatchRolledBack, CommitUnknown, PostgresProcessor, flight, writer
from microbatch.processors.postgres.conninfo import connection_parameters
from microbatch.processors.postgres.errors import Undecided
from microbatch.processors.postgres.guard import DDL
from microbatch.processors.postgres.sqlstate import is_refusal, is_retryable
from microbatch.protocols import Batch, BatchProcessor

INSERT = "INSERT INTO item (n, label) VALUES (%(n)s, %(label)s) RETURNING *"
INSERT_BY_POSITION = "INSERT INTO item (n, label) VALUES (%s, %s) RETURNING *"
SLEEP = "SELECT pg_sleep(%(seconds)s)"

Make = Callable[..., PostgresProcessor]


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    yield shared_database
    empty(shared_database)


@pytest.fixture
def control(database: str) -> Iterator[psycopg.Connection[Any]]:
    """Another session in the same database, to look on and to interfere."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE item (id integer GENERATED ALWAYS AS IDENTITY, n integer UNIQUE NOT NULL, label text)"
        )
        yield connection


@pytest.fixture
def make(database: str, control: psycopg.Connection[Any]) -> Iterator[Make]:
    """Builds processors on `database` and closes them."""
    with contextlib.ExitStack() as stack:

        def build(statement: Any = INSERT, conninfo: Any = database, **options: Any) -> PostgresProcessor:
            processor = PostgresProcessor(conninfo, statement, **options)
            stack.callback(processor.close)
            return processor

        yield build


def a_batch(jobs: list[Any], id: str = "b1", attempt: int = 1, deadline: float | None = None) -> Batch[Any]:
    return Batch(jobs, id=id, attempt=attempt, deadline=deadline)


def items(*numbers: int) -> list[dict[str, Any]]:
    return [{"n": number, "label": f"item {number}"} for number in numbers]


def stored(control: psycopg.Connection[Any]) -> list[int]:
    return [n for (n,) in control.execute("SELECT n FROM item ORDER BY n").fetchall()]


def sessions(control: psycopg.Connection[Any]) -> list[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'microbatch'"
    return [pid for (pid,) in control.execute(query).fetchall()]


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def is_running(control: psycopg.Connection[Any], query: str) -> bool:
    found = control.execute(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state = 'active' AND query LIKE %s",
        (query,),
    )
    return found.fetchone() is not None


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("microbatch.")]


@contextlib.contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Runs *work* beside the block; afterwards the outcome says what it returned or raised."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(20)
        assert not thread.is_alive()


# Jobs and results


@dataclass
class Item:
    n: int
    label: str


class ItemTuple(NamedTuple):
    n: int
    label: str


@pytest.mark.database
@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        (INSERT, lambda n, label: {"n": n, "label": label}),
        (INSERT, Item),
        (INSERT_BY_POSITION, lambda n, label: (n, label)),
        (INSERT_BY_POSITION, lambda n, label: [n, label]),
        (INSERT, ItemTuple),
    ],
    ids=["dict", "dataclass", "tuple", "list", "named tuple"],
)
def test_a_job_may_be_a_mapping_a_dataclass_or_a_sequence(make: Make, statement: str, kind: Any) -> None:
    results = make(statement).process(a_batch([kind(7, "seven"), kind(8, "eight")]))

    assert results == [{"id": 1, "n": 7, "label": "seven"}, {"id": 2, "n": 8, "label": "eight"}]


@pytest.mark.database
def test_a_field_of_a_dataclass_reaches_psycopg_as_it_is(make: Make) -> None:
    @dataclass
    class Event:
        payload: Jsonb

    results = make("SELECT %(payload)s AS payload").process(a_batch([Event(Jsonb({"a": [1]}))]))

    assert results == [{"payload": {"a": [1]}}]


@pytest.mark.database
@pytest.mark.parametrize("job", ["text", b"bytes", bytearray(b"x"), 5, None, {1, 2}, Item, object()])
def test_another_kind_of_job_is_refused_by_name_and_alone(
    make: Make, control: psycopg.Connection[Any], job: Any
) -> None:
    good, refused = make().process(a_batch([*items(1), job]))

    assert good["n"] == 1
    assert isinstance(refused, TypeError)
    assert f"not {type(job).__qualname__}; submit a single value as a tuple" in str(refused)
    assert stored(control) == [1]


@pytest.fixture(params=["flights", "portable"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past psycopg's cursor, and as with a psycopg whose inside is unknown."""
    if request.param == "portable":
        monkeypatch.setattr(writer, "is_supported", lambda connection: False)


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_every_job_gets_its_own_row(make: Make) -> None:
    numbers = list(range(500))
    random.Random(7).shuffle(numbers)

    results = make().process(a_batch(items(*numbers)))

    assert [(number, f"item {number}") for number in numbers] == [(row["n"], row["label"]) for row in results]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_a_job_whose_statement_returns_no_row_gets_none_in_its_place(make: Make) -> None:
    processor = make("INSERT INTO item (n) VALUES (%(n)s) ON CONFLICT DO NOTHING RETURNING n")
    processor.process(a_batch(items(2, 4)))

    results = processor.process(a_batch(items(1, 2, 3, 4, 5, 5)))

    assert results == [{"n": 1}, None, {"n": 3}, None, {"n": 5}, None]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_without_returning_every_result_is_none(make: Make, control: psycopg.Connection[Any]) -> None:
    results = make("INSERT INTO item (n) VALUES (%(n)s)").process(a_batch(items(1, 2, 3)))

    assert results == [None, None, None]
    assert stored(control) == [1, 2, 3]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_update_and_delete_answer_with_none_a_row_or_all_rows(make: Make) -> None:
    make().process(a_batch(items(1, 2, 3)))

    updated = make("UPDATE item SET label = 'x' WHERE n >= %(from)s AND n < %(to)s RETURNING n, label").process(
        a_batch([{"from": 1, "to": 2}, {"from": 7, "to": 9}, {"from": 2, "to": 4}])
    )
    deleted = make("DELETE FROM item WHERE n = %s RETURNING n").process(a_batch([(2,), (2,), (3,)]))

    one, none, several = updated
    assert (one, none) == ({"n": 1, "label": "x"}, None)
    assert sorted(several, key=lambda row: row["n"]) == [{"n": 2, "label": "x"}, {"n": 3, "label": "x"}]
    assert deleted == [{"n": 2}, None, {"n": 3}]


@pytest.mark.database
@pytest.mark.parametrize(
    "statement",
    [
        INSERT.encode(),
        sql.SQL(INSERT),
        sql.SQL("INSERT INTO {} (n) VALUES ({}) RETURNING n").format(sql.Identifier("item"), sql.Placeholder("n")),
    ],
    ids=["bytes", "SQL", "Composed"],
)
def test_a_statement_may_be_bytes_or_composed(make: Make, statement: Any) -> None:
    assert [row["n"] for row in make(statement).process(a_batch(items(6)))] == [6]


@pytest.mark.database
def test_an_empty_batch_needs_no_connection(make: Make, control: psycopg.Connection[Any]) -> None:
    assert make().process(a_batch([])) == []
    assert sessions(control) == []


@pytest.mark.database
def test_it_is_a_batch_processor(make: Make) -> None:
    assert isinstance(make(), BatchProcessor)


# Bad jobs


BAD_JOBS = {
    "not null": ({"n": None, "label": ""}, psycopg.errors.NotNullViolation, "23502"),
    "unique": ({"n": 1, "label": ""}, psycopg.errors.UniqueViolation, "23505"),
    "text for a number": ({"n": "abc", "label": ""}, psycopg.errors.InvalidTextRepresentation, "22P02"),
    "out of range": ({"n": 2**40, "label": ""}, psycopg.errors.NumericValueOutOfRange, "22003"),
    "NUL": ({"n": 99, "label": "a\0b"}, psycopg.DataError, None),
    "lone surrogate": ({"n": 99, "label": "\ud800"}, UnicodeEncodeError, None),
    "missing key": ({"n": 99}, psycopg.ProgrammingError, None),
    "unadaptable": ({"n": 99, "label": object()}, psycopg.ProgrammingError, None),
    "sequence for a mapping": ((99, ""), TypeError, None),
}


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("bad", BAD_JOBS)
def test_P3_a_bad_job_fails_alone_and_leaves_the_connection_usable(
    make: Make, control: psycopg.Connection[Any], bad: str, place: int
) -> None:
    job, expected, sqlstate = BAD_JOBS[bad]
    if bad == "unique":
        control.execute("INSERT INTO item (n) VALUES (1)")
    jobs: list[Any] = items(11, 12, 13, 14)
    jobs.insert(place, job)
    processor = make()
    processor.open()
    before = sessions(control)

    results = processor.process(a_batch(jobs))

    error = results.pop(place)
    assert isinstance(error, expected)
    assert sqlstate == getattr(error, "sqlstate", None)
    assert not processor.is_retryable(error)
    assert [row["n"] for row in results] == [11, 12, 13, 14]
    assert [row["n"] for row in processor.process(a_batch(items(21, 22)))] == [21, 22]
    assert [n for n in stored(control) if n > 1] == [11, 12, 13, 14, 21, 22]
    assert before == sessions(control)


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("bad", BAD_JOBS)
def test_P3_fail_batch_names_the_culprit_and_writes_nothing(
    make: Make, control: psycopg.Connection[Any], bad: str
) -> None:
    job, expected, sqlstate = BAD_JOBS[bad]
    if bad == "unique":
        control.execute("INSERT INTO item (n) VALUES (1)")
    processor = make(on_job_error="fail_batch")
    before = stored(control)

    first, error, last = processor.process(a_batch([*items(11), job, *items(12)]))

    assert isinstance(error, expected)
    assert sqlstate == getattr(error, "sqlstate", None)
    assert isinstance(first, BatchRolledBack)
    assert isinstance(last, BatchRolledBack)
    assert first.job == job
    assert type(error).__name__ in str(first)
    assert not processor.is_retryable(first)
    assert stored(control) == before
    assert [row["n"] for row in processor.process(a_batch(items(21)))] == [21]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("job", [(1,), (1, "a", "b"), ()], ids=["short", "long", "empty"])
def test_P3_a_sequence_of_the_wrong_length_fails_alone(make: Make, control: psycopg.Connection[Any], job: Any) -> None:
    first, error, last = make(INSERT_BY_POSITION).process(a_batch([(5, "five"), job, (6, "six")]))

    assert isinstance(error, psycopg.ProgrammingError)
    assert (first["n"], last["n"]) == (5, 6)
    assert stored(control) == [5, 6]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_a_value_that_python_does_not_have_is_handed_out_as_text(make: Make, control: psycopg.Connection[Any]) -> None:
    processor = make(
        "INSERT INTO item (n) VALUES (%(n)s) RETURNING n, CASE WHEN n = 2 THEN 'infinity'::date END AS day"
    )

    rows = processor.process(a_batch(items(1, 2, 3)))

    assert rows == [{"n": 1, "day": None}, {"n": 2, "day": "infinity"}, {"n": 3, "day": None}]
    assert stored(control) == [1, 2, 3]


@pytest.mark.database
def test_several_commands_in_one_statement_are_refused(make: Make, control: psycopg.Connection[Any]) -> None:
    errors = make(f"{INSERT}; SELECT 1").process(a_batch(items(1, 2)))

    assert [type(error) for error in errors] == [psycopg.errors.SyntaxError] * 2
    assert stored(control) == []


@pytest.mark.database
def test_several_commands_are_refused_by_the_simple_protocol_too(
    database: str, make: Make, control: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client-side cursor on a libpq without pipelines would take them."""
    monkeypatch.setattr(psycopg.Pipeline, "is_supported", classmethod(lambda cls: False))
    with psycopg.connect(database, cursor_factory=psycopg.ClientCursor) as connection:
        errors = make(f"{INSERT}; SELECT 1", lambda: contextlib.nullcontext(connection)).process(a_batch(items(1, 2)))

    assert [str(error) for error in errors] == ["2 results for 1 jobs: the statement must be a single command"] * 2
    assert stored(control) == []


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
def test_P4_a_statement_that_ends_the_transaction_makes_the_batch_unknown(
    database: str, make: Make, statement: str
) -> None:
    for conninfo in (database, lambda: psycopg.connect(database)):
        processor = make(statement, conninfo)

        with pytest.raises(ProcessorContractError, match="take COMMIT or ROLLBACK out") as caught:
            processor.process(a_batch([()], id="b7"))

        assert caught.value.batch_id == "b7"


@pytest.mark.database
@pytest.mark.parametrize("statement", ["COPY item (n) FROM STDIN", "COPY item TO STDOUT"])
def test_copy_through_the_client_is_refused(make: Make, control: psycopg.Connection[Any], statement: str) -> None:
    processor = make(statement)

    with pytest.raises(psycopg.Error) as caught:
        processor.process(a_batch([()]))

    assert not processor.is_retryable(caught.value)
    assert stored(control) == []


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_P3_a_violation_deferred_to_commit_fails_its_job_alone(make: Make, control: psycopg.Connection[Any]) -> None:
    control.execute("ALTER TABLE item ADD CONSTRAINT late UNIQUE (label) DEFERRABLE INITIALLY DEFERRED")
    processor = make()
    processor.open()
    before = sessions(control)

    first, second, third = processor.process(a_batch([{"n": n, "label": label} for n, label in enumerate("aab")]))

    assert (first["n"], third["n"]) == (0, 2)
    assert isinstance(second, psycopg.errors.UniqueViolation)
    assert (second.sqlstate, second.diag.constraint_name) == ("23505", "late")
    assert stored(control) == [0, 2]
    assert before == sessions(control)


# Connections of its own


@pytest.mark.database
def test_one_connection_serves_batch_after_batch_and_open_makes_it(
    make: Make, control: psycopg.Connection[Any]
) -> None:
    processor = make("SELECT pg_backend_pid() AS pid")
    assert sessions(control) == []

    processor.open()
    processor.open()
    pids = {processor.process(a_batch([()]))[0]["pid"] for _ in range(3)}

    assert set(sessions(control)) == pids
    assert len(pids) == 1


@pytest.mark.database
def test_threads_get_a_connection_each_and_close_closes_them_all(make: Make, control: psycopg.Connection[Any]) -> None:
    processor = make("INSERT INTO item (n) SELECT %(n)s FROM pg_sleep(0.01) RETURNING n, pg_backend_pid() AS pid")
    together = threading.Barrier(4)
    outcomes: dict[int, list[Any]] = {}

    def work(lane: int) -> None:
        together.wait(10)
        for round_ in range(5):
            numbers = [1000 * lane + 10 * round_ + k for k in range(10)]
            results = processor.process(a_batch(items(*numbers), id=f"{lane}/{round_}"))
            outcomes.setdefault(lane, []).extend(results)
            assert numbers == [row["n"] for row in results]

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert [len(rows) for rows in outcomes.values()] == [50, 50, 50, 50]
    assert len(stored(control)) == 200
    assert {row["pid"] for rows in outcomes.values() for row in rows} == set(sessions(control))
    assert len(sessions(control)) <= 4
    processor.close()
    wait_until(lambda: not sessions(control))


@pytest.mark.database
def test_a_closed_processor_connects_anew(make: Make, control: psycopg.Connection[Any]) -> None:
    processor = make()
    processor.process(a_batch(items(1)))
    processor.close()
    processor.close()
    wait_until(lambda: not sessions(control))

    processor.process(a_batch(items(2)))

    assert stored(control) == [1, 2]


@pytest.mark.database
def test_a_connection_killed_between_batches_is_retryable_and_replaced(
    make: Make, control: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "microbatch")
    processor = make()
    processor.process(a_batch(items(1)))
    (pid,) = sessions(control)
    control.execute("SELECT pg_terminate_backend(%s)", (pid,))
    wait_until(lambda: not sessions(control))

    with pytest.raises(psycopg.OperationalError) as caught:
        processor.process(a_batch(items(2), id="b2"))

    assert processor.is_retryable(caught.value)
    assert logged(caplog) == ["microbatch: batch b2 lost its connection (link lost); the next one connects"]
    assert processor.process(a_batch(items(2)))[0]["n"] == 2
    assert stored(control) == [1, 2]


@pytest.mark.database
def test_a_connection_killed_inside_a_batch_leaves_no_trace(make: Make, control: psycopg.Connection[Any]) -> None:
    control.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END$$"
    )
    control.execute("CREATE TRIGGER die AFTER INSERT ON item FOR EACH ROW WHEN (NEW.n = 13) EXECUTE FUNCTION die()")
    processor = make()

    with pytest.raises(psycopg.OperationalError) as caught:
        processor.process(a_batch(items(11, 12, 13, 14)))

    assert not isinstance(caught.value, OutcomeUnknown)
    assert processor.is_retryable(caught.value)
    assert stored(control) == []
    assert [row["n"] for row in processor.process(a_batch(items(11)))] == [11]


@pytest.mark.database
def test_the_session_has_a_name_unless_the_user_gave_it_one(
    database: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(conninfo: str) -> str:
        processor = make("SELECT current_setting('application_name') AS name", conninfo)
        return str(processor.process(a_batch([()]))[0]["name"])

    plain, given = name(database), name(make_conninfo(database, application_name="shop"))
    monkeypatch.setenv("PGAPPNAME", "from the environment")

    assert (plain, given, name(database)) == ("microbatch", "shop", "from the environment")


def test_timeouts_have_defaults_that_the_connection_string_overrules(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = connection_parameters("dbname=shop")
    given = connection_parameters("dbname=shop connect_timeout=2 tcp_user_timeout=0 keepalives_idle=60")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
    environment = connection_parameters("dbname=shop")

    assert (
        plain["connect_timeout"],
        plain["keepalives_idle"],
        plain["keepalives_interval"],
        plain["keepalives_count"],
        plain["tcp_user_timeout"],
    ) == (5, 10, 5, 3, 20_000)
    assert tuple(given[k] for k in ("connect_timeout", "tcp_user_timeout", "keepalives_idle")) == (
        "2",
        "0",
        "60",
    )
    assert "connect_timeout" not in environment


# What it refuses to be built with


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=localhost s3cret",
        "postgresql://user:%zzs3cret@localhost/shop",
        "postgresql://user:s3cret@localhost/shop?bogus=s3cret",
        "postgresql://user:p@s3cret@localhost/shop",
        "postgresql://user:s3cret/x@localhost/shop",
    ],
)
def test_a_malformed_connection_string_is_refused_without_showing_it(conninfo: str) -> None:
    with pytest.raises(ValueError, match="no valid connection string") as caught:
        PostgresProcessor(conninfo, INSERT)

    assert "s3cret" not in str(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@pytest.mark.parametrize("conninfo", [None, 5, b"dbname=shop", {"dbname": "shop"}, psycopg.connect])
def test_something_else_than_a_source_of_connections_is_refused(conninfo: Any) -> None:
    if callable(conninfo):
        PostgresProcessor(conninfo, INSERT)  # a callable cannot be judged before it is called
    else:
        with pytest.raises(TypeError, match=f"not {type(conninfo).__qualname__}"):
            PostgresProcessor(conninfo, INSERT)


@pytest.mark.parametrize("statement", ["", " \n", b"", sql.SQL(" "), sql.Composed([]), sql.SQL("").join([])])
def test_an_empty_statement_is_refused(statement: Any) -> None:
    with pytest.raises(ValueError, match="statement is empty"):
        PostgresProcessor("dbname=shop", statement)


@pytest.mark.parametrize("statement", [None, 5, ["INSERT"]])
def test_a_statement_of_another_type_is_refused(statement: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(statement).__qualname__}"):
        PostgresProcessor("dbname=shop", statement)


def test_the_connection_string_shows_in_no_repr_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        processor = PostgresProcessor(f"postgresql://user:s3cret@127.0.0.1:{port}/shop", INSERT)

        with pytest.raises(psycopg.OperationalError) as caught:
            processor.open()

    error: Any = caught.value
    told = [repr(processor), repr(error), repr(vars(error)), *traceback.format_exception(error), caplog.text]
    assert repr(processor) == "<PostgresProcessor with own connections>"
    assert not [text for text in told if "s3cret" in text]
    assert (error.__cause__, error.__context__) == (None, None)
    assert processor.is_retryable(error)


def test_psycopg_without_libpq_is_a_missing_extra() -> None:
    code = "import microbatch.processors.postgres"
    environment = {**os.environ, "PSYCOPG_IMPL": "bogus"}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)

    assert f"{MissingExtra.__name__}: pip install" in done.stderr


# Borrowed connections


@pytest.mark.database
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_borrowed_connection_outside_a_transaction_is_committed(
    database: str, make: Make, control: psycopg.Connection[Any], autocommit: bool
) -> None:
    with psycopg.connect(database, autocommit=autocommit) as connection:
        processor = make(conninfo=lambda: contextlib.nullcontext(connection))

        results = processor.process(a_batch(items(1, 2)))
        good, bad = processor.process(a_batch(items(3, 1)))
        processor.close()

        assert [row["n"] for row in results] == [1, 2]
        assert good["n"] == 3
        assert isinstance(bad, psycopg.errors.UniqueViolation)
        assert stored(control) == [1, 2, 3]
        assert connection.info.transaction_status == TransactionStatus.IDLE
        assert connection.execute("SELECT 3").fetchone() == (3,)
    assert repr(processor) == "<PostgresProcessor with connections of a callable>"


@pytest.mark.database
@pytest.mark.parametrize("outer", ["rollback", "commit"])
def test_inside_a_transaction_a_batch_is_a_savepoint_and_the_transaction_stays_the_users(
    database: str, make: Make, control: psycopg.Connection[Any], outer: str
) -> None:
    with psycopg.connect(database) as connection:
        processor = make(conninfo=lambda: contextlib.nullcontext(connection))
        connection.execute("INSERT INTO item (n) VALUES (100)")

        processor.process(a_batch(items(1, 2)))
        *_, unique = processor.process(a_batch(items(3, 4, 1)))
        *_, nul = processor.process(a_batch([*items(5), {"n": 6, "label": "\0"}]))
        atomic = make(conninfo=lambda: contextlib.nullcontext(connection), on_job_error="fail_batch")
        *_, culprit = atomic.process(a_batch(items(8, 1)))
        processor.process(a_batch(items(7)))

        assert isinstance(unique, psycopg.errors.UniqueViolation)
        assert isinstance(nul, psycopg.DataError)
        assert isinstance(culprit, psycopg.errors.UniqueViolation)
        assert stored(control) == []
        assert connection.info.transaction_status == TransactionStatus.INTRANS
        getattr(connection, outer)()

    assert ([] if outer == "rollback" else [1, 2, 3, 4, 5, 7, 100]) == stored(control)


@pytest.mark.database
def test_a_batch_on_an_aborted_transaction_fails_and_does_not_end_it(database: str, make: Make) -> None:
    with psycopg.connect(database) as connection:
        make(conninfo=lambda: contextlib.nullcontext(connection)).process(a_batch(items(7)))
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")

        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            make(conninfo=lambda: contextlib.nullcontext(connection)).process(a_batch(items(1)))

        assert connection.info.transaction_status == TransactionStatus.INERROR
        connection.rollback()


@pytest.mark.database
def test_a_borrowed_connection_keeps_its_row_factory(database: str, make: Make) -> None:
    with psycopg.connect(database) as connection:
        results = make(conninfo=lambda: contextlib.nullcontext(connection)).process(a_batch(items(1)))

        assert results == [{"id": 1, "n": 1, "label": "item 1"}]
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.database
def test_a_connection_that_binds_on_the_client_serves_as_well(database: str, make: Make) -> None:
    """As Django's do by default."""
    with psycopg.connect(database, cursor_factory=psycopg.ClientCursor) as connection:
        processor = make(conninfo=lambda: contextlib.nullcontext(connection))

        assert [row["n"] for row in processor.process(a_batch(items(3, 1, 2)))] == [3, 1, 2]


@pytest.mark.database
@pytest.mark.parametrize("give", ["the pool", "its method"])
def test_a_pool_lends_its_connections(database: str, make: Make, control: psycopg.Connection[Any], give: str) -> None:
    with psycopg_pool.ConnectionPool(database, min_size=1, max_size=2, open=False) as pool:
        processor = make(conninfo=pool if give == "the pool" else pool.connection)

        assert [row["n"] for row in processor.process(a_batch(items(1, 2)))] == [1, 2]
        *_, bad = processor.process(a_batch(items(3, 1)))
        assert isinstance(bad, psycopg.errors.UniqueViolation)
        processor.close()
        assert not pool.closed

    assert stored(control) == [1, 2, 3]
    with pytest.raises(psycopg_pool.PoolClosed) as caught:
        processor.process(a_batch(items(4)))
    assert not processor.is_retryable(caught.value)


@pytest.mark.database
def test_two_batches_are_never_put_on_one_connection(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    with psycopg.connect(database) as connection:
        processor = make(
            "INSERT INTO item (n) SELECT %(n)s FROM pg_advisory_xact_lock(%(n)s) RETURNING n",
            lambda: contextlib.nullcontext(connection),
        )
        control.execute("SELECT pg_advisory_lock(1)")

        with in_thread(lambda: processor.process(a_batch([{"n": 1}]))) as first:
            wait_until(lambda: is_running(control, "%advisory%"))
            with pytest.raises(RuntimeError, match="another batch is using"):
                processor.process(a_batch([{"n": 2}], id="b2"))
            control.execute("SELECT pg_advisory_unlock(1)")

        assert first == {"result": [{"n": 1}]}
        assert processor.process(a_batch([{"n": 3}])) == [{"n": 3}]
    assert stored(control) == [1, 3]


@pytest.mark.database
def test_a_callable_that_gives_no_psycopg_connection_is_told_so(make: Make) -> None:
    processor = make(conninfo=lambda: contextlib.nullcontext(object()))

    with pytest.raises(TypeError, match=r"gave object, not a psycopg\.Connection"):
        processor.process(a_batch(items(1)))


@pytest.mark.database
def test_an_error_of_the_callable_is_the_batchs_error(make: Make) -> None:
    def source() -> Any:
        raise LookupError("no connection today")

    with pytest.raises(LookupError, match="no connection today"):
        make(conninfo=source).process(a_batch(items(1)))


@pytest.mark.database
def test_a_connection_in_pipeline_mode_is_refused(database: str, make: Make, control: psycopg.Connection[Any]) -> None:
    with psycopg.connect(database) as connection:
        processor = make(conninfo=lambda: contextlib.nullcontext(connection))

        with connection.pipeline(), pytest.raises(psycopg.NotSupportedError, match="pipeline mode"):
            processor.process(a_batch(items(1)))

    assert stored(control) == []


@pytest.mark.database
def test_a_context_manager_that_swallows_the_error_does_not_make_a_success(database: str, make: Make) -> None:
    @contextlib.contextmanager
    def source() -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(database) as connection, contextlib.suppress(Exception):
            yield connection

    with pytest.raises(ProcessorContractError):
        make("COMMIT", source).process(a_batch([()]))


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_P4_what_is_committed_stays_so_when_the_context_manager_fails_afterwards(
    database: str, make: Make, control: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def source() -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(database) as connection:
            yield connection
            raise OSError("while leaving")

    assert [row["n"] for row in make(conninfo=source).process(a_batch(items(1), id="b3"))] == [1]
    assert stored(control) == [1]
    assert logged(caplog) == ["microbatch: batch b3 is committed; giving its connection back failed (OSError)"]


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_P4_a_context_manager_that_fails_after_a_savepoint_makes_the_batch_unknown(database: str, make: Make) -> None:
    @contextlib.contextmanager
    def source() -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(database) as connection:
            connection.execute("SELECT 1")
            yield connection
            raise OSError("while leaving")

    with pytest.raises(OutcomeUnknown, match="OSError") as caught:
        make(conninfo=source).process(a_batch(items(1), id="b3"))

    assert caught.value.batch_id == "b3"


# An honest COMMIT


@pytest.mark.database
@pytest.mark.parametrize(
    ("is_it", "harm", "written"),
    [
        (is_commit, Harm.CUT, []),
        (None, Harm.CUT_BEHIND, [1, 2]),
        (is_committed, Harm.CUT, [1, 2]),
        (is_committed, Harm.CUT_INSIDE, [1, 2]),
    ],
    ids=["before", "behind", "before its answer", "inside its answer"],
)
@pytest.mark.parametrize("guard", ["xid", "ledger", "none"])
def test_P4_a_link_that_dies_during_commit_leaves_the_batch_to_its_guard(
    database: str,
    make: Make,
    control: psycopg.Connection[Any],
    guard: str,
    is_it: Any,
    harm: Harm,
    written: list[int],
) -> None:
    control.execute(DDL)
    with Proxy(database, Once(is_it or behind_commit(), harm)) as proxy:
        processor = make(conninfo=proxy.conninfo, commit_guard=guard)

        with pytest.raises(CommitUnknown, match="no answer to the COMMIT of batch b9") as caught:
            processor.process(a_batch(items(1, 2), id="b9"))
        wait_until(lambda: stored(control) == written)

        assert caught.value.batch_id == "b9"
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        assert processor.is_retryable(caught.value) == (guard != "none")
        if guard != "none":
            wait_until(lambda: not sessions(control))  # the cut-off backend may still have to notice it
            assert [row["n"] for row in processor.process(a_batch(items(1, 2), id="b9", attempt=2))] == [1, 2]
            assert stored(control) == [1, 2]
        processor.close()


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("harm", [Harm.CUT, Harm.CUT_BEHIND])
@pytest.mark.parametrize("word", ["BEGIN", "INSERT", "SET CONSTRAINTS"])
def test_P4_a_link_that_dies_earlier_proves_that_nothing_was_written(
    database: str, make: Make, control: psycopg.Connection[Any], word: str, harm: Harm
) -> None:
    with Proxy(database, Once(mentions(word), harm)) as proxy:
        processor = make(conninfo=proxy.conninfo)

        with pytest.raises(psycopg.OperationalError) as caught:
            processor.process(a_batch(items(1, 2)))

        processor.close()

    assert processor.is_retryable(caught.value)
    assert stored(control) == []


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("harm", [Harm.CUT, Harm.CUT_BEHIND])
def test_a_link_that_dies_while_a_savepoint_is_released_took_the_transaction_along(
    database: str, make: Make, control: psycopg.Connection[Any], harm: Harm
) -> None:
    with Proxy(database, Once(mentions("RELEASE"), harm)) as proxy, psycopg.connect(proxy.conninfo) as connection:
        connection.execute("INSERT INTO item (n) VALUES (100)")

        with pytest.raises(psycopg.OperationalError):
            make(conninfo=lambda: contextlib.nullcontext(connection)).process(a_batch(items(1)))

    assert stored(control) == []


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_a_failing_context_manager_cannot_make_nothing_written_of_unknown(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    with Proxy(database, Once(is_committed, Harm.CUT)) as proxy:

        @contextlib.contextmanager
        def source() -> Iterator[psycopg.Connection[Any]]:
            with psycopg.connect(proxy.conninfo) as connection:
                try:
                    yield connection
                finally:
                    connection.execute("SELECT 1")

        with pytest.raises(CommitUnknown):
            make(conninfo=source).process(a_batch(items(1)))

    assert stored(control) == [1]


@pytest.mark.database
def test_a_raising_log_handler_cannot_either(
    database: str, make: Make, control: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class RaisingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    monkeypatch.setattr(logging.getLogger("microbatch"), "handlers", [RaisingHandler()])
    with Proxy(database, Once(is_committed, Harm.CUT)) as proxy:
        processor = make(conninfo=proxy.conninfo)
        with pytest.raises(CommitUnknown):
            processor.process(a_batch(items(1)))

        assert [row["n"] for row in processor.process(a_batch(items(1)))] == [1]
        processor.close()

    assert stored(control) == [1]


class ClosingConnection(psycopg.Connection[Any]):
    """Closes itself while a row is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        close = self.close

        class ClosingLoader(psycopg.adapt.Loader):
            def load(self, data: Any) -> Any:
                close()

        self.adapters.register_loader("int4", ClosingLoader)


@pytest.mark.database
@pytest.mark.usefixtures("either_way")
def test_P4_a_connection_closed_while_its_rows_are_read_wrote_nothing(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    """psycopg's own transaction block would end in silence then."""
    with ClosingConnection.connect(database) as connection:
        processor = make(conninfo=lambda: contextlib.nullcontext(connection))

        with pytest.raises((psycopg.OperationalError, CommitUnknown)):
            processor.process(a_batch(items(1)))

    assert stored(control) == []


@pytest.mark.database
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), psycopg.OperationalError("lost")])
@pytest.mark.parametrize("guard", ["xid", "ledger", "none"])
def test_P4_whatever_comes_after_the_call_of_commit_is_no_proof(
    make: Make, control: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, guard: str
) -> None:
    control.execute(DDL)
    processor = make(commit_guard=guard)
    land = flight.Flight.land

    def raising(self: flight.Flight) -> Any:
        answers = land(self)
        if any(answer.command_status == b"COMMIT" for segment in answers for answer in segment):
            monkeypatch.setattr(flight.Flight, "land", land)
            raise error
        return answers

    monkeypatch.setattr(flight.Flight, "land", raising)
    with pytest.raises(CommitUnknown) as caught:
        processor.process(a_batch(items(1)))

    assert caught.value.__cause__ is error
    assert isinstance(caught.value, Undecided) == (guard != "none")
    assert stored(control) == [1]
    if guard != "none":
        assert [row["n"] for row in processor.process(a_batch(items(1)))] == [1]
        assert stored(control) == [1]


@pytest.mark.database
def test_P4_an_interrupt_during_commit_leaves_the_batch_to_its_guard(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    stalled = Once(is_commit, Harm.STALL)
    with Proxy(database, stalled) as proxy:
        processor = make(conninfo=proxy.conninfo)

        def interrupt() -> None:
            assert stalled.fired.wait(10)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        with in_thread(interrupt) as interrupter, pytest.raises(Undecided) as caught:
            processor.process(a_batch(items(1)))

        assert interrupter == {"result": None}
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)
        processor.close()


@pytest.mark.database
def test_an_interrupt_before_commit_passes_through_and_leaves_no_trace(
    make: Make, control: psycopg.Connection[Any]
) -> None:
    processor = make("INSERT INTO item (n) SELECT %(n)s FROM pg_sleep(%(s)s)")

    def interrupt() -> None:
        wait_until(lambda: is_running(control, "%pg_sleep%"))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with in_thread(interrupt) as interrupter, pytest.raises(KeyboardInterrupt):
        processor.process(a_batch([{"n": 1, "s": 0}, {"n": 2, "s": 30}]))

    assert interrupter == {"result": None}
    assert stored(control) == []
    processor.process(a_batch([{"n": 3, "s": 0}]))
    assert stored(control) == [3]


# Abandoning


@pytest.mark.database
def test_abandon_frees_the_thread_within_a_second(
    make: Make, control: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "microbatch")
    processor = make(SLEEP)
    batch = a_batch([{"seconds": 30}])

    with in_thread(lambda: processor.process(batch)) as outcome:
        wait_until(lambda: is_running(control, "%pg_sleep%"))
        started = time.monotonic()
        processor.abandon(batch)
        called = time.monotonic() - started
    freed = time.monotonic() - started

    assert called < 0.5
    assert freed < 1
    assert isinstance(outcome["error"], psycopg.OperationalError)
    assert logged(caplog) == ["microbatch: batch b1 lost its connection (cut at its deadline); the next one connects"]
    assert [row["pg_sleep"] or None for row in processor.process(a_batch([{"seconds": 0}]))] == [None]


@pytest.mark.database
def test_P4_abandon_during_commit_leaves_the_batch_to_its_guard(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    stalled = Once(is_commit, Harm.STALL)
    with Proxy(database, stalled) as proxy:
        processor = make(conninfo=proxy.conninfo)
        batch = a_batch(items(1))

        with in_thread(lambda: processor.process(batch)) as outcome:
            assert stalled.fired.wait(10)
            processor.abandon(batch)

        assert isinstance(outcome["error"], Undecided)
        processor.close()


@pytest.mark.database
def test_abandon_hits_no_other_batch(make: Make, control: psycopg.Connection[Any]) -> None:
    """A thread that abandons the batch before this one, all the time, on the connection that both share."""
    processor = make()
    processor.open()
    before = sessions(control)
    done = threading.Event()
    last = [a_batch([], id="none")]

    def abandon() -> None:
        # Not without any pause: a thread that never lets go of the interpreter only slows the other down.
        while not done.wait(0.0002):
            processor.abandon(last[0])

    with in_thread(abandon):
        try:
            for number in range(300):
                batch = a_batch(items(number), id=f"b{number}")
                assert number == processor.process(batch)[0]["n"]
                last[0] = batch
        finally:
            done.set()

    assert before == sessions(control)


@pytest.mark.database
def test_abandon_leaves_a_borrowed_connection_alone(
    database: str, make: Make, control: psycopg.Connection[Any]
) -> None:
    with psycopg.connect(database) as connection:
        processor = make(SLEEP, lambda: contextlib.nullcontext(connection))
        batch = a_batch([{"seconds": 0.5}])

        with in_thread(lambda: processor.process(batch)) as outcome:
            wait_until(lambda: is_running(control, "%pg_sleep%"))
            processor.abandon(batch)

        assert len(outcome["result"]) == 1


# SQLSTATE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.OperationalError("server closed the connection unexpectedly"), True),
        (psycopg.errors.ConnectionTimeout("connection timeout expired"), True),
        (psycopg_pool.PoolTimeout("no connection in 30 s"), True),
        (psycopg.errors.ConnectionFailure(), True),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.CrashShutdown(), True),
        (psycopg.errors.CannotConnectNow(), True),
        (psycopg.errors.SerializationFailure(), True),
        (psycopg.errors.DeadlockDetected(), True),
        (psycopg_pool.PoolClosed("closed"), False),
        (psycopg.errors.PipelineAborted("aborted"), False),
        (psycopg.InterfaceError("the cursor is closed"), False),
        (psycopg.errors.UniqueViolation(), False),
        (psycopg.errors.SyntaxError(), False),
        (psycopg.DataError("NUL"), False),
        (OutcomeUnknown("COMMIT", batch_id="b1"), False),
        (ConnectionResetError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_which_errors_are_worth_another_attempt(error: BaseException, expected: bool) -> None:
    assert expected == is_retryable(error)


@pytest.mark.database
def test_only_an_error_of_the_server_is_a_refusal(control: psycopg.Connection[Any]) -> None:
    def raised(sqlstate: str) -> psycopg.Error:
        with pytest.raises(psycopg.Error) as caught:
            control.execute(f"DO $$BEGIN RAISE EXCEPTION USING errcode = '{sqlstate}'; END$$")
        return caught.value

    assert is_refusal(raised("23505"))
    assert is_refusal(raised("57014"))
    assert not is_refusal(raised("40003"))
    assert not is_refusal(raised("08007"))
    assert not is_refusal(psycopg.OperationalError("server closed the connection unexpectedly"))
    assert not is_refusal(KeyboardInterrupt())


def test_P3_jobs_that_depend_on_each_other_keep_their_order_in_isolation(
    make: Make, control: psycopg.Connection[Any]
) -> None:
    """The first of two that take from one stock gets it, though a neighbour makes its batch fail."""
    control.execute("CREATE TABLE stock (id int PRIMARY KEY, left_over int CHECK (left_over >= 0))")
    control.execute("INSERT INTO stock VALUES (1, 10), (2, 1000)")
    take = make("UPDATE stock SET left_over = left_over - %(n)s WHERE id = %(id)s RETURNING left_over")
    jobs = [{"id": 1, "n": 6}, {"id": 2, "n": "x"}, *({"id": 2, "n": 1} for _ in range(40)), {"id": 1, "n": 6}]

    results = take.process(a_batch(jobs))

    assert results[0] == {"left_over": 4}
    assert isinstance(results[1], psycopg.errors.InvalidTextRepresentation)
    assert isinstance(results[-1], psycopg.errors.CheckViolation)
    assert [row["left_over"] for row in results[2:-1]] == list(range(999, 959, -1))
