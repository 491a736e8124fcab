"""Callers of a batcher that are interrupted at random, in every way to wait for a job: `storm.py KIND NUMBER`.

KIND is `signals` (one thread, a handler that raises) or `asynchronous` (four threads, an exception set by a fifth).
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures as cf
from typing import Any

from ledger import note

from microbatch import MicroBatcher

# An interrupt inside a callback counts as the callback's own and is logged.
logging.disable()
sys.setswitchinterval(1e-6)
kind, number = sys.argv[1], int(sys.argv[2])
seed = random.randrange(1_000_000)
note("seed", seed)
dice = random.Random(seed)
give_up = time.monotonic() + 20.0
interrupts = itertools.count()
jobs = itertools.count(1)
suffered = 0


class Interrupt(BaseException):
    pass


def process(batch: Any) -> list[Any]:
    return [job if job % 7 else ValueError(job) for job in batch]


batcher = MicroBatcher[int, int](process, max_batch_size=5, max_outstanding=100_000)
HOW = (cf.ALL_COMPLETED, cf.FIRST_COMPLETED, cf.FIRST_EXCEPTION)


def wait_somehow(futures: list[Any], own: random.Random, called: list[Any]) -> bool:
    """One call that may be interrupted; whether a callback was added."""
    timeout = own.choice((0, 0.001, None))
    way = own.randrange(7)
    if way == 0:
        futures[0].result(timeout)
    elif way == 1:
        futures[-1].exception(timeout)
    elif way == 2:
        cf.wait(futures, timeout, own.choice(HOW))
    elif way == 3:
        seen = list(cf.as_completed(futures, timeout))
        assert len(seen) == len(set(seen)) == len(futures)
    elif way == 4:
        futures[-1].cancel()
    elif way == 5:
        futures[0].add_done_callback(called.append)
        return True
    else:
        assert futures[0].status
        assert futures[-1].job_id
        assert repr(futures)
    return False


class Client:
    def __init__(self, seed: int, arm: Callable[[], None], calm: Callable[[], None]) -> None:
        self.own = random.Random(seed)
        self.arm, self.calm = arm, calm
        self.futures: list[Any] = []
        self.callbacks: list[tuple[Any, list[Any]]] = []

    def run(self) -> None:
        while suffered < number and time.monotonic() < give_up:
            futures = [batcher.submit(next(jobs)) for _ in range(self.own.randrange(1, 6))]
            self.futures += futures
            for _ in range(self.own.randrange(1, 4)):
                self.suffer(futures)

    def suffer(self, futures: list[Any]) -> None:
        global suffered
        called: list[Any] = []
        added = False
        try:
            try:
                self.arm()
                added = wait_somehow(futures, self.own, called)
            except (ValueError, cf.TimeoutError, cf.CancelledError):
                pass
            self.calm()
        except Interrupt:
            suffered = next(interrupts) + 1
        except RuntimeError as error:
            # A `with` of the stdlib that was interrupted half-way failed to release its lock.
            if not isinstance(error.__context__, Interrupt):
                raise
        self.calm()
        if added:
            self.callbacks.append((futures[0], called))

    def check(self) -> None:
        for future in self.futures:
            try:
                future.result(20)
            except (ValueError, cf.CancelledError):
                pass
        assert not cf.wait(self.futures, 20).not_done
        assert len(list(cf.as_completed(self.futures, 20))) == len(self.futures)
        assert batcher.flush(20)

    def check_callbacks(self) -> None:
        """After the shutdown: callbacks come after the outcome."""
        for future, called in self.callbacks:
            assert called == [future], "each callback once"


def by_signals() -> list[Client]:
    armed = False

    def handler(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupt

    def arm() -> None:
        nonlocal armed
        armed = True
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.000_005, 0.000_25), 0.000_2)

    def calm() -> None:
        nonlocal armed
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, handler)
    client = Client(seed, arm, calm)
    client.run()
    return [client]


def by_asynchronous_exceptions() -> list[Client]:
    lock = threading.Lock()
    armed: set[int] = set()

    def arm() -> None:
        armed.add(threading.get_ident())

    def calm() -> None:
        with lock:
            armed.discard(threading.get_ident())
        # One that is under way arrives before the next line.
        sum(map(abs, range(10)))

    clients = [Client(seed + n, arm, calm) for n in range(4)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with lock:
            victim = next(iter(armed.copy()), None)
            if victim is not None:
                armed.discard(victim)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim), ctypes.py_object(Interrupt))
        time.sleep(dice.uniform(0, 0.000_2))
    return clients


clients = by_signals() if kind == "signals" else by_asynchronous_exceptions()
for client in clients:
    client.check()
stats = batcher.stats()
assert stats.unknown == stats.outstanding == 0, stats
assert batcher.execute(1) == 1, "the worker is alive"
assert batcher.shutdown(timeout=20).finished
for client in clients:
    client.check_callbacks()
note("interrupts", suffered)
note("over", "ok")
