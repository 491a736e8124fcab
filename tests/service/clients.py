"""The service under gunicorn and many clients: what was answered is compared with the table.

    python -m tests.service.clients                 4 workers, 64 clients, 30 seconds; again with a SIGTERM half-way;
                                                    again with workers that are killed, and clients that repeat
    python -m tests.service.clients --seconds 5 …   shorter; --help names the options

Every job carries a tag of its own, so that answers and rows can be compared as sets. It is an error if a job that was
answered has no row, if any has two, if a row belongs to nobody, if a status is not found on every worker, and if the
server does not end well.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "tests" / "scripts"
PATIENCE = 60.0
SAMPLE = 50  # jobs that every worker is asked for

# Newer versions keep a socket for commands, which servers that run side by side would share.
_ALONE = "--no-control-socket"


@dataclass
class Seen:
    """What clients were told; by tag where the job was accepted, with its id."""

    waited: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    codes: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    wrong: list[str] = field(default_factory=list)

    def answered(self) -> dict[str, str]:
        return {**self.accepted, **self.waited}


class Client(threading.Thread):
    """Sends one request after the other until it is stopped; each third one waits, some are arrays or repeated."""

    def __init__(self, number: int, port: int, seen: Seen, stop: threading.Event, run: str) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._run_name = run
        self._number = number
        self._port = port
        self._seen = seen
        self._stop_event = stop
        self._random = random.Random(number)
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        for step in itertools.count():
            if self._stop_event.is_set():
                break
            try:
                self._step(f"{self._run_name}-{self._number}-{step}", step)
            except (OSError, http.client.HTTPException) as error:
                self._count(type(error).__name__)
                self._hang_up()
                time.sleep(0.01)
        self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _step(self, tag: str, step: int) -> None:
        waits, is_array, repeats = step % 3 == 0, step % 10 == 5, step % 7 == 2
        tags = [f"{tag}.{i}" for i in range(5)] if is_array else [tag]
        jobs = [{"user_id": self._number + 1, "amount": 1.5, "status": each} for each in tags]
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": tag} if repeats else {})}
        with self._seen.lock:
            self._seen.sent.update(tags)
        for _ in range(2 if repeats else 1):
            path = "/submit-job?wait=20" if waits else "/submit-job"
            code, body = self._ask("POST", path, json.dumps(jobs if is_array else jobs[0]), headers)
            self._note(code, body if is_array else [body], tags)
        if step % 5 == 4:
            self._look_back()

    def _note(self, code: int, answers: list[Any], tags: list[str]) -> None:
        self._count(str(code))
        if code not in (200, 202):
            return
        into = self._seen.waited if code == 200 else self._seen.accepted
        with self._seen.lock:
            for tag, answer in zip(tags, answers, strict=True):
                into[tag] = answer["jobId"]
                if code == 200 and (answer["status"], answer["result"].get("status")) != ("completed", tag):
                    self._seen.wrong.append(f"{tag}: {answer}")

    def _look_back(self) -> None:
        with self._seen.lock:
            known = list(itertools.islice(self._seen.accepted.items(), 1000))
        if known:
            tag, job_id = self._random.choice(known)
            code, told = self._ask("GET", f"/job-status/{job_id}", None, {})
            self._count(f"status {code}")
            is_fine = code in (429, 503) or (code == 200 and told["status"] in ("pending", "processing", "completed"))
            if not is_fine or (told.get("status") == "completed" and told["result"]["status"] != tag):
                with self._seen.lock:
                    self._seen.wrong.append(f"status of {tag}: {code} {told}")

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> tuple[int, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=40)
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def _count(self, what: str) -> None:
        with self._seen.lock:
            self._seen.codes[what] += 1


class Stubborn(Client):
    """Repeats each request under its key until it is told the outcome; one row is all that may come of it."""

    def _step(self, tag: str, step: int) -> None:
        job = {"user_id": self._number + 1, "amount": 1.5, "status": tag}
        headers = {"Content-Type": "application/json", "Idempotency-Key": tag}
        with self._seen.lock:
            self._seen.sent.add(tag)
        give_up = time.monotonic() + PATIENCE
        code = 0
        while code != 200 and time.monotonic() < give_up:
            try:
                code, body = self._ask("POST", "/submit-job?wait=20", json.dumps(job), headers)
                self._note(code if code == 200 else 0, [body], [tag])
            except (OSError, http.client.HTTPException) as error:
                self._count(type(error).__name__)
                self._hang_up()
            if code != 200:
                time.sleep(0.02)
        if code != 200:
            with self._seen.lock:
                self._seen.wrong.append(f"{tag} is never told its outcome")


@contextmanager
def gunicorn(database: str, workers: int, log: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The service under gunicorn: its port and its process."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening, log.open("wb") as errors:
        alone = [_ALONE] if _knows_flag(_ALONE) else []
        command = [
            *(sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn", "--worker-class", "gthread"),
            *("--workers", str(workers), "--threads", "24", "--graceful-timeout", "30", "--timeout", "60"),
            *("--config", str(SCRIPTS / "gunicorn_settings.py"), "--bind", f"fd://{listening.fileno()}"),
            *("--chdir", str(SCRIPTS), "--log-level", "warning", *alone, *options, "served:app"),
        ]
        environment = {**os.environ, "MICROBATCH_DSN": database, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, env=environment, stderr=errors, start_new_session=True, pass_fds=[listening.fileno()]
        )
        port = listening.getsockname()[1]
    try:
        _wait_until_ready(port, process)
        yield port, process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(PATIENCE)


def _knows_flag(flag: str) -> bool:
    from gunicorn import config

    return any(flag in (setting.cli or ()) for setting in config.KNOWN_SETTINGS)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        assert process.poll() is None, "gunicorn did not start"
        try:
            if get(port, "/readyz")[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    raise AssertionError("gunicorn is not ready")


def get(port: int, path: str) -> tuple[int, Any, str]:
    """One request on a connection of its own: the code, the body, and which worker it was."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=40)) as connection:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers.get("X-Worker", "")


def load(
    port: int,
    clients: int,
    seconds: float,
    run: str,
    harm: Callable[[], object] = lambda: None,
    times: int = 1,
    kind: type[Client] = Client,
) -> Seen:
    """Clients for so long, and so many times, evenly, *harm*."""
    seen, stop = Seen(), threading.Event()
    threads = [kind(number, port, seen, stop, run) for number in range(clients)]
    for thread in threads:
        thread.start()
    for _ in range(times):
        stop.wait(seconds / (times + 1))
        harm()
    stop.wait(seconds / (times + 1))
    stop.set()
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), f"{thread.name} hangs"
    return seen


def kill_a_worker(port: int) -> None:
    """SIGKILL to the worker that answers: gunicorn starts another one."""
    try:
        os.kill(int(get(port, "/healthz")[2]), signal.SIGKILL)
    except (OSError, http.client.HTTPException):
        pass  # it was gone by then


def ask_every_worker(port: int, workers: int, seen: Seen, sample: int) -> int:
    """Ask every worker for a *sample* of the jobs, and any for all; returns how many worker processes answered."""
    for tag, job_id in seen.answered().items():
        _assert_completed(port, tag, job_id)
    found: set[str] = set()
    for tag, job_id in random.Random(0).sample(sorted(seen.answered().items()), min(sample, len(seen.answered()))):
        asked: set[str] = set()
        for _ in range(200 * workers):
            asked.add(_assert_completed(port, tag, job_id))
            if len(asked) == workers:
                break
        assert len(asked) == workers, f"only {len(asked)} workers ever answer"
        found |= asked
    return len(found)


def _assert_completed(port: int, tag: str, job_id: str) -> str:
    give_up = time.monotonic() + PATIENCE
    while True:
        code, told, worker = get(port, f"/job-status/{job_id}")
        assert code == 200, f"{tag}: {code} {told}"
        if told["status"] not in ("pending", "processing"):
            break
        assert time.monotonic() < give_up, f"{tag} stays {told['status']}"
        time.sleep(0.02)
    assert (told["status"], told["result"]["status"]) == ("completed", tag), f"{tag}: {told}"
    return worker


def compare(database: str, seen: Seen, run: str) -> Counter[str]:
    """The answers and the table, as sets; returns the figures."""
    with psycopg.connect(database) as connection:
        query = "SELECT status, count(*) FROM payment_transactions WHERE status LIKE %s GROUP BY status"
        rows = dict(connection.execute(query, [f"{run}-%"]).fetchall())
    assert not seen.wrong, seen.wrong[:5]
    wrong = {
        "doubled": sorted(tag for tag, count in rows.items() if count != 1),
        "lost": sorted(seen.accepted.keys() - rows.keys()),
        "waited for and lost": sorted(seen.waited.keys() - rows.keys()),
        "of nobody": sorted(rows.keys() - seen.sent),
    }
    assert not any(wrong.values()), {what: tags[:5] for what, tags in wrong.items()}
    figures = {"rows": len(rows), "202": len(seen.accepted), "200 after wait": len(seen.waited)}
    return Counter({**figures, "unanswered, written": len(rows.keys() - seen.answered().keys())})


def end(process: subprocess.Popen[bytes]) -> None:
    """The server ends by itself after a SIGTERM."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, f"gunicorn ended with {process.returncode}"


def trial(
    database: str, workers: int, clients: int, seconds: float, directory: Path, sample: int = SAMPLE
) -> list[str]:
    """The three runs; what there is to say about them."""
    said = []
    with gunicorn(database, workers, directory / "calm.log") as (port, process):
        seen = load(port, clients, seconds, "calm")
        answering = ask_every_worker(port, workers, seen, sample)
        figures = compare(database, seen, "calm")
        said.append(f"calm: {dict(figures)}, {dict(seen.codes)}, statuses found on {answering} workers")
        seen = load(port, clients, seconds, "term", lambda: process.send_signal(signal.SIGTERM))
        assert process.wait(PATIENCE) == 0, f"gunicorn ended with {process.returncode}"
        figures = compare(database, seen, "term")
    said.append(f"SIGTERM half-way: {dict(figures)}, {dict(seen.codes)}")
    assert seen.waited
    assert seen.accepted
    with gunicorn(database, workers, directory / "kill.log") as (port, process):
        kills = max(2, int(seconds / 3))
        seen = load(port, clients, seconds, "kill", lambda: kill_a_worker(port), kills, Stubborn)
        figures = compare(database, seen, "kill")
        assert seen.sent == seen.waited.keys()
        end(process)
    said.append(f"SIGKILL to {kills} workers: {dict(figures)}, {dict(seen.codes)}")
    return said


def main() -> int:
    from microbatch.embedded import EmbeddedPostgres

    parser = argparse.ArgumentParser(prog="python -m tests.service.clients", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the three runs")
    given = parser.parse_args()
    with EmbeddedPostgres() as server, tempfile.TemporaryDirectory() as directory:
        for line in trial(server.dsn, given.workers, given.clients, given.seconds, Path(directory)):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
