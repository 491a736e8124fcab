"""The dashboard: its routes, and the page itself in a real browser."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import Request, urlopen

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient

import microbatch.service
from service.answers import JOB, assert_problem
from service.browser import PATIENCE, Browser, Page, find_chromium
from service.clients import end, gunicorn
from service.serving import JSON, serving

STATIC = Path(microbatch.service.__file__).parent / "static"
NARROW = 390
CHARTS = ("rate", "latency", "size", "queue")

TABLE = """
    CREATE TABLE payment_transactions (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL,
        amount numeric(10, 2) NOT NULL CONSTRAINT amount_is_positive CHECK (amount > 0),
        status varchar(50) NOT NULL,
        transaction_date timestamptz NOT NULL DEFAULT now()
    )"""


# Routes.


def test_the_page_is_of_own_files_only_and_its_policy_says_so(client: FlaskClient) -> None:
    page = client.get("/", buffered=True)
    assert (page.status_code, page.mimetype) == (200, "text/html")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        **dict.fromkeys(("script-src", "style-src", "img-src", "connect-src"), "'self'"),
        **dict.fromkeys(("frame-ancestors", "base-uri", "form-action"), "'none'"),
    }
    for address in Links.of(page.text):
        assert "//" not in address
        with client.get(f"/{address}") as response:
            assert response.status_code == 200, address


def test_what_is_not_the_page_keeps_the_strictest_policy(client: FlaskClient) -> None:
    for path in ("/static/dashboard.js", "/dashboard/feed", "/dashboard/form"):
        response = client.get(path, buffered=True)
        assert response.status_code == 200
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; frame-ancestors")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_nothing_is_put_into_the_page_as_markup() -> None:
    script = (STATIC / "dashboard.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", script
    )
    page = (STATIC / "dashboard.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=|javascript:", page)


def test_the_feed_tells_of_jobs_and_the_form_of_columns(client: FlaskClient, app: Flask) -> None:
    job_id = client.post("/submit-job?wait=20", json=JOB).get_json()["jobId"]
    assert app.extensions["microbatch"].flush(10)
    give_up = time.monotonic() + PATIENCE
    while True:
        told = client.get("/dashboard/feed").get_json()
        # Counted by a listener, which is told after the job is over.
        if sum(second["completed"] for second in told["seconds"]):
            break
        assert time.monotonic() < give_up
    form = client.get("/dashboard/form").get_json()
    assert told["stats"]["completed"] >= 1
    assert job_id not in str(told), "a job's id opens its status"
    assert [(column["name"], column["type"]) for column in form["columns"]] == [
        ("user_id", "integer"),
        ("amount", "numeric"),
        ("status", "character varying"),
    ]


@pytest.mark.parametrize("since", ["", "-1", "x", "1e9", "9" * 30])
def test_since_is_a_time(client: FlaskClient, since: str) -> None:
    assert_problem(client.get("/dashboard/feed", query_string={"since": since}), 400, "bad-request")


class Links(HTMLParser):
    """What a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    @classmethod
    def of(cls, page: str) -> set[str]:
        parser = cls()
        parser.feed(page)
        assert len(parser.found) >= 5
        return parser.found

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attributes if name in ("src", "href") and value}


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        if os.environ.get("CI"):
            raise AssertionError("no chromium: install the distribution's package")
        pytest.skip("needs chromium")
    with Browser(program, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def service(database: str) -> Iterator[str]:
    """`microbatch serve` on a table that refuses bad rows; its address."""
    with psycopg.connect(database) as connection:
        connection.execute(TABLE)
    with serving("--dsn", database) as service:
        yield f"http://127.0.0.1:{service.port}/"
        assert service.end() == 0


@pytest.mark.database
def test_a_person_submits_jobs_and_watches_them(browser: Browser, service: str, database: str) -> None:
    with browser.page(service) as page:
        page.wait_for_text("#state", "live")
        assert page.text("#batches") == "No batch yet."
        idle = {name: page.ask(height(name)) for name in CHARTS}

        submit_one(page)
        submit_a_bad_one(page)
        submit_nonsense(page)
        submit_many(page)
        charts_move(page, idle)

        assert {address for address in page.addresses() if not address.startswith(service)} == set()
        # The nonsense is refused with 400, which a browser notes; and it wonders why the tests read a canvas.
        expected = ("submit-job", "willReadFrequently")
        assert [each for each in page.complaints() if not any(word in str(each) for word in expected)] == []
    with psycopg.connect(database) as connection:
        found = connection.execute("SELECT user_id, amount::text, count(*) FROM payment_transactions GROUP BY 1, 2")
        assert sorted(found.fetchall()) == [(7, "12.50", 1), (8, "3.00", 30)]


def submit_one(page: Page) -> None:
    page.type("input[name=user_id]", "7")
    page.type("input[name=amount]", "12.50")
    page.click("#submit")
    page.wait_for_text("#followed-status", "completed")
    row = page.text("#followed-result").split("\n")
    assert dict(zip(row[::2], row[1::2], strict=True))["amount"] == "12.50"
    page.wait_for_text("#batches", "completed")


def submit_a_bad_one(page: Page) -> None:
    page.type("input[name=amount]", "-5")
    page.click("#submit")
    page.wait_for_text("#followed-status", "failed")
    told = page.text("#followed-result")
    assert "23514" in told
    assert "amount_is_positive" in told
    page.wait_for_text("#failures", "amount_is_positive")
    page.wait_for_text("#batches", "1 failed")
    page.wait_for("document.querySelector('#outcomes li:nth-child(2) .count').innerText === '1'")


def submit_nonsense(page: Page) -> None:
    page.type("input[name=amount]", "<b>x</b>")
    page.click("#submit")
    page.wait_for_text("#message", "must be a decimal number")


def submit_many(page: Page) -> None:
    page.type("input[name=user_id]", "8")
    page.type("input[name=amount]", "3")
    page.type("#copies", "30")
    page.click("#submit")
    page.wait_for_text("#followed-note", "30")
    page.wait_for_text("#followed-status", "completed")
    page.wait_for("document.querySelector('#outcomes li:nth-child(1) .count').innerText === '31'")
    page.wait_for("document.querySelector('#message').hidden")


def charts_move(page: Page, idle: dict[str, int]) -> None:
    for name in CHARTS:
        # Where there was no line before, one that does not rise is one all the same.
        page.wait_for(f"{height(name)} > {idle[name] and idle[name] + 2}")
    page.wait_for("document.querySelector('#tile-p99').innerText.match(/[0-9.]+ (ms|s)/)")


def height(name: str) -> str:
    """Over how many rows of a chart its first line, which is blue, goes up."""
    return f"""(() => {{
        const canvas = document.querySelector("#chart-{name} canvas");
        const {{width, height}} = canvas;
        const {{data}} = canvas.getContext("2d", {{willReadFrequently: true}}).getImageData(0, 0, width, height);
        const rows = new Set();
        for (let at = 0; at < data.length; at += 4) {{
            if (data[at] < 120 && data[at + 2] > 180 && data[at + 3] > 200) rows.add(Math.floor(at / 4 / width));
        }}
        return rows.size;
    }})()"""


@pytest.mark.database
def test_the_page_fits_a_phone_in_the_dark_and_says_when_the_service_is_gone(browser: Browser, service: str) -> None:
    with browser.page(service, width=NARROW, height=844, dark=True) as page:
        page.wait_for_text("#state", "live")
        submit_one(page)
        assert page.ask("document.documentElement.scrollWidth") == NARROW
        dark = page.ask("getComputedStyle(document.body).backgroundColor")
        page.prefer("light")
        page.wait_for(f"getComputedStyle(document.body).backgroundColor !== {dark!r}")
        page.go_offline()
        page.wait_for_text("#state", "not reached")


@pytest.mark.database
def test_several_workers_are_shown_as_one(
    browser: Browser, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "values").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "values"))
    with gunicorn(database, 2, tmp_path / "log") as (port, process):
        jobs = submit_until_both_have_answered(port)
        with browser.page(f"http://127.0.0.1:{port}/") as page:
            page.wait_for_text("#processes", "2 worker processes")
            page.wait_for(f"document.querySelector('#outcomes .count').innerText === '{jobs}'")
        wait_for_metric(port, f'microbatch_jobs_total{{batcher="microbatch",outcome="completed"}} {jobs}.0')
        end(process)


def submit_until_both_have_answered(port: int) -> int:
    workers = set()
    for jobs in range(1, 200):
        request = Request(f"http://127.0.0.1:{port}/submit-job?wait=20", json.dumps(JOB).encode(), JSON)
        with urlopen(request, timeout=PATIENCE) as answer:
            assert answer.status == 200
            workers.add(answer.headers["X-Worker"])
        if len(workers) == 2:
            return jobs
    raise AssertionError(f"only {workers} answered")


def wait_for_metric(port: int, line: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while True:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            said = answer.read().decode()
        if line in said.splitlines():
            return
        assert time.monotonic() < give_up, (line, said)
        time.sleep(0.05)
