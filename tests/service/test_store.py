"""Any worker process answers for any job, and what it says is true."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from flask import Flask
from proxy import Harm, Message, Once, Proxy, behind_commit, is_commit
from psycopg.conninfo import make_conninfo

from microbatch import RetryPolicy
from microbatch.service import ServiceError, create_app, store
from microbatch.service.failures import LOST, NotCompleted
from microbatch.service.ids import Ids
from microbatch.service.server import store_ddl
from microbatch.service.writer import Submission
from service.answers import JOB, assert_problem, rows_of


@pytest.fixture(scope="module")
def workers(make_app: Callable[..., Flask]) -> list[Flask]:
    """Two applications that share a database, as two processes do, and take one another for strangers."""
    return [make_app(), make_app()]


def submit(app: Flask, job: Any, wait: str = "?wait=20") -> Any:
    return app.test_client().post(f"/submit-job{wait}", json=job).get_json()


def told_by(app: Flask, job_id: str) -> Any:
    return app.test_client().get(f"/job-status/{job_id}")


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_completed_job_is_found_on_every_worker(workers: list[Flask]) -> None:
    for app in workers:
        answer = submit(app, JOB)
        assert [told_by(worker, answer["jobId"]).get_json() for worker in workers] == [answer, answer]


def test_a_pending_job_is_pending_on_every_worker(workers: list[Flask], shared_database: str) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("LOCK TABLE payment_transactions IN EXCLUSIVE MODE")
        job_id = submit(workers[0], JOB, wait="")["jobId"]
        other = told_by(workers[1], job_id).get_json()

    assert other == {"jobId": job_id, "status": "pending", "result": None}
    until(lambda: told_by(workers[1], job_id).get_json()["status"] == "completed")
    # Who wrote it may hear of its commit later than the others see it.
    until(lambda: told_by(workers[0], job_id).get_json() == told_by(workers[1], job_id).get_json())


def test_a_failed_job_is_failed_on_every_worker(make_app: Callable[..., Flask], shared_database: str) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("CREATE TABLE checked (n int CONSTRAINT positive CHECK (n > 0))")
    apps = [make_app(table="checked") for _ in range(2)]

    failed = apps[0].test_client().post("/submit-job?wait=20", json={"n": -1}).get_json()
    own = told_by(apps[0], failed["jobId"]).get_json()
    assert (own["status"], own["result"]["constraint"]) == ("failed", "positive")
    until(lambda: told_by(apps[1], failed["jobId"]).get_json()["status"] != "pending")
    assert told_by(apps[1], failed["jobId"]).get_json() == own


def test_a_row_and_its_entry_are_one_transaction(make_app: Callable[..., Flask], shared_database: str) -> None:
    """A trigger that fails at COMMIT undoes both; without it both are there, with one transaction's id."""
    with psycopg.connect(shared_database) as connection:
        connection.execute("CREATE TABLE both_or_none (n int)")
    app = make_app(table="both_or_none", delivery_timeout=5)
    answers = app.test_client().post("/submit-job?wait=20", json=[{"n": n} for n in range(20)]).get_json()

    with psycopg.connect(shared_database) as connection:
        rows = connection.execute("SELECT n, xmin::text FROM both_or_none ORDER BY n").fetchall()
        entries = connection.execute(
            "SELECT (result ->> 'n')::int, xmin::text FROM microbatch_status WHERE id = ANY(%s) ORDER BY 1",
            [[answer["jobId"] for answer in answers]],
        ).fetchall()
        assert [n for n, _ in rows] == list(range(20))
        assert entries == rows
        connection.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'the value is %', new.n; END $$"
        )
        connection.execute(
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON both_or_none"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail()"
        )
    refused = app.test_client().post("/submit-job?wait=20", json={"n": 4711})
    problem = assert_problem(refused, 422, "refused")
    assert problem["result"]["sqlstate"] == "P0001"
    assert "4711" not in refused.text
    assert told_by(app, problem["jobId"]).get_json()["status"] == "failed"


def aged_id(app: Flask, seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """An id that the service made so long ago, in a process that is gone."""
    ids: Ids = app.extensions["microbatch.jobs"]._ids
    with monkeypatch.context() as patch:
        patch.setattr(ids, "_clock", lambda: time.time() - seconds)
        return ids.new().text


@pytest.mark.parametrize("seconds", [0.0, 24.0])
def test_a_genuine_id_of_nobody_is_pending_while_it_can_be(
    workers: list[Flask], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    job_id = aged_id(workers[0], seconds, monkeypatch)
    assert told_by(workers[1], job_id).get_json() == {"jobId": job_id, "status": "pending", "result": None}


def test_a_job_whose_process_is_gone_is_lost_and_stays_so(
    workers: list[Flask], shared_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once anybody was told so, not even the process itself can write it any more."""
    job_id = aged_id(workers[0], 26.0, monkeypatch)
    lost = told_by(workers[1], job_id).get_json()
    assert (lost["status"], lost["result"]["error"]) == ("failed", LOST)

    late = Submission(job_id, ("user_id", "amount", "status"), ("1313", "1", "x"))
    with pytest.raises(NotCompleted, match="nothing was written"):
        workers[0].extensions["microbatch"].execute(late)
    assert rows_of(shared_database, 1313) == []
    assert [told_by(app, job_id).get_json() for app in workers] == [lost, lost]


def test_an_old_id_is_not_found(make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(status_ttl=100)
    assert_problem(told_by(app, aged_id(app, 101.0, monkeypatch)), 404, "job-not-found")


def test_old_entries_are_cleared_away_by_new_ones(make_app: Callable[..., Flask], shared_database: str) -> None:
    app = make_app(status_ttl=100)
    with psycopg.connect(shared_database) as connection:
        for age in (150, 250):
            connection.execute(
                "INSERT INTO microbatch_status (id, status, result, at) SELECT %(age)s || '-' || n, 'completed', '{}',"
                " now() - make_interval(secs => %(age)s) FROM generate_series(1, 30) n",
                {"age": age},
            )

    def left(age: int) -> int:
        with psycopg.connect(shared_database) as connection:
            row = connection.execute("SELECT count(*) FROM microbatch_status WHERE id LIKE %s", [f"{age}-%"]).fetchone()
        return int(row[0]) if row else 0

    submit(app, JOB)
    assert left(250) == 28, "two by one job"
    submit(app, [JOB] * 20)
    assert left(250) == 0
    assert left(150) == 30, "kept twice as long as promised"


def test_in_memory_outcomes_are_told_by_their_process(make_app: Callable[..., Flask], shared_database: str) -> None:
    app, other = make_app(store="memory"), make_app(store="memory")
    answer = submit(app, JOB)

    assert told_by(app, answer["jobId"]).get_json() == answer
    assert_problem(told_by(other, answer["jobId"]), 404, "job-not-found")
    with psycopg.connect(shared_database) as connection:
        found = connection.execute("SELECT FROM microbatch_status WHERE id = %s", [answer["jobId"]]).fetchall()
    assert found == []


def test_in_memory_several_processes_are_refused(make_app: Callable[..., Flask]) -> None:
    client = make_app(store="memory").test_client()
    refused = client.post("/submit-job", json=JOB, environ_overrides={"wsgi.multiprocess": True})
    assert_problem(refused, 503, "store-not-shared")


def test_in_memory_so_many_outcomes_are_remembered(make_app: Callable[..., Flask]) -> None:
    app = make_app(store="memory", history=5)
    answers = [submit(app, JOB) for _ in range(8)]

    codes = [told_by(app, answer["jobId"]).status_code for answer in answers]
    assert codes == [404] * 3 + [200] * 5


def test_outcomes_that_this_process_forgot_are_in_the_store(make_app: Callable[..., Flask]) -> None:
    app = make_app(history=0)
    answers = [submit(app, JOB) for _ in range(3)]
    assert [told_by(app, answer["jobId"]).get_json() for answer in answers] == answers


def test_a_role_needs_no_more_than_it_is_said_to(database: str) -> None:
    name = f"microbatch_{secrets.token_hex(4)}"
    with psycopg.connect(database, autocommit=True) as owner:
        try:
            owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'role'".encode())
        except psycopg.errors.InsufficientPrivilege:
            pytest.skip("this server's user may not create roles")
        owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        owner.execute("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, n int)")
        owner.execute(f"GRANT SELECT, INSERT ON orders TO {name}".encode())
        role = make_conninfo(database, user=name, password="role")
        try:
            with pytest.raises(ServiceError, match="init-db --service"):
                create_app(role, table="orders")
            printed = store_ddl()
            assert "GRANT SELECT, INSERT, UPDATE, DELETE ON microbatch_status, microbatch_secret TO ...;" in printed
            owner.execute(printed.replace("-- For the role of the service: ", "").replace("...", name).encode())
            app = create_app(role, table="orders")
            answer = submit(app, {"n": 5})
            assert (answer["status"], answer["result"]) == ("completed", {"id": 1, "n": 5})
            app.extensions["microbatch.jobs"].shutdown()
        finally:
            owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


# A database that does not answer.


class Early(RetryPolicy):
    """No attempt is under way when the deadline comes."""

    def delay(self, attempts: int, draw: Any = None) -> float:
        return 0.05 if attempts < 5 else 60.0


@pytest.fixture
def proxied(shared_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Flask]]:
    """An application whose way to the database can be cut."""
    monkeypatch.setattr(store, "_READ_SECONDS", 1.0)
    with Proxy(shared_database) as proxy:
        app = create_app(proxy.conninfo, delivery_timeout=1.5, retry=Early())
        yield proxy, app
        proxy.refuses, proxy.plan = False, None
        app.extensions["microbatch.jobs"].shutdown()


def cut(proxy: Proxy) -> None:
    proxy.refuses, proxy.plan = True, lambda message: Harm.CUT


def mend(proxy: Proxy) -> None:
    proxy.refuses, proxy.plan = False, None


def test_without_its_database_the_service_says_so_and_recovers(
    proxied: tuple[Proxy, Flask], workers: list[Flask]
) -> None:
    proxy, app = proxied
    client = app.test_client()
    foreign = submit(workers[0], JOB)
    assert submit(app, JOB)["status"] == "completed"
    assert client.get("/readyz").status_code == 200

    cut(proxy)
    assert_problem(client.get("/readyz"), 503, "not-ready")
    assert client.get("/healthz").status_code == 200
    assert_problem(told_by(app, foreign["jobId"]), 503, "database-away")
    waiting = client.post("/submit-job", json=JOB).get_json()["jobId"]
    until(lambda: app.extensions["microbatch"].stats().consecutive_failures >= 3)
    refused = client.post("/submit-job", json=JOB)
    assert_problem(refused, 503, "database-away")
    assert refused.headers["Retry-After"]
    until(lambda: told_by(app, waiting).get_json()["status"] == "failed")
    failure = told_by(app, waiting).get_json()["result"]
    assert failure["error"] == "not-written"
    assert "127.0.0.1" not in failure["message"]

    mend(proxy)
    until(lambda: client.post("/submit-job?wait=20", json=JOB).status_code == 200)
    assert client.get("/readyz").status_code == 200
    assert told_by(app, foreign["jobId"]).get_json() == foreign
    until(lambda: told_by(workers[1], waiting).get_json()["status"] == "failed")


def test_wait_says_that_nothing_was_written_and_when_to_try_again(proxied: tuple[Proxy, Flask]) -> None:
    proxy, app = proxied
    cut(proxy)
    response = app.test_client().post("/submit-job?wait=20", json=JOB)
    problem = assert_problem(response, 503, "not-written")
    assert (response.headers["Retry-After"], problem["result"]["sqlstate"]) == ("1", None)


@pytest.mark.parametrize("harm", [Harm.CUT, Harm.CUT_BEHIND])
def test_a_commit_without_an_answer_is_looked_up(
    proxied: tuple[Proxy, Flask], shared_database: str, workers: list[Flask], harm: Harm
) -> None:
    proxy, app = proxied
    user = 500 if harm is Harm.CUT else 501
    submit(app, JOB)  # connections are made
    proxy.plan = Once(behind_commit(), harm)

    answer = submit(app, {**JOB, "user_id": user})

    assert answer["status"] == "completed"
    assert rows_of(shared_database, user) == [answer["result"]["id"]]
    assert told_by(workers[0], answer["jobId"]).get_json() == answer


@pytest.mark.parametrize("is_written", [False, True], ids=["COMMIT is lost", "its answer is lost"])
def test_an_unknown_job_is_decided_when_the_database_is_back(
    proxied: tuple[Proxy, Flask], shared_database: str, workers: list[Flask], is_written: bool
) -> None:
    """COMMIT is carried out or not, and nobody hears of it before the deadline; the store knows in the end."""
    proxy, app = proxied
    user = 511 if is_written else 510
    submit(app, JOB)
    once = Once(behind_commit(), Harm.STALL_BEHIND) if is_written else Once(is_commit, Harm.STALL)

    def silent(message: Message) -> Harm | None:
        return once(message) or (Harm.STALL if once.fired.is_set() else None)

    proxy.plan = silent
    response = app.test_client().post("/submit-job?wait=20", json={**JOB, "user_id": user})
    problem = assert_problem(response, 504, "unknown")
    mend(proxy)

    def decided() -> bool:
        return bool(told_by(app, problem["jobId"]).get_json().get("status") in ("completed", "failed"))

    until(decided)
    said = told_by(workers[0], problem["jobId"]).get_json()
    assert told_by(app, problem["jobId"]).get_json() == said
    written = rows_of(shared_database, user)
    assert said["status"] == ("completed" if is_written else "failed")
    assert written == ([said["result"]["id"]] if is_written else [])
