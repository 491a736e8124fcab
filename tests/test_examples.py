"""The Flask example under a real gunicorn, started with the README's own command."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import psycopg

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")

PATIENCE = 60.0  # seconds; a guard, not a measure


def readme_command() -> list[str]:
    text = (ROOT / "README.rst").read_text("utf-8")
    found = re.search(r"^ +gunicorn (.*) shop:app$", text, re.MULTILINE)
    assert found is not None
    return [sys.executable, "-W", "error", "-m", "gunicorn", *shlex.split(found[1])]


@contextmanager
def served(database: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The Flask example under gunicorn: its address, and the process."""
    environment = {**os.environ, "DATABASE_URL": database}
    command = [sys.executable, "-m", "flask", "--app", "flask_app", "create-tables"]
    subprocess.run(command, cwd=ROOT / "examples", env=environment, check=True, timeout=PATIENCE)
    # To append: the reader's place is the writer's as well.
    with tempfile.TemporaryFile("a+") as log:
        settings = Path(__file__).parent / "scripts" / "gunicorn_settings.py"
        command = [*readme_command(), "--config", str(settings), "--bind", "127.0.0.1:0", "flask_app:app"]
        process = subprocess.Popen(command, cwd=ROOT / "examples", env=environment, stderr=log, start_new_session=True)
        try:
            yield address_in(log, process), process
        finally:
            # With its workers, should it not have ended them itself.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def address_in(log: IO[str], process: subprocess.Popen[bytes]) -> str:
    def found() -> re.Match[str] | None:
        assert process.poll() is None, "gunicorn did not start"
        log.seek(0)
        return re.search(r"at: (http://\S+)", log.read())

    return wait_until(found)[1]


def wait_until(look: Callable[[], T | None]) -> T:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        seen = look()
        if seen:
            return seen
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE:g} s")


def post(url: str, **form: object) -> int | None:
    """The status of the answer; None where there was none."""
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=PATIENCE) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def count_rows(database: str) -> int:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT count(*) FROM payments").fetchone()
    assert row is not None
    return int(row[0])


def test_the_flask_example_refuses_what_would_fail_its_neighbours(database: str) -> None:
    forms: list[dict[str, object]] = [{"user_id": "x", "amount": "1"}, {"user_id": 1}, {"user_id": 1, "amount": "NaN"}]
    forms += [{"user_id": 1, "amount": "-1"}, {"user_id": 2**40, "amount": "1"}]
    with served(database) as (address, _):
        assert [post(f"{address}/payments", **form) for form in forms] == [400] * len(forms)
        assert post(f"{address}/payments", user_id=1, amount="9.50") == 201
    assert count_rows(database) == 1


def test_P6_what_the_flask_example_accepted_before_sigterm_is_in_the_table(database: str) -> None:
    stop = threading.Event()
    answers: list[int | None] = []

    def client(user_id: int) -> None:
        while not stop.is_set():
            answers.append(post(f"{address}/payments/later", user_id=user_id, amount=1))
            if answers[-1] is None:
                stop.wait(0.01)

    def accepted() -> int:
        return sum(answer == 202 for answer in list(answers))

    with served(database) as (address, process), ThreadPoolExecutor(8) as executor:
        try:
            clients = [executor.submit(client, user_id) for user_id in range(1, 9)]
            wait_until(lambda: accepted() >= 60)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
        finally:
            stop.set()
        for future in clients:
            future.result()

    assert set(answers) <= {202, None}
    # A request that got no answer may have been written.
    assert accepted() <= count_rows(database) <= accepted() + answers.count(None)
