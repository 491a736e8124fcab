"""The application factory."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from typing import Any

import psycopg
from flask import Blueprint, Flask, Response
from werkzeug.exceptions import HTTPException

from microbatch.batcher import MicroBatcher
from microbatch.embedded import EmbeddedPostgres
from microbatch.options import Options
from microbatch.processors.postgres.conninfo import connection_parameters

from . import dashboard, metrics
from .bodies import MAX_BYTES
from .feed import Feed
from .ids import Ids
from .jobs import Jobs
from .problems import Problem
from .routes import TOO_LARGE, blueprint
from .security import Gate, harden
from .settings import LOOPBACK, ServiceError, Settings, settings_from
from .store import MemoryStore, PostgresStore, Store, make_tables, shared_secret
from .table import create_default_table, find_table
from .writer import RowWriter, Submission, plain_statement, storing_statement

_log = logging.getLogger("microbatch.service")

BLUEPRINTS: tuple[Blueprint, ...] = (blueprint, metrics.blueprint, dashboard.blueprint)


def create_app(
    dsn: str | None = None,
    *,
    table: str | None = None,
    columns: Sequence[str] | None = None,
    store: str | None = None,
    status_ttl: float | None = None,
    token: str | None = None,
    admin_token: str | None = None,
    secret: str | None = None,
    allowed_hosts: Sequence[str] | None = None,
    insecure: bool | None = None,
    max_client_jobs: int | None = None,
    **batcher_options: Any,
) -> Flask:
    """The service as a Flask application, for any WSGI server with threads. Blocks until the database has answered.

    What is not given comes from the environment (`MICROBATCH_DSN`, `MICROBATCH_TABLE`, …), else it has a default. The
    batcher is `app.extensions["microbatch"]`; its threads and all lasting connections begin with the first request in
    a process, so `--preload` is fine.

    Args:
        dsn: the database; without one an embedded server is started, which ends with this process.
        table: written as in SQL. Without one it is `payment_transactions`, created where it is missing.
        columns: what a job gives, all of it each time. By default the columns that have no default.
        store: `"postgres"`: outcomes are kept in a table that every worker process reads. `"memory"`: for one process.
        status_ttl: seconds for which an outcome is kept, at least.
        token: what every request has to show, except for `/healthz` and `/readyz`.
        admin_token: what `/shutdown` wants; made anew without one.
        secret: signs job ids; processes that share the store's tables share one without it.
        allowed_hosts: names that requests may call the service by, besides those of the loopback; `*` for any.
        insecure: without a token, answer other machines as well.
        max_client_jobs: outstanding jobs of one client address; half of `max_outstanding` by default.
        batcher_options: those of `MicroBatcher`. `when_full` is `"raise"` here.

    Raises:
        ServiceError, ValueError, TypeError: a setting that cannot be; the message names it and the remedy.
        psycopg.OperationalError: the database cannot be reached.
    """
    settings = settings_from(
        dsn=dsn,
        table=table,
        columns=columns,
        store=store,
        status_ttl=status_ttl,
        token=token,
        admin_token=admin_token,
        secret=secret,
        allowed_hosts=allowed_hosts,
        insecure=insecure,
        max_client_jobs=max_client_jobs,
        **batcher_options,
    )
    return make_app(settings)


def make_app(settings: Settings) -> Flask:
    """The same, out of settings."""
    app = Flask(__name__, static_folder=None)
    # One more than is accepted: of a body without a length the rest is cut off silently, and not refused.
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES + 1
    app.json.sort_keys = False  # type: ignore[attr-defined]
    conninfo = settings.dsn if settings.dsn is not None else _own_server(app)
    jobs = _jobs(settings, conninfo)
    admin_token = settings.admin_token or secrets.token_urlsafe(32)
    gate = Gate(settings.token, admin_token, (*LOOPBACK, *settings.allowed_hosts), settings.insecure)
    app.extensions["microbatch"] = jobs.batcher
    app.extensions["microbatch.jobs"] = jobs
    app.extensions["microbatch.feed"] = Feed(jobs.batcher)
    app.extensions["microbatch.registry"] = metrics.registry_for(jobs.batcher)
    app.extensions["microbatch.gate"] = gate
    app.extensions["microbatch.admin_token"] = admin_token
    app.before_request(gate.check)
    app.after_request(harden)
    app.register_error_handler(Problem, Problem.response)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unforeseen)
    for each in BLUEPRINTS:
        app.register_blueprint(each)
    return app


def _own_server(app: Flask) -> str:
    if os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        raise ServiceError("no database: each worker would start one of its own; set MICROBATCH_DSN")
    server = EmbeddedPostgres().start()
    app.extensions["microbatch.server"] = server  # it lives as long as the application
    return server.dsn


def _jobs(settings: Settings, conninfo: str) -> Jobs:
    options = Options(**settings.batcher)
    name = options.name
    with _connect(conninfo) as connection:
        if settings.table is None:
            create_default_table(connection)
        table = find_table(connection, settings.table, settings.columns)
        if settings.store == "memory":
            own = (settings.secret or secrets.token_urlsafe()).encode()
            store: Store = MemoryStore(conninfo, name)
            statement = plain_statement(table)
        else:
            status_table = make_tables(connection)
            own = settings.secret.encode() if settings.secret else shared_secret(connection)
            store = PostgresStore(conninfo, status_table, name)
            # Twice as long as promised: the clocks of two machines may differ.
            statement = storing_statement(table, status_table, 2 * settings.status_ttl)
    processor = RowWriter(conninfo, statement)
    batcher: MicroBatcher[Submission, str] = MicroBatcher(processor, **settings.batcher)
    most = settings.max_client_jobs or max(1, options.max_outstanding // 2)
    return Jobs(batcher, options, table, store, Ids(own), settings.status_ttl, most)


def _connect(conninfo: str) -> psycopg.Connection[Any]:
    try:
        return psycopg.connect(autocommit=True, **connection_parameters(conninfo))
    except psycopg.Error as error:
        failure = error
    # The same error anew: psycopg's own carries every connection parameter, the password too.
    raise type(failure)(*failure.args)


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    kind = (error.name or "error").lower().replace(" ", "-")
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    detail = {
        404: "There is nothing at this address; /openapi.json lists what there is.",
        405: "This address does not take that method.",
        413: TOO_LARGE,
    }.get(status, "The request cannot be understood.")
    return Problem(status, kind, detail, headers=headers).response()


def _unforeseen(error: Exception) -> Response:
    number = secrets.token_hex(8)
    _log.error("error %s", number, exc_info=error)
    return Problem(500, "internal", f"Something went wrong here; the log has it as error {number}.").response()
