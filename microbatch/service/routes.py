"""The routes: read a request, ask `Jobs`, and word the answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, current_app, request

from .bodies import MAX_BYTES, BadBody, read_json
from .columns import BadJob, texts_of
from .failures import HTTP_STATUS
from .jobs import Answer, Jobs
from .known import Ticket
from .openapi import document
from .problems import Problem, bad_request, unavailable
from .security import Gate

ACCEPTED = "Job accepted and will be processed in the next batch."
SHUT_DOWN = "System shut down successfully."
MAX_JOBS = 1000  # of one request
MAX_WAIT = 60.0  # seconds
TOO_LARGE = f"The body is larger than {MAX_BYTES // 1024} KiB."

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_WAIT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")

blueprint = Blueprint("service", __name__)


@blueprint.post("/submit-job")
def submit_job() -> Response:
    _check_store()
    seconds = _seconds_to_wait()
    key = _idempotency_key()
    body = _body()
    many = isinstance(body, list)
    rows = _rows(body if many else [body])
    tickets = _jobs().submit(rows, request.remote_addr or "", key, body)
    if seconds is None:
        return _accepted(tickets, many)
    answers = _jobs().wait(tickets, seconds)
    if not all(answer.is_over for answer in answers):
        return _accepted(tickets, many)
    if not many and answers[0].failure is not None:
        raise _failed(answers[0])
    return _json([_shown(answer) for answer in answers], many)


@blueprint.get("/job-status/<job_id>")
def job_status(job_id: str) -> Response:
    return _json([_shown(_jobs().status(job_id))], many=False)


@blueprint.post("/shutdown")
def shutdown() -> Response:
    gate: Gate = current_app.extensions["microbatch.gate"]
    gate.check_admin()
    if request.environ.get("wsgi.multiprocess"):
        detail = (
            "This is one of several worker processes, and stops none of the others."
            " Send SIGTERM to their master: it stops them all, and each drains its jobs."
        )
        raise Problem(409, "several-workers", detail)
    report = _jobs().shutdown()
    if not report.finished:
        raise Problem(504, "not-drained", "Some jobs have no outcome yet: ask again.", 1)
    return _json([json.dumps({"message": SHUT_DOWN})], many=False)


@blueprint.get("/healthz")
def healthz() -> Response:
    return _json([json.dumps({"status": "ok"})], many=False)


@blueprint.get("/readyz")
def readyz() -> Response:
    if not _jobs().is_ready():
        raise unavailable("not-ready", "The service is shut down, or its database does not answer.", 5)
    return _json([json.dumps({"status": "ready"})], many=False)


@blueprint.get("/openapi.json")
def openapi() -> Response:
    return _json([json.dumps(document(_jobs().table, MAX_JOBS, MAX_WAIT))], many=False)


# Reading.


def _jobs() -> Jobs:
    jobs: Jobs = current_app.extensions["microbatch.jobs"]
    return jobs


def _check_store() -> None:
    if request.environ.get("wsgi.multiprocess") and not _jobs().store.is_shared:
        detail = "Several worker processes cannot keep outcomes in memory: set MICROBATCH_STORE=postgres."
        raise unavailable("store-not-shared", detail, 60)


def _body() -> Any:
    if request.mimetype != "application/json":
        raise Problem(415, "unsupported-media-type", "Send the body as Content-Type: application/json.")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Problem(415, "unsupported-media-type", "Send the body without a Content-Encoding.")
    data = request.get_data(cache=False)
    if len(data) > MAX_BYTES:
        raise Problem(413, "request-entity-too-large", TOO_LARGE)
    try:
        return read_json(data)
    except BadBody as error:
        raise bad_request(str(error)) from None


def _rows(jobs: Sequence[Any]) -> list[tuple[str | None, ...]]:
    if not 1 <= len(jobs) <= MAX_JOBS:
        raise bad_request(f"An array has 1 to {MAX_JOBS} jobs.")
    columns, rows = _jobs().table.given, []
    for number, job in enumerate(jobs):
        try:
            rows.append(texts_of(job, columns))
        except BadJob as error:
            raise bad_request(str(error) if len(jobs) == 1 else f"Job {number}: {error}") from None
    return rows


def _seconds_to_wait() -> float | None:
    if unknown := sorted(request.args.keys() - {"wait"}):
        raise bad_request(f"Unknown query parameter: {json.dumps(unknown[0][:64])}. There is wait.")
    given = request.args.getlist("wait")
    if not given:
        return None
    seconds = float(given[0]) if len(given) == 1 and _WAIT.fullmatch(given[0]) else math.nan
    if not 0 <= seconds <= MAX_WAIT:
        raise bad_request(f"wait is a number of seconds from 0 to {MAX_WAIT:.0f}.")
    return seconds


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise bad_request("Idempotency-Key has 1 to 255 visible ASCII characters.")
    return key


# Answering.


def _accepted(tickets: Sequence[Ticket | Answer], many: bool) -> Response:
    texts = [json.dumps({"jobId": ticket.id, "message": ACCEPTED}) for ticket in tickets]
    response = _json(texts, many, 202)
    if not many:
        response.headers["Location"] = f"/job-status/{tickets[0].id}"
    return response


def _shown(answer: Answer) -> str:
    result = answer.row if answer.row is not None else json.dumps(answer.failure and answer.failure.as_json())
    # The row as the server wrote it: a parser of ours would change its numbers.
    return f'{{"jobId": {json.dumps(answer.id)}, "status": {json.dumps(answer.status)}, "result": {result}}}'


def _failed(answer: Answer) -> Problem:
    assert answer.failure is not None
    status = int(HTTP_STATUS.get(answer.failure.error, 503))
    members = {"jobId": answer.id, "result": answer.failure.as_json()}
    return Problem(status, answer.failure.error, answer.failure.message, 1 if status == 503 else None, members)


def _json(texts: Sequence[str], many: bool, status: int = 200) -> Response:
    return Response(f"[{', '.join(texts)}]" if many else texts[0], status, mimetype="application/json")
