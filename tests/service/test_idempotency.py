"""One key, one row: whichever process is met, whatever is under way, and however often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from flask import Flask

from service.answers import JOB, assert_problem, rows_of


def post(app: Flask, key: str, body: Any, wait: str = "?wait=20") -> Any:
    return app.test_client().post(f"/submit-job{wait}", json=body, headers={"Idempotency-Key": key})


@pytest.fixture(scope="module")
def workers(make_app: Callable[..., Flask]) -> list[Flask]:
    """Two applications that share a database, and nothing else: as two processes do."""
    return [make_app(), make_app()]


@pytest.mark.parametrize("second", [0, 1], ids=["same worker", "other worker"])
def test_a_repeated_request_is_answered_and_not_written_again(
    workers: list[Flask], shared_database: str, second: int
) -> None:
    job = {**JOB, "user_id": 300 + second}
    first = post(workers[0], f"repeat-{second}", job).get_json()
    again = post(workers[second], f"repeat-{second}", job)

    assert again.status_code == 200
    assert again.get_json() == first
    assert rows_of(shared_database, job["user_id"]) == [first["result"]["id"]]
    accepted = post(workers[second], f"repeat-{second}", job, wait="")
    assert (accepted.status_code, accepted.get_json()["jobId"]) == (202, first["jobId"])


@pytest.mark.parametrize("second", [0, 1], ids=["same worker", "other worker"])
def test_another_body_under_the_same_key_is_refused(workers: list[Flask], shared_database: str, second: int) -> None:
    job = {**JOB, "user_id": 310 + second}
    assert post(workers[0], f"other-{second}", job).status_code == 200

    for wait in ("", "?wait=20"):
        refused = post(workers[second], f"other-{second}", {**job, "amount": 5}, wait)
        assert_problem(refused, 422, "idempotency-key-reused")
    assert len(rows_of(shared_database, job["user_id"])) == 1


def test_the_order_of_keys_in_the_body_does_not_matter(workers: list[Flask]) -> None:
    first = post(workers[0], "order", {"user_id": 1, "amount": 2, "status": "x"}).get_json()
    again = post(workers[1], "order", {"status": "x", "amount": 2, "user_id": 1}).get_json()
    assert again == first


_HELD = """
    CREATE TABLE held (n int, body text);
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared(4711); RETURN new; END $$;
    CREATE TRIGGER hold BEFORE INSERT ON held FOR EACH ROW EXECUTE FUNCTION hold()"""


@pytest.fixture(scope="module")
def holding(make_app: Callable[..., Flask], shared_database: str) -> list[Flask]:
    """Two workers on a table whose inserts wait for an advisory lock: the statement has looked round by then."""
    with psycopg.connect(shared_database) as connection:
        connection.execute(_HELD)
    return [make_app(table="held") for _ in range(2)]


@pytest.mark.parametrize("bodies", [("a", "a"), ("b", "c")], ids=["same body", "another body"])
def test_both_workers_at_once_write_one_row(
    holding: list[Flask], shared_database: str, bodies: tuple[str, str]
) -> None:
    """Neither the service nor the statement has found the key in the store when both are about to write."""
    jobs = [{"n": ord(bodies[0]), "body": body} for body in bodies]
    with psycopg.connect(shared_database, autocommit=True) as connection, ThreadPoolExecutor(2) as pool:
        connection.execute("SELECT pg_advisory_lock(4711)")
        sent = [pool.submit(post, app, f"held-{bodies[0]}", job) for app, job in zip(holding, jobs, strict=True)]
        wait_for_locks(connection, 2)
        connection.execute("SELECT pg_advisory_unlock(4711)")
        answers = [each.result(30) for each in sent]
        count = connection.execute("SELECT count(*) FROM held WHERE n = %s", [ord(bodies[0])]).fetchone()

    assert count == (1,)
    if bodies[0] == bodies[1]:
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].get_json()["result"] == answers[1].get_json()["result"]
        for answer in answers:  # each id is found on each worker
            assert told_by_all(holding, answer.get_json()["jobId"]) == [answer.get_json()] * 2
    else:
        assert sorted(answer.status_code for answer in answers) == [200, 422]
        (refused,) = [answer for answer in answers if answer.status_code == 422]
        assert_problem(refused, 422, "idempotency-key-reused")
        for told in told_by_all(holding, refused.get_json()["jobId"]):
            assert (told["status"], told["result"]["error"]) == ("failed", "idempotency-key-reused")


def told_by_all(apps: list[Flask], job_id: str) -> list[Any]:
    return [app.test_client().get(f"/job-status/{job_id}").get_json() for app in apps]


def wait_for_locks(watch: psycopg.Connection[Any], count: int) -> None:
    give_up = threading.Event()
    for _ in range(1000):
        row = watch.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
        if row is not None and row[0] >= count:
            return
        give_up.wait(0.01)
    raise AssertionError("the statements do not meet")


def test_many_at_once_write_one_row_each(workers: list[Flask], shared_database: str) -> None:
    """Eight threads on each worker send the same twenty requests, in different orders."""

    def send_all(number: int) -> list[Any]:
        found = {}
        for step in range(20):
            key = (step * (number + 1)) % 20 if number % 2 else (19 - step)
            give_up = time.monotonic() + 60
            while True:
                answer = post(workers[number % 2], f"many-{key}", {**JOB, "user_id": 400 + key})
                if answer.status_code != 409 or time.monotonic() > give_up:  # it is being accepted at that moment
                    break
            assert answer.status_code == 200, answer.text
            found[key] = answer.get_json()["result"]["id"]
        return sorted(found.items())

    with ThreadPoolExecutor(8) as pool:
        seen = [dict(each) for each in pool.map(send_all, range(8))]

    for key in range(20):
        ids = rows_of(shared_database, 400 + key)
        assert len(ids) == 1
        assert {each[key] for each in seen if key in each} == set(ids)


def test_a_key_under_way_joins_what_is_under_way(workers: list[Flask], shared_database: str) -> None:
    job = {**JOB, "user_id": 330}
    with psycopg.connect(shared_database) as connection:
        connection.execute("LOCK TABLE payment_transactions IN EXCLUSIVE MODE")
        first = post(workers[0], "joined", job, wait="")
        second = post(workers[0], "joined", job, wait="")
        assert_problem(post(workers[0], "joined", {**job, "amount": 1}, wait=""), 422, "idempotency-key-reused")

    assert first.get_json() == second.get_json()
    third = post(workers[0], "joined", job)
    assert (third.status_code, third.get_json()["jobId"]) == (200, first.get_json()["jobId"])
    assert len(rows_of(shared_database, 330)) == 1


def test_a_key_whose_job_failed_is_free(make_app: Callable[..., Flask], shared_database: str) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("CREATE TABLE picky (n int CONSTRAINT too_early CHECK (n > 0))")
    apps = [make_app(table="picky"), make_app(table="picky")]
    for app in (apps[0], apps[0], apps[1]):
        assert_problem(post(app, "picky", {"n": 0}), 422, "refused")
    with psycopg.connect(shared_database) as connection:
        connection.execute("ALTER TABLE picky DROP CONSTRAINT too_early")
    assert post(apps[1], "picky", {"n": 0}).status_code == 200
    assert post(apps[0], "picky", {"n": 0}).status_code == 200
    with psycopg.connect(shared_database) as connection:
        assert connection.execute("SELECT count(*) FROM picky").fetchone() == (1,)


@pytest.mark.parametrize("second", [0, 1], ids=["same worker", "other worker"])
def test_an_array_has_one_key(workers: list[Flask], shared_database: str, second: int) -> None:
    users = [340 + 10 * second, 341 + 10 * second]
    jobs = [{**JOB, "user_id": user} for user in users]

    first = post(workers[0], f"array-{second}", jobs).get_json()
    again = post(workers[second], f"array-{second}", jobs).get_json()
    assert again == first
    for other in (jobs[:1], jobs[0], [*jobs, jobs[0]], jobs[::-1]):
        assert_problem(post(workers[second], f"array-{second}", other), 422, "idempotency-key-reused")
    assert [len(rows_of(shared_database, user)) for user in users] == [1, 1]


def test_in_memory_one_process_keeps_its_keys(make_app: Callable[..., Flask], shared_database: str) -> None:
    app = make_app(store="memory")
    job = {**JOB, "user_id": 360}

    answers = [post(app, "memory", job).get_json() for _ in range(3)]

    assert answers == [answers[0]] * 3
    assert_problem(post(app, "memory", {**job, "amount": 1}), 422, "idempotency-key-reused")
    assert rows_of(shared_database, 360) == [answers[0]["result"]["id"]]


def test_a_key_that_is_being_accepted_is_in_use(workers: list[Flask]) -> None:
    jobs = workers[0].extensions["microbatch.jobs"]
    asked, go_on = threading.Event(), threading.Event()
    find_keys = jobs.store.find_keys

    def slow(keys: Any) -> Any:
        asked.set()
        assert go_on.wait(30)
        return find_keys(keys)

    jobs.store.find_keys = slow
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(post, workers[0], "in-use", JOB)
            assert asked.wait(30)
            second = post(workers[0], "in-use", JOB)
            go_on.set()
            assert first.result(30).status_code == 200
    finally:
        go_on.set()
        del jobs.store.find_keys
    assert_problem(second, 409, "idempotency-key-in-use")
    assert second.headers["Retry-After"] == "1"
