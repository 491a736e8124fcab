"""The routes, by Flask's own client on a real database."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient

from service.answers import ACCEPTED, AS_ADMIN, JOB, assert_problem, rows_of


def test_a_job_is_accepted_and_followed_to_its_row(client: FlaskClient, app: Flask) -> None:
    accepted = client.post("/submit-job", json=JOB)
    assert accepted.status_code == 202
    body = accepted.get_json()
    assert body == {"jobId": body["jobId"], "message": ACCEPTED}
    assert accepted.headers["Location"] == f"/job-status/{body['jobId']}"

    assert app.extensions["microbatch"].flush(10)
    told = client.get(f"/job-status/{body['jobId']}")
    assert told.status_code == 200
    status = told.get_json()
    assert status.keys() == {"jobId", "status", "result"}
    assert (status["jobId"], status["status"]) == (body["jobId"], "completed")
    row = status["result"]
    assert list(row) == ["id", "user_id", "amount", "status", "transaction_date"]
    assert {name: row[name] for name in JOB} == JOB
    assert '"amount":100.00,' in told.text, "with the digits that are stored"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d:\d\d", row["transaction_date"])
    # PostgreSQL drops the zeros at the end, and `fromisoformat` of Python 3.10 wants three or six digits.
    written = datetime.fromisoformat(re.sub(r"\.\d+", "", row["transaction_date"]))
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=5)


def test_wait_answers_with_the_row_after_the_commit(client: FlaskClient, shared_database: str) -> None:
    response = client.post("/submit-job?wait=20", json={**JOB, "user_id": 77})

    assert response.status_code == 200
    body = response.get_json()
    assert (body["status"], body["result"]["user_id"]) == ("completed", 77)
    assert rows_of(shared_database, 77) == [body["result"]["id"]]


def test_wait_answers_with_202_when_the_time_is_over(client: FlaskClient, shared_database: str) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("LOCK TABLE payment_transactions IN EXCLUSIVE MODE")
        response = client.post("/submit-job?wait=0.05", json=JOB)
        pending = client.get(f"/job-status/{response.get_json()['jobId']}").get_json()

    assert (response.status_code, response.get_json()["message"]) == (202, ACCEPTED)
    assert pending["status"] in ("pending", "processing")
    assert pending["result"] is None


def test_an_array_submits_many_and_answers_in_its_order(client: FlaskClient) -> None:
    jobs = [{**JOB, "user_id": number} for number in range(100, 150)]

    accepted = client.post("/submit-job", json=jobs)
    assert accepted.status_code == 202
    assert [item["message"] for item in accepted.get_json()] == [ACCEPTED] * 50

    waited = client.post("/submit-job?wait=20", json=jobs)
    assert waited.status_code == 200
    assert [item["result"]["user_id"] for item in waited.get_json()] == list(range(100, 150))


def test_a_job_that_is_refused_for_one_of_its_columns_names_it(
    make_app: Callable[..., Flask], shared_database: str
) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("CREATE TYPE mood AS ENUM ('good'); CREATE TABLE moods (n int UNIQUE, mood mood NOT NULL)")
    client = make_app(table="moods", columns=["n", "mood"]).test_client()

    for job, column in (
        ({"n": 1, "mood": "so-so"}, "mood"),
        ({"n": 1, "mood": "good"}, None),
        ({"n": 1, "mood": "good"}, "n"),
    ):
        answer = client.post("/submit-job?wait=20", json=job)
        assert answer.status_code == {None: 200, "n": 409}.get(column, 422)
        assert column is None or answer.get_json()["result"]["column"] == column


def test_a_job_that_the_database_refuses_fails_alone_and_says_why(
    make_app: Callable[..., Flask], shared_database: str
) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute(
            "CREATE TABLE payments (id int GENERATED ALWAYS AS IDENTITY,"
            " n int CONSTRAINT not_seven CHECK (n <> 7), u text UNIQUE)"
        )
    client = make_app(table="payments", columns=["n", "u"]).test_client()

    refused = client.post("/submit-job?wait=20", json={"n": 7, "u": "a"})
    problem = assert_problem(refused, 422, "refused")
    assert problem["result"] == {
        "error": "refused",
        "message": "The database refused the row: check violation.",
        "sqlstate": "23514",
        "constraint": "not_seven",
    }
    told = client.get(f"/job-status/{problem['jobId']}").get_json()
    assert told == {"jobId": problem["jobId"], "status": "failed", "result": problem["result"]}

    assert client.post("/submit-job?wait=20", json={"n": 1, "u": "b"}).status_code == 200
    twice = client.post("/submit-job?wait=20", json={"n": 1, "u": "b"})
    assert assert_problem(twice, 409, "conflict")["result"]["sqlstate"] == "23505"

    mixed = client.post("/submit-job?wait=20", json=[{"n": 7, "u": "c"}, {"n": 2, "u": "d"}]).get_json()
    assert [item["status"] for item in mixed] == ["failed", "completed"]


def test_values_reach_neither_an_answer_nor_a_log(
    make_app: Callable[..., Flask], shared_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("CREATE TABLE diary (entry text UNIQUE CHECK (entry NOT LIKE 'geheim-x%'), day date)")
    client = make_app(table="diary").test_client()
    caplog.set_level("DEBUG")
    jobs = [
        {"entry": "geheim-x1", "day": None},
        {"entry": "geheim-y", "day": None},
        {"entry": "geheim-y", "day": None},
        {"entry": "z", "day": "geheim-day"},
    ]

    told = client.post("/submit-job?wait=20", json=jobs).get_json()

    assert [job["status"] for job in told] == ["failed", "completed", "failed", "failed"]
    assert [job["result"]["sqlstate"] for job in told if job["status"] == "failed"] == ["23514", "23505", "22007"]
    failed = json.dumps([job for job in told if job["status"] == "failed"])
    assert "geheim" not in failed
    assert "INSERT" not in failed
    assert "geheim" not in caplog.text


def test_after_the_shutdown_submits_are_refused_and_the_rest_answers(make_app: Callable[..., Flask]) -> None:
    app = make_app()
    client = app.test_client()
    accepted = client.post("/submit-job", json=JOB).get_json()
    assert client.get("/readyz").get_json() == {"status": "ready"}

    for _ in range(2):
        response = client.post("/shutdown", headers=AS_ADMIN)
        assert (response.status_code, response.get_json()) == (200, {"message": "System shut down successfully."})

    assert app.extensions["microbatch"].stats().outstanding == 0
    assert client.get(f"/job-status/{accepted['jobId']}").get_json()["status"] == "completed"
    refused = client.post("/submit-job", json=JOB)
    assert_problem(refused, 503, "shut-down")
    assert refused.headers["Retry-After"]
    assert_problem(client.get("/readyz"), 503, "not-ready")
    assert client.get("/healthz").get_json() == {"status": "ok"}


def test_one_of_several_workers_does_not_shut_down_alone(make_app: Callable[..., Flask]) -> None:
    client = make_app().test_client()

    refused = client.post("/shutdown", headers=AS_ADMIN, environ_overrides={"wsgi.multiprocess": True})

    assert "SIGTERM" in assert_problem(refused, 409, "several-workers")["detail"]
    assert client.post("/submit-job?wait=20", json=JOB).status_code == 200


@pytest.mark.parametrize("job_id", ["x", "a" * 56, "%00", "é", "a/b"])
def test_an_id_that_never_was_is_not_found(client: FlaskClient, job_id: str) -> None:
    assert client.get(f"/job-status/{job_id}").status_code == 404


def test_an_id_of_another_service_is_not_found(client: FlaskClient, make_app: Callable[..., Flask]) -> None:
    other = make_app(secret="another").test_client()
    job_id = other.post("/submit-job", json=JOB).get_json()["jobId"]

    foreign = client.get(f"/job-status/{job_id}")
    assert_problem(foreign, 404, "job-not-found")
    assert foreign.get_json() == client.get("/job-status/x").get_json(), "and looks the same as one that never was"


def test_what_is_not_there_is_a_problem_too(client: FlaskClient) -> None:
    assert_problem(client.get("/nowhere"), 404, "not-found")
    response = client.get("/submit-job")
    assert_problem(response, 405, "method-not-allowed")
    assert set(response.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}


def test_the_document_is_json(client: FlaskClient) -> None:
    document = json.loads(client.get("/openapi.json").text)
    assert set(document["paths"]) >= {"/submit-job", "/job-status/{jobId}", "/shutdown", "/healthz", "/readyz"}


def test_from_the_first_moment_of_a_shutdown_no_job_is_taken(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    jobs = app.extensions["microbatch.jobs"]
    shutdown, answers = jobs.batcher.shutdown, []

    def late(**options: Any) -> Any:
        answers.append(app.test_client().post("/submit-job", json=JOB))
        return shutdown(**options)

    monkeypatch.setattr(jobs.batcher, "shutdown", late)
    assert jobs.shutdown().finished
    assert_problem(answers[0], 503, "shut-down")
