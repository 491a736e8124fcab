"""The service's description of itself (OpenAPI 3.1), made for its table."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .bodies import MAX_BYTES, MAX_DEPTH
from .columns import Schema
from .failures import HTTP_STATUS
from .problems import MEDIA_TYPE
from .table import Table

_JOB_ID = "^[A-Za-z0-9_-]{56}$"
_PROBLEM_TITLES = {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    403: "The Host, the Origin or the address is foreign.",
    404: "There is no such job, or it is too long ago.",
    409: "The row conflicts with another one, or the Idempotency-Key is in use at this moment.",
    413: f"The body is larger than {MAX_BYTES // 1024} KiB.",
    415: "The body is no application/json.",
    422: "The database refused the row, or the Idempotency-Key was sent with another body.",
    429: "This client has too many jobs outstanding.",
    503: "Not accepted, or nothing was written: try again later.",
    504: "It is not known yet what became of the job.",
}


def document(table: Table, max_jobs: int, max_wait: float) -> dict[str, Any]:
    """The document for a service that writes *table*."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "microbatch",
            "version": version("microbatch"),
            "description": "Jobs that come together are written by one transaction.",
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": {
            "/submit-job": {"post": _submit(max_wait)},
            "/job-status/{jobId}": {"get": _status()},
            "/shutdown": {"post": _shutdown()},
            "/healthz": {"get": _probe("healthz", "Whether the process answers", "ok", ())},
            "/readyz": {"get": _probe("readyz", "Whether a job would be written", "ready", (503,))},
            "/openapi.json": {"get": _self()},
        },
        "components": {
            "schemas": _schemas(table, max_jobs),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _submit(max_wait: float) -> dict[str, Any]:
    wait = {
        "name": "wait",
        "in": "query",
        "description": "Seconds to wait for the commit.",
        "schema": {"type": "number", "minimum": 0, "maximum": max_wait},
    }
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "The same body under the same key is written once, whichever process it meets.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    }
    body = {"required": True, "content": {"application/json": {"schema": _one_or_many("Job", "Jobs")}}}
    return {
        "operationId": "submitJob",
        "summary": "Submit a job, or an array of jobs",
        "description": f"At most {MAX_BYTES // 1024} KiB, {MAX_DEPTH} levels deep, no key twice.",
        "parameters": [wait, key],
        "requestBody": body,
        "responses": {
            "200": _answer("With wait: every job has its outcome.", _one_or_many("Status", "Statuses")),
            "202": _answer("Accepted, in this process's memory.", _one_or_many("Accepted", "AllAccepted")),
            **_problems(400, 401, 403, 409, 413, 415, 422, 429, 503, 504),
        },
    }


def _status() -> dict[str, Any]:
    job_id = {"name": "jobId", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "operationId": "jobStatus",
        "summary": "What became of a job",
        "parameters": [job_id],
        "responses": {"200": _answer("What is known.", _ref("Status")), **_problems(400, 401, 403, 404, 503)},
    }


def _shutdown() -> dict[str, Any]:
    return {
        "operationId": "shutdown",
        "summary": "Take no more jobs, finish those there are, and say so",
        "security": [{"token": []}],
        "responses": {
            "200": _answer("Every job has its outcome.", _object({"message": {"type": "string"}})),
            **_problems(400, 401, 403, 409, 504),
        },
    }


def _probe(name: str, summary: str, word: str, problems: tuple[int, ...]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "security": [],
        "responses": {
            "200": _answer("Yes.", _object({"status": {"type": "string", "const": word}})),
            **_problems(400, *problems),
        },
    }


def _self() -> dict[str, Any]:
    return {
        "operationId": "openapi",
        "summary": "This document",
        "responses": {"200": _answer("OpenAPI 3.1.", {"type": "object"}), **_problems(400, 401, 403)},
    }


def _schemas(table: Table, max_jobs: int) -> dict[str, Schema]:
    job_id = {"type": "string", "pattern": _JOB_ID}
    return {
        "Job": _object({name: column.schema() for name, column in table.given.items()}),
        "Jobs": {"type": "array", "items": _ref("Job"), "minItems": 1, "maxItems": max_jobs},
        "Row": _object({column.name: column.row_schema() for column in table.all}),
        "Failure": _failure(),
        "Accepted": _object({"jobId": job_id, "message": {"type": "string"}}),
        "AllAccepted": {"type": "array", "items": _ref("Accepted")},
        "Status": _object(
            {
                "jobId": job_id,
                "status": {"enum": ["pending", "processing", "completed", "failed", "cancelled", "unknown"]},
                "result": {"anyOf": [{"type": "null"}, _ref("Row"), _ref("Failure")]},
            }
        ),
        "Statuses": {"type": "array", "items": _ref("Status")},
        "Problem": {
            **_object(
                {
                    "type": {"type": "string", "format": "uri"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "jobId": job_id,
                    "result": _ref("Failure"),
                }
            ),
            "required": ["type", "title", "status", "detail"],
        },
    }


def _failure() -> Schema:
    failure = _object(
        {
            "error": {"enum": sorted(HTTP_STATUS)},
            "message": {"type": "string"},
            "sqlstate": {"type": ["string", "null"]},
            "constraint": {"type": ["string", "null"]},
        }
    )
    failure["properties"]["column"] = {"type": "string"}  # where it is known
    return failure


def _object(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _one_or_many(one: str, many: str) -> Schema:
    return {"anyOf": [_ref(one), _ref(many)]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problems(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {
            "description": _PROBLEM_TITLES[status],
            "content": {MEDIA_TYPE: {"schema": _ref("Problem")}},
        }
        for status in statuses
    }
