"""What a client is told when something is wrong: problem details (RFC 9457), without values, SQL or addresses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from flask import Response

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:microbatch:problem:"


@dataclass(eq=False)
class Problem(Exception):
    """Raised anywhere under a request; becomes its answer.

    Attributes:
        status: of HTTP.
        kind: the last part of `type`, for programs.
        detail: for people.
        retry_after: seconds, where it is worth another try.
        members: more members of the body, such as `jobId`.
        headers: more headers.
    """

    status: int
    kind: str
    detail: str
    retry_after: int | None = None
    members: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """The answer to send."""
        body = {
            "type": _TYPE + self.kind,
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }
        response = Response(json.dumps(body), self.status, mimetype=MEDIA_TYPE)
        response.headers.extend(self.headers)
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(self.retry_after)
        return response


def bad_request(detail: str) -> Problem:
    return Problem(400, "bad-request", detail)


def not_found() -> Problem:
    """The same for an id that never was, one of another service and one that is too old."""
    return Problem(404, "job-not-found", "There is no such job here, or it is too long ago.")


def unavailable(kind: str, detail: str, retry_after: int = 1) -> Problem:
    return Problem(503, kind, detail, retry_after)
