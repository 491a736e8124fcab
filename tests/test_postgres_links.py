"""The way to the server: how long it may take to make a link, what is tried again, and what is kept of it."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest
from databases import empty
from proxy import Harm, Message, Proxy
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from microbatch import MicroBatcher, RetryPolicy
from microbatch.processors.postgres import PostgresProcessor, refused
from microbatch.processors.postgres.session import before
from microbatch.processors.postgres.sqlstate import is_retryable
from microbatch.protocols import Batch

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


# Who is refused for good is told at once.


@pytest.fixture
def role(database: str) -> Iterator[str]:
    """A role with a password, that may do what everybody may."""
    name = f"links_{os.urandom(4).hex()}"
    with psycopg.connect(database, autocommit=True) as control:
        control.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'right'").format(sql.Identifier(name)))
        control.execute(sql.SQL("GRANT ALL ON SCHEMA public TO {}").format(sql.Identifier(name)))
        control.execute(sql.SQL("GRANT ALL ON item, item_id_seq TO {}").format(sql.Identifier(name)))
        yield name
        control.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        control.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def altered(database: str, command: str, **names: str) -> None:
    with psycopg.connect(database, autocommit=True) as control:
        control.execute(sql.SQL(command).format(**{key: sql.Identifier(name) for key, name in names.items()}))  # type: ignore[arg-type]


def wrong_password(database: str, role: str) -> str:
    return make_conninfo(database, user=role, password="wrong")


def no_password(database: str, role: str) -> str:
    parts = conninfo_to_dict(database)
    del parts["password"]
    return make_conninfo("", **{**parts, "user": role, "passfile": "/nowhere"})


def no_role(database: str, role: str) -> str:
    return make_conninfo(database, user="nobody_at_all")


def no_login(database: str, role: str) -> str:
    altered(database, "ALTER ROLE {role} NOLOGIN", role=role)
    return make_conninfo(database, user=role, password="right")


def no_database(database: str, role: str) -> str:
    return make_conninfo(database, dbname="no_such_database")


def no_right_to_connect(database: str, role: str) -> str:
    name = str(conninfo_to_dict(database)["dbname"])
    altered(database, "REVOKE CONNECT ON DATABASE {name} FROM PUBLIC", name=name)
    return make_conninfo(database, user=role, password="right")


def closed_database(database: str, role: str) -> str:
    return make_conninfo(database, dbname="template0")


def wrong_option(database: str, role: str) -> str:
    return make_conninfo(database, options="-c datestyle=nonsense")


def unknown_option(database: str, role: str) -> str:
    return make_conninfo(database, options="-c no_such_setting=1")


def no_encryption(database: str, role: str) -> str:
    return make_conninfo(database, sslmode="require")


def no_root_certificate(database: str, role: str) -> str:
    return make_conninfo(database, sslmode="verify-full", sslrootcert="/nowhere/root.crt")


def wrong_mode(database: str, role: str) -> str:
    return make_conninfo(database, sslmode="nonsense")


def no_service(database: str, role: str) -> str:
    return make_conninfo(database, service="no_such_service")


REFUSED: dict[Callable[[str, str], str], str | None] = {
    wrong_password: "28P01",
    no_password: None,
    no_role: "28P01",
    no_login: "28000",
    no_database: "3D000",
    no_right_to_connect: "42501",
    closed_database: "55000",
    wrong_option: "22023",
    unknown_option: "42704",
    no_encryption: None,
    no_root_certificate: None,
    wrong_mode: None,
    no_service: None,
}


@pytest.mark.parametrize("how", ["a string", "a callable"])
@pytest.mark.parametrize("why", REFUSED, ids=lambda why: why.__name__)
def test_P9_who_is_refused_for_good_is_told_at_once(
    database: str, role: str, why: Callable[[str, str], str], how: str
) -> None:
    conninfo = why(database, role)
    source: Any = conninfo if how == "a string" else lambda: psycopg.connect(conninfo)
    try:
        with MicroBatcher(WAYS["statement"](source), delivery_timeout=15) as batcher:
            error = batcher.submit({"n": 1}).exception()
    finally:
        name = str(conninfo_to_dict(database)["dbname"])
        altered(database, "GRANT CONNECT ON DATABASE {name} TO PUBLIC", name=name)

    assert isinstance(error, psycopg.OperationalError)
    assert str(error).startswith(("connection failed: ", "connection is bad: ")), error
    assert batcher.stats().retries == 0
    if how == "a string":
        assert error.sqlstate == REFUSED[why]
        assert "LOCATION" not in str(error)


@pytest.mark.parametrize("give", ["the pool", "its method"])
def test_P9_a_pool_that_is_refused_for_good_says_so(database: str, role: str, give: str) -> None:
    conninfo = wrong_password(database, role)
    with psycopg_pool.ConnectionPool(conninfo, min_size=1, max_size=2, open=True, reconnect_timeout=60) as pool:
        processor = WAYS["statement"](pool if give == "the pool" else pool.connection)
        with MicroBatcher(processor, delivery_timeout=15) as batcher:
            error = batcher.submit({"n": 1}).exception()

        assert isinstance(error, psycopg.errors.InvalidPassword)
        assert batcher.stats().retries == 0


def test_P5_a_pool_without_a_free_connection_is_waited_for_until_the_deadline(database: str) -> None:
    with psycopg_pool.ConnectionPool(database, min_size=1, max_size=1, open=True) as pool, pool.connection() as taken:
        processor = PostgresProcessor(pool, INSERT)
        deadline = time.monotonic() + 1.5
        with pytest.raises(psycopg_pool.PoolTimeout):
            processor.process(Batch([{"n": 1}], id="b1", deadline=deadline))

        assert 0.2 < time.monotonic() - deadline + 1.5 < 1.5
        taken.execute("SELECT 1")


class Wrapped(Exception):
    """As Django and SQLAlchemy raise one, from psycopg's own."""


def test_a_framework_s_error_for_a_lost_link_is_tried_again(database: str) -> None:
    calls: list[int] = []

    def connect() -> Any:
        calls.append(1)
        try:
            port = 1 if len(calls) < 3 else conninfo_to_dict(database)["port"]
            return psycopg.connect(database, port=port)
        except psycopg.OperationalError as error:
            raise Wrapped("no connection") from error

    with MicroBatcher(PostgresProcessor(connect, INSERT), retry=RetryPolicy(backoff=0.01)) as batcher:
        assert batcher.execute({"n": 1}) == {"n": 1}
    assert len(calls) == 3


def test_a_server_of_another_language_is_understood_by_its_codes() -> None:
    german = (
        'connection to server at "db", port 5432 failed: FATAL:  28P01: Passwort-Authentifizierung für Benutzer »a«'
        " fehlgeschlagen\nORT:  auth_failed, auth.c:317"
    )
    text, code = refused.read_code(german)

    assert text == german.replace("28P01: ", "").partition("\n")[0]
    assert code == "28P01"
    assert refused.is_for_good(text, code)


@pytest.mark.parametrize(
    "text",
    [
        'connection to server at "db", port 5432 failed: Connection refused',
        'connection to server on socket "/tmp/.s.PGSQL.5432" failed: No such file or directory',
        'connection to server at "db", port 5432 failed: FATAL:  the database system is starting up',
        'connection to server at "db", port 5432 failed: FATAL:  the database system is not yet accepting connections',
        'connection to server at "db", port 5432 failed: FATAL:  sorry, too many clients already',
        'connection to server at "db", port 5432 failed: FATAL:  too many connections for role "a"',
        'connection to server at "db", port 5432 failed: session is read-only',
        'connection to server at "db", port 5432 failed: SSL SYSCALL error: EOF detected',
        'connection to server at "db", port 5432 failed: could not read root certificate file "a": Too many open files',
        'connection to server at "db", port 5432 failed: server closed the connection unexpectedly',
        'could not translate host name "db" to address: Name or service not known',
    ],
)
def test_what_may_pass_is_waited_for(text: str) -> None:
    assert is_retryable(psycopg.OperationalError(f"connection failed: {text}"))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (["Connection refused", 'database "a" does not exist'], True),
        (['database "a" does not exist', "Connection refused"], True),
        (['database "a" does not exist', "no pg_hba.conf entry for host"], False),
    ],
)
def test_of_several_hosts_none_may_be_worth_waiting_for(errors: list[str], expected: bool) -> None:
    lines = [
        f"- host: 'h{n}', port: '5432', hostaddr: '10.0.0.{n}': connection failed: {e}" for n, e in enumerate(errors)
    ]
    told = "\n".join(
        [f"connection failed: {errors[-1]}", "Multiple connection attempts failed. All failures were:", *lines]
    )

    assert is_retryable(psycopg.OperationalError(told)) is expected


def test_one_host_that_refuses_while_another_is_down_is_tried_again(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    parts = conninfo_to_dict(database)
    several = {"host": f"127.0.0.1,{parts['host']}", "port": f"{port},{parts['port']}", "dbname": "no_such_database"}
    processor = PostgresProcessor(make_conninfo(database, **several), INSERT)
    with pytest.raises(psycopg.OperationalError, match="All failures were") as caught:
        processor.open()
    assert processor.is_retryable(caught.value)

    both = PostgresProcessor(make_conninfo(database, **{**several, "port": f"{parts['port']},{parts['port']}"}), INSERT)
    with pytest.raises(psycopg.OperationalError, match="no_such_database") as caught:
        both.open()
    assert caught.value.sqlstate == "3D000"
    assert not both.is_retryable(caught.value)


def test_a_place_that_is_taken_is_waited_for(database: str, role: str) -> None:
    altered(database, "ALTER ROLE {role} CONNECTION LIMIT 0", role=role)
    retry = RetryPolicy(backoff=0.01)
    conninfo = make_conninfo(database, user=role, password="right")
    with MicroBatcher(PostgresProcessor(conninfo, INSERT), retry=retry) as batcher:
        future = batcher.submit({"n": 1})
        deadline = time.monotonic() + 10
        while not batcher.stats().retries:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        altered(database, "ALTER ROLE {role} CONNECTION LIMIT -1", role=role)

        assert future.result() == {"n": 1}


# Deadlines that are shorter than a connection takes.


def slow_to_let_in(message: Message) -> None:
    if message.kind in ("", "R", "p"):
        time.sleep(0.04)


@pytest.mark.parametrize("way", WAYS)
def test_P5_jobs_in_a_hurry_get_a_link_that_takes_longer_than_they_have(database: str, way: str) -> None:
    with Proxy(database) as proxy, MicroBatcher(WAYS[way](proxy.conninfo)) as batcher:
        batcher.execute({"n": 0})
        proxy.plan = slow_to_let_in
        with psycopg.connect(database, autocommit=True) as control:
            control.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        began = proxy.connections
        outcomes = [batcher.submit({"n": n}, delivery_timeout=0.15).exception(10) for n in range(30)]

    assert outcomes[-5:].count(None) >= 3, outcomes
    assert proxy.connections - began < 10


@pytest.mark.parametrize("silence", ["at once", "after the password"])
def test_P5_no_connection_is_waited_for_beyond_the_deadline(database: str, silence: str) -> None:
    with Proxy(database) as proxy:
        proxy.is_deaf = silence == "at once"
        proxy.plan = lambda message: Harm.STALL if message.kind == "Z" else None
        with contextlib.closing(PostgresProcessor(proxy.conninfo, INSERT)) as processor:
            deadline = time.monotonic() + 0.5
            with pytest.raises(psycopg.OperationalError) as caught:
                processor.process(Batch([{"n": 1}], id="b1", deadline=deadline))
            late = time.monotonic() - deadline

    assert processor.is_retryable(caught.value)
    assert late < 0


def test_a_short_deadline_is_spent_on_the_work() -> None:
    now = time.monotonic()
    left = {seconds: before(now + seconds) for seconds in (0.05, 1.0, 20.0)}

    assert {seconds: round((at or now) - now, 2) for seconds, at in left.items()} == {0.05: 0.04, 1.0: 0.8, 20.0: 19.75}


def test_a_batch_without_time_leaves_the_link_alone(database: str) -> None:
    with contextlib.closing(PostgresProcessor(database, "SELECT pg_backend_pid() AS pid")) as processor:
        [before] = processor.process(Batch([()], id="b1"))
        with pytest.raises(psycopg.OperationalError, match="no time is left") as caught:
            processor.process(Batch([()], id="b2", deadline=time.monotonic()))
        [after] = processor.process(Batch([()], id="b3"))

    assert processor.is_retryable(caught.value)
    assert before == after


# Short of something on this side.


@pytest.mark.parametrize("free", range(5))
@pytest.mark.parametrize("how", ["a string", "a callable"])
def test_a_job_outlasts_a_second_without_descriptors(database: str, free: int, how: str) -> None:
    source: Any = database if how == "a string" else lambda: psycopg.connect(database)
    processor = PostgresProcessor(source, INSERT)
    with MicroBatcher(processor, retry=RetryPolicy(backoff=0.01, backoff_max=0.05)) as batcher:
        with no_descriptors(but=free):
            future = batcher.submit({"n": 1})
            with contextlib.suppress(TimeoutError):
                future.exception(0.5)

        assert future.result() == {"n": 1}


@contextlib.contextmanager
def no_descriptors(but: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(but):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
