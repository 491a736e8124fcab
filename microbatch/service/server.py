"""`microbatch serve`: the application under waitress, until somebody stops it."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import psycopg
from flask import Flask

from microbatch._database import connect, one_line
from microbatch._terminal import CommandError
from microbatch.embedded import EmbeddedPostgres
from microbatch.errors import MicrobatchError, MissingExtra

from .app import make_app
from .bodies import MAX_BYTES
from .security import is_loopback
from .settings import Settings, settings_from
from .store import DDL, SECRET_TABLE, make_tables
from .writer import STATUS_TABLE

try:
    from waitress import create_server  # type: ignore[import-untyped]
    from waitress.channel import HTTPChannel  # type: ignore[import-untyped]
except ImportError as error:
    raise MissingExtra('pip install "flask>=3.0" "waitress>=3.0" "prometheus-client>=0.20"') from error

_LAST_ANSWERS = 5.0  # seconds for requests that wait for nothing more
_TICK = 0.02


def serve(host: str, port: int, threads: int, read_timeout: int, settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; then drain, answer who waits, and return the exit status.

    Args:
        read_timeout: seconds in which a request has to be here.
    """
    _check_address(host, settings)
    settings = replace(settings, allowed_hosts=(*settings.allowed_hosts, host))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    with _listening(host, port) as listening:
        app = _make(settings)
        try:
            server = _server(app, listening, threads, read_timeout)
            _announce(app, server, settings)
            with _Stopper(app, server) as stopper:
                server.run()
            if stopper.is_hurried:
                app.extensions["microbatch.jobs"].shutdown(timeout=0.0)
        finally:
            _stop(app)
    return 130 if stopper.is_hurried else 0


class _Stopper:
    """Turns the first signal into an orderly end, and the second one into a quick one.

    The server goes on while the batcher drains, so that requests that wait get their answers; new jobs are refused.
    """

    def __init__(self, app: Flask, server: Any) -> None:
        self._jobs = app.extensions["microbatch.jobs"]
        self._server = server
        self._signals = 0
        self._is_drained = False
        self._before: dict[int, Any] = {}
        # Guards the end: afterwards no signal is sent any more.
        self._lock = threading.Lock()
        self._is_over = False

    @property
    def is_hurried(self) -> bool:
        """Whether a second signal came while jobs were under way."""
        return self._signals > 1 and not self._is_drained

    def __enter__(self) -> _Stopper:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_drained:
            raise SystemExit
        self._signals += 1
        if self.is_hurried:
            raise SystemExit
        threading.Thread(target=self._drain, name="microbatch-serve-stop", daemon=True).start()

    def _drain(self) -> None:
        try:
            self._jobs.shutdown()
            _until(lambda: not self._is_busy(), _LAST_ANSWERS)
        finally:
            with self._lock:
                if not self._is_over:
                    self._is_drained = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _is_busy(self) -> bool:
        channels = list(self._server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)


def _check_address(host: str, settings: Settings) -> None:
    if not is_loopback(host) and settings.token is None and not settings.insecure:
        raise CommandError(
            f"--host {host} lets other machines in: set MICROBATCH_TOKEN, which their requests then have to show"
            " (or say --insecure)"
        )


def _listening(host: str, port: int) -> socket.socket:
    error: OSError | None = None
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                return socket.create_server(address[:2], family=family, backlog=1024)
            except OSError as failure:
                error = failure
    except OSError as failure:
        error = failure
    why = "no such address" if error is None else error.strerror
    raise CommandError(f"cannot listen on {host} port {port}: {why}")


def _server(app: Flask, listening: socket.socket, threads: int, read_timeout: int) -> Any:
    server = create_server(
        app,
        sockets=[listening],
        threads=threads,
        ident=None,
        max_request_body_size=4 * MAX_BYTES,
        channel_timeout=read_timeout,
        cleanup_interval=max(1, read_timeout // 4),
        clear_untrusted_proxy_headers=False,  # the gate wants to see them
    )
    server.channel_class = _channel_class(read_timeout)
    return server


def _channel_class(read_timeout: int) -> Any:
    class Channel(HTTPChannel):  # type: ignore[misc]
        """Hangs up on a request that trickles in; on one that stops, waitress does."""

        _began = 0.0

        def received(self, data: bytes) -> bool:
            now = time.monotonic()
            if self.request is None:
                self._began = now
            elif now - self._began > read_timeout:
                self.will_close = True
                return False
            return bool(super().received(data))

    return Channel


def _make(settings: Settings) -> Flask:
    try:
        return make_app(settings)
    except psycopg.Error as error:
        raise CommandError(f"cannot prepare the database: {one_line(error)}") from None
    except MissingExtra:
        raise
    except (MicrobatchError, ValueError, TypeError) as error:
        raise CommandError(one_line(error)) from None


def _announce(app: Flask, server: Any, settings: Settings) -> None:
    own: EmbeddedPostgres | None = app.extensions.get("microbatch.server")
    port = server.effective_port
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    lines = [f"microbatch serves on http://{host}:{port}/"]
    if own is not None:
        lines.append("the database is a server of its own, and ends with this process: nothing is kept")
    if settings.admin_token is None:
        lines.append(f"admin token, for POST /shutdown: {app.extensions['microbatch.admin_token']}")
    print("\n".join(lines), flush=True)


def _stop(app: Flask) -> None:
    app.extensions["microbatch.jobs"].shutdown()
    own: EmbeddedPostgres | None = app.extensions.get("microbatch.server")
    if own is not None:
        own.stop()


def _until(condition: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(_TICK)


def store_ddl() -> str:
    """What creates the status store, as a script."""
    tables = f"{STATUS_TABLE}, {SECRET_TABLE}"
    return f"{DDL};\n-- For the role of the service: GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO ...;"


def make_store(conninfo: str) -> str:
    """Create the status store where it is missing, and say so; `CommandError` says why not."""
    with connect(conninfo) as connection:
        try:
            make_tables(connection)
        except MicrobatchError as error:
            raise CommandError(one_line(error)) from None
    return f"{STATUS_TABLE} and {SECRET_TABLE} are there"


def settings_of(environ: dict[str, str]) -> Settings:
    """Settings, or a `CommandError`."""
    try:
        return settings_from(environ)
    except (MicrobatchError, ValueError, TypeError) as error:
        raise CommandError(one_line(error)) from None
