"""`microbatch serve`, as a process: the walk-through, the ways to stop it, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from microbatch.cli import main
from service.answers import ACCEPTED, JOB
from service.serving import PATIENCE, Serving, serving

ROOT = Path(__file__).resolve().parent.parent.parent


def curl(*arguments: str) -> Any:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "30", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_walk_through_works_with_curl_alone(binaries: None) -> None:
    """Submit, wait, look, shut down, verify: one command after the installation."""
    with serving(lines=3) as service:
        address = f"http://localhost:{service.port}"
        as_json = ("-H", "Content-Type: application/json")
        job = '{"user_id": 1, "amount": 100.00, "status": "pending"}'
        accepted = curl("-X", "POST", f"{address}/submit-job", *as_json, "-d", job)
        assert accepted == {"jobId": accepted["jobId"], "message": ACCEPTED}

        status = {"status": "pending"}
        give_up = time.monotonic() + PATIENCE
        while status["status"] in ("pending", "processing") and time.monotonic() < give_up:
            status = curl(f"{address}/job-status/{accepted['jobId']}")
        assert status["status"] == "completed"
        assert {"user_id": 1, "amount": 100.0, "status": "pending"}.items() <= status["result"].items()

        assert curl("-X", "POST", f"{address}/shutdown")["status"] == 401
        as_admin = ("-H", f"Authorization: Bearer {service.admin_token}")
        done = curl("-X", "POST", f"{address}/shutdown", *as_admin)
        assert done == {"message": "System shut down successfully."}
        assert curl(f"{address}/readyz")["status"] == 503
        assert curl("-X", "POST", f"{address}/submit-job", *as_json, "-d", job)["status"] == 503
        assert curl(f"{address}/job-status/{accepted['jobId']}") == status
        assert service.end() == 0


@pytest.fixture(scope="module")
def service(shared_database: str) -> Iterator[Serving]:
    """One on the module's database, for tests that leave it running."""
    options = ("--dsn", shared_database, "--read-timeout", "1", "--threads", "4")
    with serving(*options, lines=2, MICROBATCH_LINGER="0.01") as running:
        yield running
        assert running.end() == 0


def test_an_admin_token_of_ones_own_is_not_printed(shared_database: str) -> None:
    with serving("--dsn", shared_database, MICROBATCH_ADMIN_TOKEN="a-token-of-ones-own") as service:
        code, told = service.ask("POST", "/shutdown", Authorization="Bearer a-token-of-ones-own")
        assert (code, told) == (200, {"message": "System shut down successfully."})
        assert service.end() == 0
        assert service.process.stdout is not None
        assert service.process.stdout.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_P6_a_signal_drains_and_answers_who_waits(shared_database: str, number: int) -> None:
    user = 600 + number
    with serving("--dsn", shared_database, lines=2) as service, ThreadPoolExecutor(2) as pool:
        with psycopg.connect(shared_database) as connection:
            connection.execute("LOCK TABLE payment_transactions IN EXCLUSIVE MODE")
            waiting = pool.submit(service.ask, "POST", "/submit-job?wait=30", {**JOB, "user_id": user})
            wait_for_a_lock(shared_database)
            accepted = service.ask("POST", "/submit-job", {**JOB, "user_id": user})
            service.process.send_signal(number)
            refused = until_refused(service)
        assert accepted[0] == 202
        assert refused == "urn:microbatch:problem:shut-down"
        code, told = waiting.result(PATIENCE)
        assert (code, told["status"]) == (200, "completed")
        assert service.process.wait(PATIENCE) == 0
    with psycopg.connect(shared_database) as connection:
        rows = connection.execute("SELECT FROM payment_transactions WHERE user_id = %s", [user]).fetchall()
    assert len(rows) == 2


def wait_for_a_lock(database: str) -> None:
    give_up = time.monotonic() + PATIENCE
    query = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with psycopg.connect(database, autocommit=True) as watch:
        while not watch.execute(query).fetchall():
            assert time.monotonic() < give_up
            time.sleep(0.01)


def until_refused(service: Serving) -> str:
    give_up = time.monotonic() + PATIENCE
    while True:
        code, told = service.ask("POST", "/submit-job", {})
        if code == 400:
            code, told = service.ask("GET", "/readyz")
        if code == 503:
            break
        assert time.monotonic() < give_up
        time.sleep(0.01)
    _, told = service.ask("POST", "/submit-job", {"user_id": 1, "amount": 1, "status": "late"})
    return str(told["type"])


def test_a_second_signal_does_not_wait(shared_database: str) -> None:
    options = ("--dsn", shared_database, "--delivery-timeout", "300")
    with serving(*options, lines=2) as service, psycopg.connect(shared_database) as connection:
        connection.execute("LOCK TABLE payment_transactions IN EXCLUSIVE MODE")
        assert service.ask("POST", "/submit-job", JOB)[0] == 202
        wait_for_a_lock(shared_database)
        service.process.send_signal(signal.SIGINT)
        until_refused(service)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(PATIENCE) == 130, "while the job is still held up"


# A request that does not come to its end.


@pytest.mark.parametrize("pace", ["silent", "a byte now and then"])
def test_a_request_is_read_with_a_deadline(service: Serving, pace: str) -> None:
    head = (
        b"POST /submit-job HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=0.2) as half:
        half.sendall(head + b"{")
        begin = time.monotonic()
        while time.monotonic() - begin < PATIENCE:
            try:
                if pace != "silent":
                    half.sendall(b" ")
                if half.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("the connection stays open")
    assert service.ask("GET", "/healthz")[0] == 200


@pytest.mark.parametrize(
    "hosts", [[], ["localhost:x"], ["[::1"], ["localhost:3000", "evil.example"], ["é"], ["localhost/"], ["a@localhost"]]
)
def test_a_host_that_is_none_is_refused(service: Serving, hosts: list[str]) -> None:
    lines = ["GET /openapi.json HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join(lines).encode())
        answer = connection.makefile("rb").read()
    assert answer.split()[1] in (b"400", b"403"), answer


def test_a_body_without_a_length_is_bounded(service: Serving) -> None:
    head = (
        b"POST /submit-job HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE) as connection:
        connection.sendall(head + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 5 + b"0\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"status": 413' in answer


# What it refuses.


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `microbatch serve` says instead of serving."""

    def complain(*options: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["serve", *options]) == 2
        said, errors = capsys.readouterr()
        assert said == ""
        assert errors.startswith("microbatch serve: ")
        assert errors.count("\n") == 1, errors
        return errors

    return complain


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_another_address_needs_a_token(complaint: Callable[..., str], host: str) -> None:
    assert "MICROBATCH_TOKEN" in complaint("--host", host)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--table", "nowhere"], {}, "there is no table nowhere"),
        (["--table", "payment_transactions", "--columns", "a,b"], {}, "has no column a, b"),
        (["--columns", "id,user_id,amount,status"], {}, "generates id itself"),
        (["--columns", "user_id,amount"], {}, "columns lacks status"),
        (["--store", "redis"], {}, "store must be"),
        (["--linger", "x"], {}, "MICROBATCH_LINGER='x' is not a number"),
        (["--linger", "-1"], {}, "LINGER must be"),
        (["--port", "x"], {}, "MICROBATCH_PORT='x'"),
        (["--status-ttl", "soon"], {}, "MICROBATCH_STATUS_TTL='soon'"),
        ([], {"MICROBATCH_MAX_BATCH": "7"}, "did you mean MICROBATCH_MAX_BATCH_SIZE"),
        ([], {"MICROBATCH_TOKEN": "two words"}, "token must be"),
        ([], {"MICROBATCH_INSECURE": "maybe"}, "MICROBATCH_INSECURE='maybe'"),
    ],
)
def test_what_cannot_be_is_one_line(
    complaint: Callable[..., str],
    shared_database: str,
    service: Serving,
    options: list[str],
    environment: dict[str, str],
    said: str,
) -> None:
    assert said in complaint("--dsn", shared_database, "--port", "0", *options, **environment)


def test_a_port_that_is_taken_is_one_line(
    complaint: Callable[..., str], service: Serving, shared_database: str
) -> None:
    assert "cannot listen" in complaint("--dsn", shared_database, "--port", str(service.port))


@pytest.mark.parametrize("dsn", ["postgresql://anna:geheim@127.0.0.1:1/x", "postgresql://anna:geh@eim@127.0.0.1:1/x"])
def test_an_unreachable_database_is_one_line_without_the_password(complaint: Callable[..., str], dsn: str) -> None:
    said = complaint("--dsn", dsn, "--port", "0")
    assert "conn" in said
    assert "geh" not in said
    assert "eim" not in said


@pytest.mark.parametrize("missing", ["flask", "waitress"])
def test_a_missing_extra_is_one_line_with_the_cure(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from microbatch.cli import main; exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    cure = 'pip install "flask>=3.0" "waitress>=3.0" "prometheus-client>=0.20"'
    assert done.stderr == f"microbatch serve: {cure}\n"


def test_init_db_makes_the_tables_of_the_store(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["init-db", "--service"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "CREATE TABLE IF NOT EXISTS microbatch_status" in printed
    for _ in range(2):
        assert main([*command, "--apply", "--dsn", database]) == 0
        assert "are there" in capsys.readouterr().out
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM microbatch_status, microbatch_secret").fetchone() == (0,)
        connection.execute(printed.encode())
