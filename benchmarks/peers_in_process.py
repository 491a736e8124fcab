"""No-op jobs through other batchers and executors: everything at once, and clients that wait for each job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from in_process import at_once, no_op
from loops import Loop, closed_loop, closed_loop_of_tasks
from textbook import TimerBatcher

from microbatch import MicroBatcher

SIZE = 1000
Submit = Callable[[int], "Future[Any]"]


@dataclass(frozen=True)
class Peer:
    """*at_once* takes a number of jobs and returns jobs per second; *loop* takes clients and seconds."""

    name: str
    package: str
    at_once: Callable[[int], float]
    loop: Callable[[int, float], Loop]


def number(value: int) -> int:
    return value


def nothing(batch: list[Any]) -> list[None]:
    return [None] * len(batch)


# With threads


@contextmanager
def microbatch() -> Iterator[Submit]:
    with MicroBatcher[int, None](lambda batch: None, max_batch_size=SIZE, max_outstanding=100_000) as batcher:
        yield batcher.submit


@contextmanager
def executor(threads: int) -> Iterator[Submit]:
    with ThreadPoolExecutor(threads) as pool:
        yield partial(pool.submit, no_op)


@contextmanager
def timer(interval: float) -> Iterator[Submit]:
    batcher = TimerBatcher(nothing, SIZE, interval)
    try:
        yield batcher.submit
    finally:
        batcher.close()


def threaded(name: str, opened: Callable[[], Any]) -> Peer:
    def all_at_once(jobs: int) -> float:
        with opened() as submit:
            return at_once(submit, jobs)

    def loop(clients: int, seconds: float) -> Loop:
        with opened() as submit:
            return closed_loop(lambda job: submit(job).result(), clients, seconds, number)

    return Peer(name, "microbatch", all_at_once, loop)


def with_batched(milliseconds: float) -> Peer:
    """It sleeps between two looks at its queue, 5 ms where nobody says otherwise; its limit of a batch is ours here."""

    @contextmanager
    def opened() -> Iterator[Any]:
        from batched import BatchProcessor

        processor = BatchProcessor(nothing, batch_size=SIZE, timeout_ms=milliseconds)
        try:
            yield processor
        finally:
            processor.shutdown()

    def all_at_once(jobs: int) -> float:
        with opened() as processor:
            begin = time.perf_counter()
            assert len(processor(list(range(jobs)))) == jobs
            return jobs / (time.perf_counter() - begin)

    def loop(clients: int, seconds: float) -> Loop:
        with opened() as processor:
            return closed_loop(processor, clients, seconds, number)

    return Peer(f"batched, {milliseconds:g} ms", "batched", all_at_once, loop)


# With asyncio: one thread, so no job pays for a switch


def with_async_batcher(milliseconds: float) -> Peer:
    """It waits so long for each further job, 10 ms where nobody says otherwise."""

    def opened() -> Any:
        from async_batcher.batcher import AsyncBatcher

        class NoOp(AsyncBatcher):
            async def process_batch(self, batch: list[Any]) -> list[None]:
                return nothing(batch)

        return NoOp(max_batch_size=SIZE, max_queue_time=milliseconds / 1000)

    async def all_at_once(jobs: int) -> float:
        batcher = opened()
        rate = await gathered(batcher.process, jobs)
        await batcher.stop()
        return rate

    async def loop(clients: int, seconds: float) -> Loop:
        batcher = opened()
        measured = await closed_loop_of_tasks(batcher.process, clients, seconds, number)
        await batcher.stop()
        return measured

    return tasks(f"async-batcher (asyncio), {milliseconds:g} ms", "async_batcher", all_at_once, loop)


def data_loader() -> Any:
    from aiodataloader import DataLoader

    class NoOp(DataLoader):
        cache = False
        max_batch_size = SIZE

        async def batch_load_fn(self, keys: list[Any]) -> list[None]:
            return nothing(keys)

    return NoOp()


async def data_loader_at_once(jobs: int) -> float:
    return await gathered(data_loader().load, jobs)


async def data_loader_loop(clients: int, seconds: float) -> Loop:
    return await closed_loop_of_tasks(data_loader().load, clients, seconds, number)


async def gathered(process: Callable[[int], Any], jobs: int) -> float:
    begin = time.perf_counter()
    await asyncio.gather(*[process(job) for job in range(jobs)])
    return jobs / (time.perf_counter() - begin)


def tasks(name: str, package: str, all_at_once: Callable[..., Any], loop: Callable[..., Any]) -> Peer:
    return Peer(
        name,
        package,
        lambda jobs: float(asyncio.run(all_at_once(jobs))),
        lambda clients, seconds: asyncio.run(loop(clients, seconds)),
    )


PEERS = [
    threaded("MicroBatcher", microbatch),
    threaded("ThreadPoolExecutor(1)", partial(executor, 1)),
    threaded("ThreadPoolExecutor(8)", partial(executor, 8)),
    threaded("textbook, timer of 5 ms", partial(timer, 0.005)),
    with_batched(5),
    with_batched(0.1),
    with_async_batcher(10),
    with_async_batcher(0),
    tasks("aiodataloader (asyncio)", "aiodataloader", data_loader_at_once, data_loader_loop),
]
