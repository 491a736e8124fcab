"""Settings, ids, what a process knows, and tables: rules without a server."""

from __future__ import annotations

import base64
import os
import threading
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest
from flask import Flask

from microbatch.errors import BatcherClosed, DeliveryTimeout, OutcomeUnknown
from microbatch.service import ServiceError, create_app
from microbatch.service.failures import HTTP_STATUS, Failure, failure_of
from microbatch.service.ids import Ids
from microbatch.service.known import Known, Request, Ticket, is_free
from microbatch.service.settings import Settings, settings_from
from microbatch.service.table import find_table
from microbatch.service.writer import Submission
from microbatch.testing import InlineBatcher

# Settings.


def test_keywords_win_over_the_environment_and_both_over_defaults() -> None:
    environ = {
        "MICROBATCH_TABLE": "a",
        "MICROBATCH_STATUS_TTL": "5",
        "MICROBATCH_LINGER": "0.5",
        "MICROBATCH_STORE": "",
    }
    settings = settings_from(environ, table="b", max_batch_size=7, token=None)

    assert (settings.table, settings.status_ttl, settings.store, settings.token) == ("b", 5.0, "postgres", None)
    assert settings.batcher == {"when_full": "raise", "linger": 0.5, "max_batch_size": 7}


def test_every_setting_has_a_variable() -> None:
    environ = {
        "MICROBATCH_DSN": "host=db",
        "MICROBATCH_TABLE": "t",
        "MICROBATCH_COLUMNS": "a, b",
        "MICROBATCH_STORE": "memory",
        "MICROBATCH_STATUS_TTL": "60",
        "MICROBATCH_TOKEN": "token",
        "MICROBATCH_ADMIN_TOKEN": "admin",
        "MICROBATCH_SECRET": "secret",
        "MICROBATCH_ALLOWED_HOSTS": "one,two",
        "MICROBATCH_INSECURE": "1",
        "MICROBATCH_MAX_CLIENT_JOBS": "9",
        "MICROBATCH_WHEN_FULL": "block",
    }
    assert settings_from(environ) == Settings(
        "host=db", "t", ("a", "b"), "memory", 60.0, "token", "admin", "secret", ("one", "two"), True, 9,
        {"when_full": "block"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MICROBATCH_STORE": "file"}, "store must be"),
        ({"MICROBATCH_STATUS_TTL": "0"}, "status_ttl must be"),
        ({"MICROBATCH_STATUS_TTL": "x"}, "MICROBATCH_STATUS_TTL='x'"),
        ({"MICROBATCH_MAX_CLIENT_JOBS": "0"}, "max_client_jobs must be"),
        ({"MICROBATCH_INSECURE": "perhaps"}, "say 1 or 0"),
        ({"MICROBATCH_BATCH_SIZE": "3"}, "did you mean MICROBATCH_MAX_BATCH_SIZE"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_from(environ)


def test_settings_show_no_secret() -> None:
    shown = repr(settings_from({}, dsn="password=geheim", token="geheim", admin_token="geheim", secret="geheim"))
    assert "geheim" not in shown


def test_gunicorns_workers_start_no_database_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/27.0.1")
    monkeypatch.delenv("MICROBATCH_DSN", raising=False)
    with pytest.raises(ServiceError, match="set MICROBATCH_DSN"):
        create_app()


# Ids.


def test_an_id_is_read_by_who_shares_the_secret() -> None:
    made = Ids(b"secret", clock=lambda: 1_000_000.5).new()
    read = Ids(b"secret", clock=lambda: 1_000_010.5).read(made.text)

    assert read == made
    assert (made.made, made.is_own, len(made.text)) == (1_000_000.5, True, 56)
    assert Ids(b"secret", clock=lambda: 1_000_010.5).age(made) == 10
    assert Ids(b"other").read(made.text) is None


def test_no_two_ids_share_their_random_part() -> None:
    ids = Ids(b"secret", clock=lambda: 1.0)
    randoms = {base64.urlsafe_b64decode(ids.new().text)[:16] for _ in range(1000)}
    assert len(randoms) == 1000


def test_every_changed_character_makes_an_id_foreign() -> None:
    ids = Ids(b"secret")
    text = ids.new().text
    for place, character in enumerate(text):
        other = "A" if character != "A" else "B"
        assert ids.read(text[:place] + other + text[place + 1 :]) is None
    for wrong in ("", text[:-1], text + "A", text + "=", text + "\n", " " + text, text.swapcase(), "é" * 56, text[:-4]):
        assert ids.read(wrong) is None


def test_P7_a_forked_child_makes_ids_of_its_own() -> None:
    ids = Ids(b"secret")
    parents = ids.new()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover
        os.write(writing, f"{ids.new().text} {parents.is_own}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        text, own = told.read().split()
    os.waitpid(child, 0)
    found = ids.read(text)
    assert found is not None
    assert (found.is_own, own, parents.is_own) == (False, "False", True)


# What a process knows.


def ticket(name: str, outcome: Any = None) -> Ticket:
    """A job that is over: completed, or failed with *outcome*."""

    def process(batch: Any) -> list[Any]:
        return [outcome or "{}" for _ in batch]

    with InlineBatcher(process) as batcher:
        future = batcher.submit(name)
        batcher.flush()
    return Ticket(name, future, "client")


def never(request: Request) -> bool:
    return False


def test_so_many_finished_jobs_are_known() -> None:
    known = Known(history=3, ttl=60)
    assert known.enter("client", 5, most=5)
    for number in range(5):
        known.add(ticket(str(number)))
    assert [known.find(str(number)) is not None for number in range(5)] == [False, False, True, True, True]


@pytest.mark.parametrize("before", ["nothing", "a failure"])
def test_a_key_is_reserved_once_however_many_ask(before: str) -> None:
    known, got = Known(history=3, ttl=60), []
    barrier = threading.Barrier(8)
    if before == "a failure":
        assert known.reserve(b"key", b"body", never) is None
        known.keep(b"key", Request(b"body", (ticket("x", ValueError("bad")),)))

    def ask() -> None:
        barrier.wait(10)
        got.append(known.reserve(b"key", b"body", lambda request: is_free(request, unknown_too=False)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [request for request in got if request is None] == [None]


def test_keys_of_jobs_under_way_are_never_forgotten() -> None:
    known = Known(history=2, ttl=60)
    pending: Any = Future()
    under_way = Ticket("under way", pending, "client")
    for number in range(5):
        key = bytes([number])
        assert known.reserve(key, b"", never) is None
        known.keep(key, Request(b"", (under_way if number == 0 else ticket(str(number)),)))
    assert known.reserve(b"\0", b"", never) is not None
    pending.set_result("{}")
    assert known.reserve(b"x", b"", never) is None
    known.keep(b"x", Request(b"", (ticket("x"),)))
    assert known.reserve(b"\0", b"", never) is None, "now it may go"


@pytest.mark.parametrize(
    ("outcome", "free", "free_in_a_shared_store"),
    [
        (None, False, False),
        (ValueError("bad"), True, True),
        (OutcomeUnknown("?"), False, True),
    ],
)
def test_a_key_is_free_after_what_left_nothing(outcome: Any, free: bool, free_in_a_shared_store: bool) -> None:
    request = Request(b"", (ticket("x", outcome),))
    assert is_free(request, unknown_too=False) is free
    assert is_free(request, unknown_too=True) is free_in_a_shared_store


def test_clients_that_are_done_are_forgotten() -> None:
    known = Known(history=3, ttl=60)
    assert known.enter("a", 3, most=3)
    assert not known.enter("a", 1, most=3)
    assert known.enter("b", 1, most=3)
    known.leave("a", 3)
    known.leave("b", 1)
    assert not known._clients
    assert known.enter("a", 3, most=3)


def test_whoever_tells_of_an_end_may_count_it_before_the_callback_does() -> None:
    known = Known(history=3, ttl=60)
    pending: Any = Future()
    job = Ticket("job", pending, "client")
    assert known.enter("client", 2, most=2)
    known.add(job)
    known.finish(job)
    assert known.enter("client", 1, most=2)
    pending.set_result("{}")
    assert known.find("job") is job
    assert not known.enter("client", 1, most=2), "counted once"


# Failures.


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (psycopg.errors.UniqueViolation("(7) exists"), "conflict"),
        (psycopg.errors.CheckViolation("row (7)"), "refused"),
        (psycopg.errors.InvalidTextRepresentation('"7"'), "refused"),
        (psycopg.errors.RaiseException("7"), "refused"),
        (psycopg.DataError("7"), "refused"),
        (psycopg.OperationalError("host 7 is away"), "not-written"),
        (psycopg.errors.LockNotAvailable("7"), "not-written"),
        (psycopg.errors.UndefinedTable("7"), "not-written"),
        (DeliveryTimeout("7"), "not-written"),
        (BatcherClosed("7"), "not-written"),
        (OutcomeUnknown("7"), "unknown"),
        (RuntimeError("7"), "not-written"),
    ],
)
def test_a_failure_says_what_it_is_and_quotes_nothing(error: Exception, kind: str) -> None:
    failure = failure_of(error)
    assert failure.error == kind
    assert "7" not in failure.message
    assert failure.sqlstate == getattr(error, "sqlstate", None)
    assert HTTP_STATUS[failure.error]


def test_an_unheard_of_sqlstate_is_shown_as_it_is() -> None:
    error = type("Custom", (psycopg.DatabaseError,), {"sqlstate": "P0999"})("secret")
    assert failure_of(error) == Failure("refused", "The database refused the row: SQLSTATE P0999.", "P0999", None)


def test_a_store_that_does_not_answer_is_asked_once(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def settle(job_id: str, failure: Failure) -> None:
        asked.append(job_id)
        raise DeliveryTimeout

    jobs = app.extensions["microbatch.jobs"]
    monkeypatch.setattr(jobs.store, "settle", settle)
    answers = jobs.wait([ticket(str(number), OutcomeUnknown("?")) for number in range(5)], 1.0)

    assert [answer.status for answer in answers] == ["unknown"] * 5
    assert asked == ["0"]


# Tables.


@pytest.fixture(scope="module")
def tables(shared_database: str) -> str:
    with psycopg.connect(shared_database) as connection:
        connection.execute(
            """
            CREATE SCHEMA "Odd";
            CREATE TABLE "Odd"."Na""me" ("a b" int, "c)" text, "Ü" varchar(3) NOT NULL, "id" serial PRIMARY KEY);
            CREATE DOMAIN cents AS numeric(8, 2) NOT NULL;
            CREATE TABLE typed (d cents, at timestamp DEFAULT now(), j jsonb, made int GENERATED ALWAYS AS (1) STORED);
            CREATE TABLE "per%cent" (a int);
            CREATE TABLE "per" ("a%" int);
            CREATE SEQUENCE sequence
            """
        )
    return shared_database


def test_odd_names_are_written_to(make_app: Any, tables: str) -> None:
    client = make_app(table='"Odd"."Na""me"').test_client()
    answer = client.post("/submit-job?wait=20", json={"a b": 5, "c)": None, "Ü": "x"}).get_json()
    assert answer["result"] == {"a b": 5, "c)": None, "Ü": "x", "id": 1}

    client = make_app(table='"Odd"."Na""me"', columns=["Ü"]).test_client()
    answer = client.post("/submit-job?wait=20", json={"Ü": "y"}).get_json()
    assert answer["result"] == {"a b": None, "c)": None, "Ü": "y", "id": 2}


def test_domains_and_timestamps_without_a_zone(make_app: Any, tables: str) -> None:
    app: Flask = make_app(table="typed", columns=["d", "j"])
    client = app.test_client()
    response = client.post("/submit-job?wait=20", json={"d": 1.5, "j": {"a": [1, 2.5, None]}})
    row = response.get_json()["result"]

    assert '"d":1.50,' in response.text
    assert (row["j"], row["made"]) == ({"a": [1, 2.5, None]}, 1)
    assert row["at"][-6] in "+-", "an instant, with its offset"
    assert client.post("/submit-job", json={"d": None, "j": 1}).status_code == 400
    assert client.post("/submit-job", json={"d": 1_000_000, "j": 1}).status_code == 400


@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        ("a\0b", None, "NUL"),
        ("x" * 64, None, "63 bytes"),
        ('"per%cent"', None, "%"),
        ("per", None, "%"),
        ("sequence", None, "is no table"),
        ("nowhere", None, "there is no table"),
        ("payments; DROP TABLE typed", None, "there is no table"),
        ("a.b.c.d", None, "there is no table"),
        ("typed", ["d", "d"], "more than once"),
        ("typed", ["d", "x"], "has no column x"),
        ("typed", ["d", "made"], "generates made"),
        ("typed", ["j"], "lacks d"),
        ("typed", [], "no column to write"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_at_start(
    tables: str, name: str, columns: list[str] | None, said: str
) -> None:
    with psycopg.connect(tables, autocommit=True) as connection, pytest.raises(ServiceError, match=said):
        find_table(connection, name, columns)


def test_a_submission_shows_its_row() -> None:
    submission = Submission("id", ("a", "b"), ("1", None))
    assert submission.row() == {"a": "1", "b": None}
