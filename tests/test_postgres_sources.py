"""Where connections come from: connection strings as people have them, callables, engines, and none of these."""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import psycopg
import psycopg_pool
import pytest
from databases import empty
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.conninfo import DEFAULTS, connection_parameters
from microbatch.protocols import Batch

PID = "SELECT pg_backend_pid() AS pid"
SECRET = "s3cret"


def read(conninfo: Any) -> dict[str, Any]:
    """What is in the string itself."""
    return {key: value for key, value in connection_parameters(conninfo).items() if DEFAULTS.get(key) != value}


# Strings


@pytest.mark.parametrize(
    ("conninfo", "expected"),
    [
        ("", {}),
        ("dbname=shop", {"dbname": "shop"}),
        ("postgres://u:p@h/shop", {"user": "u", "password": "p", "host": "h", "dbname": "shop"}),
        (" postgresql://h/shop\n", {"host": "h", "dbname": "shop"}),
        ("POSTGRESQL://h/shop", {"host": "h", "dbname": "shop"}),
        ("postgis://h/shop", {"host": "h", "dbname": "shop"}),
        ("postgresql://h1:1,h2:2/shop", {"host": "h1,h2", "port": "1,2", "dbname": "shop"}),
        (
            "postgresql+psycopg://u:p%40%2F@h:5433/shop",
            {"user": "u", "password": "p@/", "host": "h", "port": "5433", "dbname": "shop"},
        ),
        ("postgresql+psycopg2://u@h/shop", {"user": "u", "host": "h", "dbname": "shop"}),
        ("postgres+psycopg://h/shop", {"host": "h", "dbname": "shop"}),
        # SQLAlchemy reads these characters in a password, and libpq does not.
        ("postgresql+psycopg://u:a/b:c?d@h/shop", {"user": "u", "password": "a/b:c?d", "host": "h", "dbname": "shop"}),
        ("postgresql+psycopg://[::1]:5433/shop", {"host": "::1", "port": "5433", "dbname": "shop"}),
        ("postgresql+psycopg:///shop?host=/var/run/pg", {"host": "/var/run/pg", "dbname": "shop"}),
        (
            "postgresql+psycopg://u@/shop?host=a:1&host=b:2",
            {"user": "u", "host": "a,b", "port": "1,2", "dbname": "shop"},
        ),
        ("postgresql://u@/shop?host=a:1&host=b:2", {"user": "u", "host": "a,b", "port": "1,2", "dbname": "shop"}),
        (
            "postgresql+psycopg://u@/shop?host=a,b&port=1,2",
            {"user": "u", "host": "a,b", "port": "1,2", "dbname": "shop"},
        ),
        (
            "postgresql+psycopg://h/shop?sslmode=require&application_name=my+shop&options=-c%20work_mem%3D1MB",
            {
                "host": "h",
                "dbname": "shop",
                "sslmode": "require",
                "application_name": "my shop",
                "options": "-c work_mem=1MB",
            },
        ),
        (
            "postgresql+psycopg://h/shop?prepare_threshold=0&connect_timeout=7",
            {"host": "h", "dbname": "shop", "connect_timeout": "7"},
        ),
        ("postgresql+psycopg://", {}),
    ],
)
def test_a_connection_string_is_read_as_its_people_write_it(conninfo: str, expected: dict[str, str]) -> None:
    assert read(conninfo) == expected


@pytest.mark.parametrize(
    ("conninfo", "told"),
    [
        (f"mysql://u:{SECRET}@h/shop", "for 'mysql', not for PostgreSQL"),
        (f"mysql+pymysql://u:{SECRET}@h/shop", "for 'mysql', not for PostgreSQL"),
        (f"sqlite:///{SECRET}.db", "for 'sqlite', not for PostgreSQL"),
        (f"https://{SECRET}.example", "for 'https', not for PostgreSQL"),
        (f"postgresql+asyncpg://u:{SECRET}@h/shop", "the driver 'asyncpg'"),
        (f"postgresql+pg8000://u:{SECRET}@h/shop", "the driver 'pg8000'"),
        (f"jdbc:postgresql://h/shop?user=u&password={SECRET}", "a URL of JDBC's"),
        (f"{SECRET}:5432", "neither a URL nor a list of keywords"),
        (SECRET, "neither a URL nor a list of keywords"),
        (f"postgresql://u:{SECRET}@h/shop?pgbouncer=true", "the option 'pgbouncer'"),
        (f"postgresql+psycopg://u:{SECRET}@h/shop?ssl=true", "the option 'ssl'"),
        (f"postgresql+psycopg://u:{SECRET}@h/shop?{SECRET}=1", "no valid connection string"),
        (f"postgresql+psycopg://u:p@{SECRET}@h/shop", "no valid connection string"),
        (f"postgresql+psycopg://u:p@h:{SECRET}/shop", "no valid connection string"),
    ],
)
def test_a_wrong_string_is_told_what_it_is_without_showing_it(conninfo: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        PostgresProcessor(conninfo, PID)

    assert SECRET not in str(caught.value)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    if "no valid" not in told:
        assert "percent" not in str(caught.value)


@pytest.mark.parametrize(
    ("conninfo", "told"),
    [
        (None, "setting, that should hold it missing"),
        (5, "not int; pass a connection string"),
        (b"dbname=shop", "not bytes; decode it"),
        (pathlib.Path("shop"), "Path; pass a connection string"),
        ({"dbname": "shop"}, "make_conninfo"),
        (psycopg_pool.AsyncConnectionPool("", open=False), "batches run on threads"),
        (SimpleNamespace(), "not SimpleNamespace; pass a connection string"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_source_of_connections_is_told_what_to_pass(conninfo: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        PostgresProcessor(conninfo, PID)


async def connect_async() -> Any: ...


def test_a_coroutine_function_is_no_source_of_connections() -> None:
    with pytest.raises(TypeError, match="must not be async"):
        PostgresProcessor(connect_async, PID)
    with pytest.raises(TypeError, match="must not be async"):
        PostgresProcessor(lambda: connect_async(), PID).process(Batch([()], id="b1"))


# The names are looked at, for neither framework is imported.
Wrapper = type("DatabaseWrapper", (), {"__module__": "django.db.backends.postgresql.base", "ensure_connection": None})
Psycopg2 = type("connection", (), {"__module__": "psycopg2.extensions"})
Fairy = type("_ConnectionFairy", (), {"__module__": "sqlalchemy.pool.base"})


@pytest.mark.parametrize(
    ("lent", "told"),
    [
        (None, r"gave NoneType.* call `connection\.ensure_connection\(\)` first"),
        (Wrapper(), "Django's wrapper"),
        (Psycopg2(), "the application runs on psycopg2"),
        (Fairy(), "pass the Engine itself"),
        ("dbname=shop", "without a context manager"),
        (psycopg_pool.ConnectionPool("", open=False), "pass an open psycopg_pool.ConnectionPool itself"),
        (sqlite3.connect(":memory:"), "gave Connection, not a psycopg.Connection; pass a connection string"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_lent_in_the_place_of_a_connection_is_told_what_to_lend(lent: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        PostgresProcessor(lambda: contextlib.nullcontext(lent), PID).process(Batch([()], id="b1"))
    if not isinstance(lent, (str, sqlite3.Connection)):
        with pytest.raises(TypeError, match="not a connection string nor a context manager"):
            PostgresProcessor(lambda: lent, PID).process(Batch([()], id="b1"))


# Callables that give a string


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    yield shared_database
    empty(shared_database)


def url_of(conninfo: str, scheme: str) -> str:
    parts = {key: quote(str(value), safe="") for key, value in conninfo_to_dict(conninfo).items()}
    return f"{scheme}://{parts['user']}:{parts['password']}@{parts['host']}:{parts['port']}/{parts['dbname']}"


@pytest.mark.database
@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_a_url_connects(database: str, scheme: str) -> None:
    with contextlib.closing(PostgresProcessor(url_of(database, scheme), PID)) as processor:
        processor.open()
        assert len(processor.process(Batch([()], id="b1"))) == 1


@pytest.mark.database
def test_a_callable_may_give_the_connection_string_when_it_is_needed(database: str) -> None:
    settings: dict[str, str] = {}
    calls: list[int] = []

    def conninfo() -> str:
        calls.append(1)
        return settings["DSN"]

    processor = PostgresProcessor(conninfo, PID)
    assert not calls
    settings["DSN"] = url_of(database, "postgresql+psycopg")
    with MicroBatcher(processor) as batcher:
        [pid] = {batcher.execute(())["pid"] for _ in range(5)}
        assert len(calls) == 1
        with psycopg.connect(database, autocommit=True) as control:
            control.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert batcher.execute(())["pid"] != pid

    assert len(calls) == 2
    assert repr(processor) == "<PostgresProcessor with connections of a callable>"


@pytest.mark.database
def test_a_string_that_changes_counts_from_the_next_connection_on(database: str) -> None:
    names = iter(["first", "second"])
    statement = "SELECT current_setting('application_name') AS name"
    processor = PostgresProcessor(lambda: make_conninfo(database, application_name=next(names)), statement)
    seen = []
    for number in range(4):
        seen += [row["name"] for row in processor.process(Batch([()], id=f"b{number}"))]
        if number == 1:
            processor.close()
    processor.close()

    assert seen == ["first", "first", "second", "second"]


@pytest.mark.database
def test_P5_a_connection_of_a_lazy_string_is_cut_at_the_deadline(database: str) -> None:
    processor = PostgresProcessor(lambda: database, "SELECT pg_sleep(%s)")
    batch = Batch([(20,)], id="b1")
    errors: list[Exception] = []

    def process() -> None:
        try:
            processor.process(batch)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=process)
    thread.start()
    with psycopg.connect(database, autocommit=True) as control:
        deadline = time.monotonic() + 10
        sleeping = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        while not control.execute(sleeping).fetchall():
            assert time.monotonic() < deadline
    processor.abandon(batch)
    thread.join(5)

    assert [type(error) for error in errors] == [psycopg.OperationalError]
    processor.close()


@pytest.mark.database
def test_a_wrong_string_of_a_callable_is_the_batchs_error_without_showing_it(database: str) -> None:
    processor = PostgresProcessor(lambda: f"mysql://u:{SECRET}@h/shop", PID)
    with pytest.raises(ValueError, match="for 'mysql'") as caught:
        processor.process(Batch([()], id="b1"))

    assert SECRET not in str(caught.value)
    assert not processor.is_retryable(caught.value)


# SQLAlchemy


@pytest.fixture
def alchemy() -> Any:
    # Missing at a desk, perhaps, but not where everything has to pass.
    return importlib.import_module("sqlalchemy") if os.environ.get("CI") else pytest.importorskip("sqlalchemy")


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://u:p%40%2F@h:5433/shop?sslmode=require",
        "postgresql+psycopg://u@/shop?host=a:1&host=b:2",
        "postgresql+psycopg://u@/shop?host=a,b&port=1,2",
        "postgresql+psycopg2://u:a%3Fb@[::1]/shop?application_name=x%20y",
        "postgresql://u@/shop?host=%2Fvar%2Frun",
    ],
)
def test_a_url_of_sqlalchemy_is_read_as_its_text_is(alchemy: Any, text: str) -> None:
    assert connection_parameters(alchemy.make_url(text)) == connection_parameters(text)


@pytest.mark.database
@pytest.mark.parametrize("lazily", [False, True], ids=["itself", "by a callable"])
@pytest.mark.parametrize("pool", ["QueuePool", "NullPool", "StaticPool"])
def test_an_engine_makes_connections_of_our_own(database: str, alchemy: Any, pool: str, lazily: bool) -> None:
    engine = alchemy.create_engine(
        url_of(database, "postgresql+psycopg"),
        connect_args={"application_name": "by the engine"},
        poolclass=getattr(alchemy.pool, pool),
    )
    asked: list[Any] = []

    @alchemy.event.listens_for(engine, "do_connect")
    def password(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        asked.append(parameters["application_name"])
        parameters["application_name"] += ", told"

    statement = "SELECT current_setting('application_name') AS name, pg_backend_pid() AS pid"
    processor = PostgresProcessor((lambda: engine) if lazily else engine, statement)
    with MicroBatcher(processor) as batcher:
        rows = [batcher.execute(()) for _ in range(3)]
        with engine.connect() as connection:
            other = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()

    assert {row["name"] for row in rows} == {"by the engine, told"}
    assert len({row["pid"] for row in rows} | {other}) == 2
    assert len(asked) == 2
    engine.dispose()


@pytest.mark.database
def test_P9_an_engine_that_is_refused_for_good_is_told_at_once_and_shows_no_password(
    database: str, alchemy: Any
) -> None:
    engine = alchemy.create_engine(url_of(make_conninfo(database, password=SECRET), "postgresql+psycopg"))
    with MicroBatcher(PostgresProcessor(engine, PID), delivery_timeout=10) as batcher:
        error = batcher.submit(()).exception()

    assert isinstance(error, psycopg.OperationalError)
    assert batcher.stats().retries == 0
    assert SECRET not in repr(vars(error)) + repr(error) + repr(batcher) + repr(error.__context__)


def test_an_engine_on_another_driver_gives_its_url(alchemy: Any) -> None:
    with pytest.raises(ValueError, match="for 'sqlite', not for PostgreSQL"):
        PostgresProcessor(alchemy.create_engine("sqlite://"), PID)
    assert (
        repr(PostgresProcessor(alchemy.make_url("postgresql://h/shop"), PID))
        == "<PostgresProcessor with own connections>"
    )
