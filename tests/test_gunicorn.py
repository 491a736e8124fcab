"""Under gunicorn: what was answered with 202 is processed, once, however the workers end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from programs import SCRIPTS, Program, Told

config = pytest.importorskip("gunicorn.config")

# Newer versions keep a socket for commands, which tests that run side by side would share.
_FLAGS = {flag for setting in config.KNOWN_SETTINGS for flag in setting.cli or ()}
ALONE = ("--no-control-socket",) if "--no-control-socket" in _FLAGS else ()

PRELOAD = ("--preload",)
USED = {"USE_BEFORE_FORK": "1"}


class Server(Program):
    """gunicorn with two workers, on a socket that is ready before it is."""

    def __init__(
        self, directory: Path, *options: str, application: str = "web:application", **environment: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=200) as listening:
            self.port: int = listening.getsockname()[1]
            command = [
                *(sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn"),
                *("--config", str(SCRIPTS / "gunicorn_settings.py"), "--workers", "2", "--graceful-timeout", "25"),
                *("--bind", f"fd://{listening.fileno()}"),
                *("--worker-tmp-dir", "/dev/shm" if os.path.isdir("/dev/shm") else str(directory)),
                *("--log-level", "warning", *ALONE, *options, application),
            ]
            self._begin(command, directory, environment, pass_fds=[listening.fileno()])


class Clients:
    """Threads that ask for one job after the other, and remember which they asked for and which were answered."""

    def __init__(self, server: Server, count: int = 6) -> None:
        self.asked: list[str] = []
        self.answered: list[str] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        job = 0
        while not self._stop.is_set():
            job += 1
            name = f"{'wait' if number == 0 else 'job'}-{number}-{job}"
            try:
                self.asked.append(name)
                with closing(http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=10)) as connection:
                    connection.request("GET", f"/{name}")
                    if connection.getresponse().status == 202:
                        self.answered.append(name)
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)

    def wait_for(self, answers: int) -> None:
        give_up = time.monotonic() + 60
        while len(self.answered) < answers:
            assert time.monotonic() < give_up, f"{len(self.answered)} answers"
            time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


@contextmanager
def serve(tmp_path: Path, *options: str, **environment: str) -> Iterator[tuple[Server, Clients]]:
    with Server(tmp_path, *options, **environment) as server:
        clients = Clients(server)
        try:
            clients.wait_for(200)
            yield server, clients
        finally:
            clients.stop()


def terminate(server: Server, clients: Clients) -> None:
    server.send(signal.SIGTERM)


def interrupt(server: Server, clients: Clients) -> None:
    server.send(signal.SIGINT)


def reload(server: Server, clients: Clients) -> None:
    """New workers, old workers gone, under load; twice."""
    for _ in range(2):
        server.send(signal.SIGHUP)
        clients.wait_for(len(clients.answered) + 200)
    server.send(signal.SIGTERM)


def recycle(server: Server, clients: Clients) -> None:
    """Load goes on until workers have been replaced by `--max-requests`."""
    clients.wait_for(600)
    server.send(signal.SIGTERM)


CASES: dict[str, tuple[tuple[str, ...], dict[str, str], Callable[[Server, Clients], None]]] = {
    "gthread, SIGTERM": (("--threads", "4"), {}, terminate),
    "gthread, preload, SIGTERM": (("--threads", "4", *PRELOAD), USED, terminate),
    "gthread, preload, SIGINT": (("--threads", "4", *PRELOAD), USED, interrupt),
    "gthread, preload, SIGHUP": (("--threads", "4", *PRELOAD), USED, reload),
    "gthread, preload, max-requests": (("--threads", "4", *PRELOAD, "--max-requests", "150"), USED, recycle),
    "sync, SIGTERM": ((), {}, terminate),
    "sync, preload, max-requests": ((*PRELOAD, "--max-requests", "150"), USED, recycle),
    "sync, SIGHUP": ((), {}, reload),
}


@pytest.mark.parametrize("case", CASES)
def test_P6_P7_what_was_answered_is_processed_once(tmp_path: Path, case: str) -> None:
    options, environment, ending = CASES[case]
    with serve(tmp_path, *options, **environment) as (server, clients):
        ending(server, clients)
        told = server.end(40)
        clients.stop()

    assert told.code == 0, told
    assert_nothing_lost(told, clients.answered)
    early = [job for job in told.said("processed") if job.startswith("early")]
    assert len(early) == (60 if environment else 0)
    processes = len(told.said_by("processed")) - bool(environment)
    assert processes > 2 if ending in (reload, recycle) else processes >= 1


def assert_nothing_lost(told: Told, answered: list[str]) -> None:
    accepted, processed = told.said("accepted"), told.said("processed")
    assert len(answered) >= 200
    assert not set(answered) - set(accepted)
    assert not set(accepted) - set(processed), told
    assert len(processed) == len(set(processed)), told
    assert set(told.outcomes()) == {"completed"}, told
