"""`microbatch serve` as a process."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

PATIENCE = 60.0
JSON = {"Content-Type": "application/json"}


@dataclass
class Serving:
    """A running one."""

    process: subprocess.Popen[str]
    said: list[str]

    @property
    def port(self) -> int:
        found = re.search(r"^microbatch serves on http://127\.0\.0\.1:([0-9]+)/$", self.said[0])
        assert found is not None, self.said
        return int(found[1])

    @property
    def admin_token(self) -> str:
        return next(line.rpartition(": ")[2] for line in self.said if line.startswith("admin token"))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {**(JSON if data else {}), **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(*options: str, lines: int = 1, **environment: str) -> Iterator[Serving]:
    """Start it on a free port, and read so many lines of what it says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "microbatch", "serve", "--port", "0", *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # A read of a server that never says anything ends with it.
    alarm = threading.Timer(PATIENCE, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        said = [process.stdout.readline().rstrip("\n") for _ in range(lines)]
        alarm.cancel()
        yield Serving(process, said)
    finally:
        alarm.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
