"""The dashboard: one page of own files only, and the data that it asks for again and again."""

from __future__ import annotations

import json
import re

from flask import Blueprint, Response, current_app, request

from .feed import FLOOR, GROWTH, HISTORY, Feed
from .jobs import Jobs
from .problems import bad_request

# No inline script, no inline style, and nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

_SINCE = re.compile(r"[0-9]{1,11}(\.[0-9]{1,9})?")

blueprint = Blueprint("dashboard", __name__, static_folder="static", static_url_path="/static")


@blueprint.get("/")
def page() -> Response:
    response = blueprint.send_static_file("dashboard.html")
    response.headers["Content-Security-Policy"] = POLICY
    return response


@blueprint.get("/dashboard/feed")
def feed() -> Response:
    """Of the process that answers; the page puts several together."""
    told: Feed = current_app.extensions["microbatch.feed"]
    return _json(told.read(_since()))


@blueprint.get("/dashboard/form")
def form() -> Response:
    """What the page has to know once: its form, and how latencies are counted."""
    jobs: Jobs = current_app.extensions["microbatch.jobs"]
    columns = [
        {"name": name, "type": column.type, "required": not column.is_nullable, "schema": column.schema()}
        for name, column in jobs.table.given.items()
    ]
    several = bool(request.environ.get("wsgi.multiprocess"))
    told = {"columns": columns, "growth": GROWTH, "floor": FLOOR, "history": HISTORY, "several": several}
    return _json(told)


def _since() -> float:
    given = request.args.get("since", "0")
    if not _SINCE.fullmatch(given):
        raise bad_request("since is a time in seconds.")
    return float(given)


def _json(value: object) -> Response:
    return Response(json.dumps(value), mimetype="application/json")
