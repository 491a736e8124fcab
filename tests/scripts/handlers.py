"""Signal handlers at random moments of the main thread: `handlers.py WAYS TRIES WORK QUESTION`.

WORK is what the main thread is at, QUESTION what the handler asks of the batcher; `fork` leaves it to both processes to
go on with what they were at. A hang is told by faulthandler, with an exit status of 1.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import as_completed, wait
from typing import Any

from ledger import note

from microbatch import BatcherClosed, ForkedError, JobFailed, MicroBatcher, QueueFull

BOUND = 20.0
tries, work, question = int(sys.argv[1]), sys.argv[2], sys.argv[3]
others = int(sys.argv[4]) if len(sys.argv) > 4 else 0
seed = random.randrange(1_000_000)
note("seed", seed)
dice = random.Random(seed)
handled = False
forked = False
children: list[int] = []
futures: list[Any] = []
refused = 0


def echo(batch: Any) -> list[Any]:
    return list(batch)


def new() -> MicroBatcher[Any, Any]:
    batcher = MicroBatcher[Any, Any](echo, delivery_timeout=BOUND, max_outstanding=2 if work == "full" else 10_000)
    if work != "first submit":
        batcher.execute("first")
    return batcher


WORKS: dict[str, Callable[[], object]] = {
    "submit": lambda: futures.append(batcher.submit(1)),
    "first submit": lambda: futures.append(batcher.submit(1)),
    "submit with an id": lambda: futures.append(batcher.submit(1, job_id=str(dice.random()))),
    "submit_many": lambda: futures.extend(batcher.submit_many([1] * 10)),
    "full": lambda: futures.append(batcher.submit(1)),
    "wait": lambda: (futures.append(batcher.submit(1)), wait(futures[-1:], 0.001)),
    "execute": lambda: batcher.execute(1),
    "cancel": lambda: (futures.append(batcher.submit(1)), futures[-1].cancel(), batcher.stats()),
    "flush": lambda: (futures.append(batcher.submit(1)), batcher.flush(0.01)),
    "shutdown": lambda: (futures.append(batcher.submit(1)), batcher.shutdown()),
}


def fork() -> None:
    global forked
    child = os.fork()
    if child:
        children.append(child)
    else:
        forked = True
        children.clear()
        faulthandler.dump_traceback_later(BOUND, exit=True)


def look() -> None:
    assert batcher.submit("x", job_id="a").status
    assert batcher.status("a")
    batcher.on(JobFailed, note)
    batcher.off(JobFailed, note)
    batcher.stats()


QUESTIONS: dict[str, Callable[[], object]] = {
    "execute": lambda: batcher.execute("h"),
    "result": lambda: batcher.submit("h").result(),
    "result within a time": lambda: batcher.submit("h").result(BOUND),
    "wait": lambda: wait([batcher.submit("h")]),
    "as_completed": lambda: list(as_completed([batcher.submit("h")])),
    "flush": lambda: batcher.flush(),
    "shutdown": lambda: batcher.shutdown(),
    "cancel": lambda: futures.append(batcher.submit("h")) or futures[-1].cancel(),  # type: ignore[func-returns-value]
    "look": look,
    "fork": fork,
}


def handle(number: int, frame: object) -> None:
    global handled, refused
    handled = True
    try:
        QUESTIONS[question]()
    except (BatcherClosed, QueueFull):
        pass
    except RuntimeError as error:
        if "would wait for itself" not in str(error):
            raise
        refused += 1


def submit_beside(stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            wait([batcher.submit(0)], 0.01)
        except (BatcherClosed, QueueFull):
            pass


def interrupted_at_work() -> None:
    global handled
    handled = False
    futures.clear()
    if question != "fork":  # a child would wait for the thread of it
        faulthandler.dump_traceback_later(BOUND, exit=True)
    signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 4e-4))
    give_up = time.monotonic() + 0.2
    while not handled and time.monotonic() < give_up:
        try:
            WORKS[work]()
        except (BatcherClosed, QueueFull, ForkedError):
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)


def settle() -> None:
    """Every future ends, and the batcher works or is shut down."""
    assert not wait(futures, BOUND).not_done, [future for future in futures if not future.done()]
    if "shutdown" not in (work, question):
        assert batcher.submit("y").result(BOUND) == "y"
        assert {future.status.value for future in futures} <= {"completed", "cancelled", "unknown"}, futures
    if forked:
        assert batcher.shutdown(timeout=BOUND).finished
        assert batcher.stats().outstanding == 0


def reap() -> None:
    while children:
        assert os.waitpid(children.pop(), 0)[1] == 0, "a child is not well"


signal.signal(signal.SIGALRM, handle)
batcher = new()
for number in range(tries):
    if number and ("shutdown" in (work, question) or work == "first submit" or number % 20 == 0):
        assert batcher.shutdown(timeout=BOUND).finished
        batcher = new()
    stop = threading.Event()
    beside = [threading.Thread(target=submit_beside, args=(stop,), daemon=True) for _ in range(others)]
    for thread in beside:
        thread.start()
    interrupted_at_work()
    if forked:
        try:
            settle()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    stop.set()
    for thread in beside:
        thread.join()
    settle()
    reap()
assert batcher.shutdown(timeout=BOUND).finished
note("done", tries, refused)
