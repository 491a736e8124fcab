"""Clients that wait for their row before they send the next one, and clients that send at a given rate."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from report import percentile

Client = tuple[float, float, list[float]]


@dataclass(frozen=True)
class Loop:
    """Jobs per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


def closed_loop(write: Callable[[Any], Any], threads: int, seconds: float, job: Callable[[int], Any]) -> Loop:
    gate = threading.Barrier(threads)

    def client() -> Client:
        latencies: list[float] = []
        gate.wait()
        begin = last = time.perf_counter()
        while last - begin < seconds:
            write(job(len(latencies)))
            now = time.perf_counter()
            latencies.append(now - last)
            last = now
        return begin, last, latencies

    with ThreadPoolExecutor(threads) as executor:
        return summed([future.result() for future in [executor.submit(client) for _ in range(threads)]])


async def closed_loop_of_tasks(
    write: Callable[[Any], Awaitable[Any]], tasks: int, seconds: float, job: Callable[[int], Any]
) -> Loop:
    async def client() -> Client:
        latencies: list[float] = []
        begin = last = time.perf_counter()
        while last - begin < seconds:
            await write(job(len(latencies)))
            now = time.perf_counter()
            latencies.append(now - last)
            last = now
        return begin, last, latencies

    return summed(await asyncio.gather(*[client() for _ in range(tasks)]))


def summed(clients: list[Client]) -> Loop:
    ordered = sorted(latency for _, _, latencies in clients for latency in latencies)
    elapsed = max(end for _, end, _ in clients) - min(begin for begin, _, _ in clients)
    return Loop(len(ordered) / elapsed, percentile(ordered, 0.5) * 1000, percentile(ordered, 0.99) * 1000)


def open_loop(
    submit: Callable[[Any], Future[Any]], rate: float, seconds: float, job: Callable[[int], Any], senders: int = 4
) -> Loop:
    """Jobs sent at fixed times, whether or not the earlier ones are back; latency counts from the time it was due."""
    gate = threading.Barrier(senders)
    share = int(rate * seconds / senders)
    pause = threading.Event()  # never set

    def client(number: int) -> Client:
        latencies: list[float] = []
        futures: list[Future[Any]] = []
        gate.wait()
        begin = time.perf_counter()
        for i in range(share):
            due = begin + (i + number / senders) * senders / rate
            pause.wait(max(0.0, due - time.perf_counter()))
            future = submit(job(i))
            future.add_done_callback(lambda _, due=due: latencies.append(time.perf_counter() - due))
            futures.append(future)
        for future in futures:
            future.result()
        return begin, time.perf_counter(), latencies

    with ThreadPoolExecutor(senders) as executor:
        return summed([future.result() for future in [executor.submit(client, n) for n in range(senders)]])
