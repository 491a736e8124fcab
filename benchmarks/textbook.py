"""The batcher that anybody writes first: a queue, a thread, and a batch when it is full or when the time is up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class TimerBatcher:
    def __init__(self, process: Callable[[list[Any]], Sequence[Any]], size: int, interval: float) -> None:
        self._process = process
        self._size = size
        self._interval = interval
        self._queue: queue.Queue[tuple[Any, Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, job: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((job, future))
        return future

    def execute(self, job: Any) -> Any:
        return self.submit(job).result()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing and (first := self._queue.get()) is not None:
            batch = [first]
            deadline = time.monotonic() + self._interval
            while len(batch) < self._size:
                try:
                    item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if item is None:
                    closing = True
                    break
                batch.append(item)
            self._settle(batch)

    def _settle(self, batch: list[tuple[Any, Future[Any]]]) -> None:
        try:
            results = self._process([job for job, _ in batch])
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
