"""Runs small programs in processes of their own, and reads what they wrote into their ledger. Every wait is bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
_PATH = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))

PREAMBLE = """\
import atexit, gc, logging, os, signal, sys, threading, time
from ledger import *
from microbatch import *
"""

# Far above what anything here takes: a program that needs it hangs.
PATIENCE = 60.0


@dataclass(repr=False)
class Told:
    """How a program ended and what it wrote."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    lines: list[list[str]]

    def __repr__(self) -> str:
        counts = dict(Counter(line[0] for line in self.lines))
        last = "\n".join(" ".join(line) for line in self.lines[-10:])
        errors = self.stderr[-6000:]
        return f"exit code {self.code} after {self.seconds:.2f} s, {counts}, the last:\n{last}\nstderr:\n{errors}"

    def said(self, word: str) -> list[str]:
        """The things noted under *word*, in order, without the process."""
        return [" ".join(line[2:]) for line in self.lines if line[0] == word]

    def said_by(self, word: str) -> dict[str, list[str]]:
        """The same by process."""
        found: dict[str, list[str]] = {}
        for line in self.lines:
            if line[0] == word:
                found.setdefault(line[1], []).append(" ".join(line[2:]))
        return found

    def outcomes(self) -> Counter[str]:
        return Counter(line.rsplit(" ", 1)[1] for line in self.said("outcome"))

    def assert_drained(self, jobs: int | None = None) -> None:
        """Accepted, processed and completed are the same set, once each."""
        accepted, processed = self.said("accepted"), self.said("processed")
        if jobs is not None:
            assert len(accepted) == jobs, self
        assert sorted(processed) == sorted(accepted), self
        assert len(set(processed)) == len(processed), self
        assert self.outcomes() == {"completed": len(accepted)}, self

    def assert_quiet(self, code: int = 0) -> None:
        """Nothing but single lines of its log: every line of a traceback is another one."""
        loud = [line for line in self.stderr.splitlines() if not line.startswith("microbatch: ")]
        assert (self.code, loud) == (code, []), self


class Program:
    """A running one. Use it in a `with`: whatever is left of it, children included, is killed at the end."""

    def __init__(
        self, script: str, directory: Path, *arguments: str, preamble: str = PREAMBLE, **environment: str
    ) -> None:
        path = directory / "program.py"
        path.write_text(preamble + textwrap.dedent(script))
        # Python 3.12 and later warn of every fork beside a thread.
        self._begin([sys.executable, "-W", "ignore::DeprecationWarning", str(path), *arguments], directory, environment)

    def _begin(self, command: list[str], directory: Path, environment: dict[str, str], **options: object) -> None:
        self.ledger = directory / "ledger"
        self.ledger.touch()
        self.began = time.monotonic()
        self._errors = (directory / "stderr").open("w+")
        self._output = (directory / "stdout").open("w+")
        # Files and not pipes: a child that outlives the program must not keep the reader waiting.
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "LEDGER": str(self.ledger), "PYTHONPATH": _PATH, **environment},
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._errors.close()
        self._output.close()

    def lines(self) -> list[list[str]]:
        # Up to the last whole one: another process may be in the middle of its line.
        return [line.split() for line in self.ledger.read_text().rpartition("\n")[0].splitlines()]

    def wait_for(self, word: str, count: int = 1) -> None:
        """Until the program noted *word* so often."""
        give_up = time.monotonic() + PATIENCE
        while sum(line[0] == word for line in self.lines()) < count:
            assert self.process.poll() is None, self._told(0.0)
            if time.monotonic() > give_up:
                self._fail(f"{word!r} not noted {count} times")
            time.sleep(0.005)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, patience: float = PATIENCE) -> Told:
        """Wait for its end."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self._fail(f"still there after {patience} s")
        return self._told(time.monotonic() - self.began)

    def _told(self, seconds: float) -> Told:
        self._errors.seek(0)
        self._output.seek(0)
        return Told(self.process.returncode, self._output.read(), self._errors.read(), seconds, self.lines())

    def _fail(self, what: str) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGUSR1)  # faulthandler tells where the threads are
        except ProcessLookupError:
            pass
        time.sleep(0.5)
        raise AssertionError(f"{what}: {self._told(0.0)}")


def run(
    script: str,
    directory: Path,
    *arguments: str,
    patience: float = PATIENCE,
    preamble: str = PREAMBLE,
    **environment: str,
) -> Told:
    with Program(script, directory, *arguments, preamble=preamble, **environment) as program:
        return program.end(patience)
