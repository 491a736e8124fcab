"""What the programs of the tests share: a ledger of whole lines, whoever dies, and processors that write into it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from microbatch import MicroBatcher, OutcomeUnknown, RetryPolicy

_ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
with contextlib.suppress(OSError):  # under mod_wsgi, which has no file behind stderr, and signals of its own
    faulthandler.register(signal.SIGUSR1)


def note(word: str, *things: object) -> None:
    """One line: the word, the process, the things. One write, so lines of many processes do not mix."""
    os.write(_ledger, (" ".join([word, str(os.getpid()), *map(str, things)]) + "\n").encode())


def note_all(word: str, things: Iterable[object]) -> None:
    pid = os.getpid()
    os.write(_ledger, "".join(f"{word} {pid} {thing}\n" for thing in things).encode())


def outcome(future: Any) -> str:
    """One word for a future that is done."""
    if not future.done():
        return "unresolved"
    if future.cancelled():
        return "cancelled"
    error = future.exception(0)
    if error is None:
        return "completed"
    return f"{'unknown' if isinstance(error, OutcomeUnknown) else 'failed'}:{type(error).__name__}"


class Writer:
    """Notes each job that it does, after *seconds* a batch; the first *failures* attempts raise and may be retried."""

    def __init__(self, seconds: float = 0.0, failures: int = 0, stuck: bool = False) -> None:
        self.seconds = seconds
        self.failures = failures
        self.stuck = stuck

    def process(self, batch: Any) -> list[Any]:
        if self.stuck:
            note("stuck")
            threading.Event().wait()
        time.sleep(self.seconds)
        if batch.attempt <= self.failures:
            raise ConnectionError("not yet")
        note_all("processed", batch)
        return list(batch)

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, ConnectionError)

    def close(self) -> None:
        note("closed")


class Gated(Writer):
    """In the process that made it, works only once `gate` is set; with *failing* it raises until then."""

    def __init__(self, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing
        self.gate = threading.Event()
        self.home = os.getpid()

    def process(self, batch: Any) -> list[Any]:
        if os.getpid() == self.home:
            if self.failing and not self.gate.is_set():
                raise ConnectionError("not yet")
            self.gate.wait()
        return super().process(batch)


class Later(RetryPolicy):
    """Tries again after *backoff* seconds, without jitter."""

    def delay(self, attempts: int, draw: Any = None) -> float:
        return self.backoff


def submit(batcher: MicroBatcher[Any, Any], jobs: Iterable[Any], **options: Any) -> list[Any]:
    """Submit *jobs* and note what was accepted; the outcome is noted by a callback."""
    return [submit_one(batcher, job, **options) for job in jobs]


def submit_together(batcher: MicroBatcher[Any, Any], jobs: Iterable[Any]) -> list[Any]:
    """As `submit`, in one batch."""
    jobs = list(jobs)
    futures = batcher.submit_many(jobs)
    note_all("accepted", jobs)
    for job, future in zip(jobs, futures, strict=True):
        future.add_done_callback(lambda future, job=job: note("outcome", job, outcome(future)))
    return futures


def submit_one(batcher: MicroBatcher[Any, Any], job: Any, **options: Any) -> Any:
    future = batcher.submit(job, **options)
    note("accepted", job)
    future.add_done_callback(lambda future: note("outcome", job, outcome(future)))
    return future


def child(work: Any) -> int:
    """Fork; the child does *work* and ends, without a word to the interpreter. The pid."""
    pid = os.fork()
    if pid == 0:
        run_and_end(work)
    return pid


def run_and_end(work: Any) -> None:
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def join(pid: int) -> None:
    """Wait for a child and note how it ended."""
    _, status = os.waitpid(pid, 0)
    note("joined", os.waitstatus_to_exitcode(status))


def hookless_child(work: Any) -> int:
    """As `child`, by a fork that runs no hooks of Python, like uWSGI's."""
    pid = hookless_fork()
    if pid == 0:
        run_and_end(work)
    return pid


def hookless_fork() -> int:
    wait_until_threads_sleep()
    return int(ctypes.PyDLL(None).fork())


def wait_until_threads_sleep() -> None:
    """The other threads must not be about to run: one that waits for the interpreter's lock at the fork leaves a
    condition variable behind that the child, which knows nothing of the fork, can hang on.
    """
    if not os.path.isdir("/proc/self/task"):
        time.sleep(0.1)
        return
    give_up = time.monotonic() + 20
    looks, before = 0, None
    while looks < 5:
        assert time.monotonic() < give_up, before
        time.sleep(0.02)
        now = _other_threads()
        looks = looks + 1 if now == before and all("(sleeping)" in lines for lines in now.values()) else 0
        before = now


def _other_threads() -> dict[str, str]:
    """State and number of sleeps, by thread."""
    found = {}
    for thread in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
        try:
            with open(f"/proc/self/task/{thread}/status") as status:
                found[thread] = "".join(line for line in status if line.startswith(("State:", "voluntary_ctxt")))
        except OSError:
            pass  # it has ended
    return found
