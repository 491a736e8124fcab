"""Who is let in, and what a browser is told; one request each, by Flask's own client."""

from __future__ import annotations

import base64
import hmac
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from microbatch.service import ServiceError, create_app
from microbatch.service.known import Known, Ticket
from microbatch.service.security import is_loopback
from service.answers import ADMIN, AS_ADMIN, JOB, assert_problem

TOKEN = "the-token-of-the-tests"


@pytest.fixture(scope="module")
def guarded(make_app: Callable[..., Flask]) -> Flask:
    """An application with a token."""
    return make_app(token=TOKEN, allowed_hosts=["shop.example"])


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}


# Tokens.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Digest {TOKEN}"},
        {"Authorization": "Basic !"},
        {"Authorization": "Basic " + base64.b64encode(b"\xff").decode()},
        basic("wrong"),
        {"Cookie": f"token={TOKEN}"},
    ],
)
def test_without_the_token_nothing_is_told(guarded: Flask, headers: dict[str, str]) -> None:
    client = guarded.test_client()
    for method, path in [
        ("POST", "/submit-job"),
        ("GET", "/job-status/x"),
        ("POST", "/shutdown"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ]:
        response = client.open(path, method=method, headers=headers, json=JOB if method == "POST" else None)
        assert_problem(response, 401, "unauthorized")
        assert "Bearer" in response.headers["WWW-Authenticate"]
    assert client.get("/healthz", headers=headers).status_code == 200
    assert client.get("/readyz", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer {TOKEN}"}, basic(TOKEN), AS_ADMIN]
)
def test_the_token_opens(guarded: Flask, headers: dict[str, str]) -> None:
    assert guarded.test_client().post("/submit-job?wait=20", json=JOB, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": f"Bearer {TOKEN}"}, basic("wrong"), {"Authorization": "Bearer é"}]
)
def test_a_shutdown_wants_the_admin_token(guarded: Flask, client: FlaskClient, headers: dict[str, str]) -> None:
    assert_problem(client.post("/shutdown", headers=headers), 401, "unauthorized")
    assert_problem(guarded.test_client().post("/shutdown", headers=headers), 401, "unauthorized")
    assert client.post("/submit-job?wait=20", json=JOB).status_code == 200


def test_an_admin_token_is_made_where_none_is_given(make_app: Callable[..., Flask], shared_database: str) -> None:
    made = {create_app(shared_database).extensions["microbatch.admin_token"] for _ in range(2)}
    assert len(made) == 2
    assert min(map(len, made)) >= 40


@pytest.mark.parametrize("token", ["", "two words", "ä", "new\nline"])
def test_a_token_that_no_header_can_carry_is_refused(shared_database: str, token: str) -> None:
    with pytest.raises(ServiceError, match="token must be") as refused:
        create_app(shared_database, token=token)
    assert not token or token not in str(refused.value)


# Where requests come from.


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1", "::ffff:10.0.0.1"])
def test_without_a_token_other_machines_are_refused(
    make_app: Callable[..., Flask], client: FlaskClient, address: str
) -> None:
    remote = {"REMOTE_ADDR": address}
    assert_problem(client.post("/submit-job", json=JOB, environ_overrides=remote), 403, "not-local")
    assert client.get("/healthz", environ_overrides=remote).status_code == 200


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP"])
def test_without_a_token_whom_a_proxy_speaks_for_is_refused(
    make_app: Callable[..., Flask], client: FlaskClient, header: str
) -> None:
    forwarded = client.post("/submit-job", json=JOB, headers={header: "127.0.0.1"})
    assert_problem(forwarded, 403, "not-local")


def test_insecure_lets_other_machines_in(make_app: Callable[..., Flask]) -> None:
    client = make_app(insecure=True).test_client()
    response = client.post("/submit-job?wait=20", json=JOB, environ_overrides={"REMOTE_ADDR": "10.0.0.1"})
    assert response.status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_what_is_the_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example"])
def test_what_is_not(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "a b", "10.0.0.1"],
)
def test_a_foreign_host_is_refused(client: FlaskClient, host: str) -> None:
    assert_problem(client.post("/submit-job", json=JOB, headers={"Host": host}), 403, "foreign-host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "127.0.0.1:3000", "[::1]:3000", "shop.example"])
def test_own_names_are_answered(guarded: Flask, host: str) -> None:
    headers = {"Host": host, "Authorization": f"Bearer {TOKEN}"}
    assert guarded.test_client().get("/openapi.json", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_sites_pages_are_refused(client: FlaskClient, headers: dict[str, str]) -> None:
    for path in ("/submit-job", "/shutdown"):
        response = client.post(path, json=JOB, headers={**headers, **AS_ADMIN})
        assert_problem(response, 403, "foreign-origin")
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
)
def test_own_pages_are_answered(client: FlaskClient, headers: dict[str, str]) -> None:
    assert client.post("/submit-job?wait=20", json=JOB, headers=headers).status_code == 200


def test_no_preflight_is_granted(client: FlaskClient) -> None:
    headers = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}
    response = client.options("/submit-job", headers=headers)
    assert not [name for name, _ in response.headers if name.lower().startswith("access-control")]


# Bodies.


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"]
)
def test_only_json_is_read(client: FlaskClient, kind: str | None) -> None:
    response = client.post("/submit-job", data='{"user_id": 1, "amount": 1, "status": "x"}', content_type=kind)
    assert_problem(response, 415, "unsupported-media-type")


def test_a_charset_is_overlooked(client: FlaskClient) -> None:
    body = '{"user_id": 1, "amount": 1, "status": "é"}'.encode()
    response = client.post("/submit-job?wait=20", data=body, content_type="application/json; charset=utf-8")
    assert response.get_json()["result"]["status"] == "é"


def test_a_packed_body_is_not_unpacked(client: FlaskClient) -> None:
    response = client.post("/submit-job", json=JOB, headers={"Content-Encoding": "gzip"})
    assert_problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("size", [256 * 1024 + 1, 20 * 1024 * 1024])
def test_a_large_body_is_refused(client: FlaskClient, size: int) -> None:
    response = client.post("/submit-job", data=b" " * size, content_type="application/json")
    assert_problem(response, 413, "request-entity-too-large")


def test_a_body_of_just_256_kib_is_read(client: FlaskClient) -> None:
    body = b'{"user_id": 1, "amount": 1, "status": "x"}'.ljust(256 * 1024)
    assert client.post("/submit-job?wait=20", data=body, content_type="application/json").status_code == 200


def test_a_large_body_of_unknown_length_is_refused(client: FlaskClient) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def tell(self) -> int:
            return 0

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            assert self.given < 10**6, "read far beyond the limit"
            buffer[:] = b" " * len(buffer)
            return len(buffer)

    response = client.post(
        "/submit-job",
        content_type="application/json",
        input_stream=Endless(),
        environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
    )
    assert_problem(response, 413, "request-entity-too-large")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "1 to 1000"),
        ([JOB] * 1001, "1 to 1000"),
        ("x", "object"),
        (5, "object"),
        ([[JOB]], "object"),
        ({**JOB, "id": 7}, '"id"'),
        ({**JOB, 'x"; DROP TABLE payment_transactions; --': 7}, "Unknown"),
        ({"user_id": 1, "amount": 1}, '"status"'),
        ({**JOB, "user_id": "1"}, '"user_id"'),
        ({**JOB, "user_id": 1.5}, '"user_id"'),
        ({**JOB, "user_id": True}, '"user_id"'),
        ({**JOB, "user_id": None}, '"user_id"'),
        ({**JOB, "user_id": 2**31}, '"user_id"'),
        ({**JOB, "amount": "1e3"}, '"amount"'),
        ({**JOB, "amount": "1.999"}, '"amount"'),
        ({**JOB, "amount": 100_000_000}, '"amount"'),
        ({**JOB, "amount": []}, '"amount"'),
        ({**JOB, "status": "x" * 51}, '"status"'),
        ({**JOB, "status": {}}, '"status"'),
        ([JOB, {**JOB, "status": 5}], "Job 1"),
    ],
)
def test_what_does_not_fit_the_table_is_refused(client: FlaskClient, app: Flask, body: Any, said: str) -> None:
    before = app.extensions["microbatch"].stats().submitted
    response = client.post("/submit-job", json=body)

    assert said in assert_problem(response, 400, "bad-request")["detail"]
    assert app.extensions["microbatch"].stats().submitted == before


@pytest.mark.parametrize(
    "query", ["wait=", "wait=x", "wait=-1", "wait=61", "wait=nan", "wait=1&wait=2", "wiat=1", "wait=7e1", "wait=1e999"]
)
def test_a_bad_query_is_refused(client: FlaskClient, query: str) -> None:
    assert_problem(client.post(f"/submit-job?{query}", json=JOB), 400, "bad-request")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é"])
def test_a_bad_key_is_refused(client: FlaskClient, key: str) -> None:
    assert_problem(client.post("/submit-job", json=JOB, headers={"Idempotency-Key": key}), 400, "bad-request")


# Limits.


def test_one_client_has_so_many_jobs_outstanding(make_app: Callable[..., Flask]) -> None:
    client = make_app(max_client_jobs=3).test_client()

    refused = client.post("/submit-job", json=[JOB] * 4)
    assert_problem(refused, 429, "too-many-jobs")
    assert refused.headers["Retry-After"] == "1"
    for _ in range(3):  # what is over does not count
        assert client.post("/submit-job?wait=20", json=[JOB] * 3).status_code == 200


def test_a_client_who_heard_of_the_end_of_its_jobs_may_submit_at_once(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, here, add = threading.Event(), threading.current_thread(), Known.add

    def add_behind(known: Known, ticket: Ticket) -> None:
        """The callbacks of a batch may be held up by those that come before them."""
        ticket.future.add_done_callback(lambda _: threading.current_thread() is here or go.wait(20))
        add(known, ticket)

    monkeypatch.setattr(Known, "add", add_behind)
    client = make_app(max_client_jobs=3).test_client()
    try:
        assert client.post("/submit-job?wait=20", json=[JOB] * 3).status_code == 200
        assert client.post("/submit-job", json=[JOB] * 3).status_code == 202
    finally:
        go.set()


def test_a_full_queue_is_said(make_app: Callable[..., Flask]) -> None:
    client = make_app(max_outstanding=2, max_client_jobs=10).test_client()

    refused = client.post("/submit-job", json=[JOB] * 3)
    assert_problem(refused, 503, "queue-full")
    assert refused.headers["Retry-After"] == "1"
    assert client.post("/submit-job?wait=20", json=[JOB] * 2).status_code == 200


# Answers.


@pytest.mark.parametrize("path", ["/openapi.json", "/nowhere", "/healthz", "/job-status/x"])
def test_every_answer_ties_a_browsers_hands(client: FlaskClient, path: str) -> None:
    headers = client.get(path).headers

    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in headers


def test_an_error_of_ours_tells_nothing_and_is_logged(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("SELECT secret FROM postgresql://user:password@host")

    monkeypatch.setattr(app.extensions["microbatch.jobs"], "status", broken)
    response = client.get("/job-status/x")

    problem = assert_problem(response, 500, "internal")
    assert "secret" not in response.text
    number = problem["detail"].split()[-1].rstrip(".")
    assert [record for record in caplog.records if number in record.getMessage() and record.exc_info]


def test_no_route_is_without_its_look_at_the_request(guarded: Flask) -> None:
    """Whatever is registered, without a token it is closed, but for the two probes."""
    client = guarded.test_client()
    routes = [
        rule for rule in guarded.url_map.iter_rules() if rule.endpoint not in ("service.healthz", "service.readyz")
    ]
    assert len(routes) >= 4
    for rule in routes:
        path = rule.rule.replace("<job_id>", "x")
        method = "POST" if "POST" in (rule.methods or ()) else "GET"
        assert client.open(path, method=method).status_code == 401, path


def test_tokens_are_compared_in_constant_time(guarded: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def noted(one: Any, other: Any) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    client = guarded.test_client()
    for shown in (TOKEN, "x", ADMIN):
        compared.clear()
        client.get("/nowhere", headers={"Authorization": f"Bearer {shown}"})
        assert compared == [TOKEN.encode(), ADMIN.encode()], "all of them, whichever fits"
