"""What does a job cost inside the process?

No-op jobs through `MicroBatcher` against `ThreadPoolExecutor(1)`, which has one worker thread and a `Future` per
job as well: all submitted and then awaited, and by threads that wait for each job before they submit the next.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from report import absolute, interleaved, keep, machine, ratio

from microbatch import MicroBatcher

Submit = Callable[[int], "Future[Any]"]


def no_op(number: int) -> None:
    """What the executor runs; the batcher's processor answers None for all jobs at once."""


def at_once(submit: Submit, jobs: int) -> float:
    """Jobs per second from the first submit to the last result."""
    begin = time.perf_counter()
    for future in [submit(number) for number in range(jobs)]:
        future.result()
    return jobs / (time.perf_counter() - begin)


def closed_loop(submit: Submit, jobs: int, threads: int) -> float:
    each = jobs // threads
    gate = threading.Barrier(threads + 1)

    def client() -> None:
        gate.wait()
        for number in range(each):
            submit(number).result()

    clients = [threading.Thread(target=client) for _ in range(threads)]
    for thread in clients:
        thread.start()
    gate.wait()
    begin = time.perf_counter()
    for thread in clients:
        thread.join()
    return each * threads / (time.perf_counter() - begin)


def with_batcher(measure: Callable[[Submit], float], options: dict[str, Any]) -> float:
    with MicroBatcher[int, None](lambda batch: None, **options) as batcher:
        return measure(batcher.submit)


def with_executor(measure: Callable[[Submit], float]) -> float:
    with ThreadPoolExecutor(1) as executor:
        return measure(partial(executor.submit, no_op))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--threads", type=int, nargs="*", default=[16], help="of the closed loop")
    parser.add_argument("--max-batch-size", type=int, default=1000)
    arguments = parser.parse_args()
    options = {"max_batch_size": arguments.max_batch_size, "max_outstanding": arguments.jobs}
    shapes: dict[str, Callable[[Submit], float]] = {
        "submit all, then wait": partial(at_once, jobs=arguments.jobs),
    }
    for threads in arguments.threads:
        shapes[f"closed loop, {threads} threads"] = partial(closed_loop, jobs=arguments.jobs // 4, threads=threads)

    print(f"No-op jobs per second, MicroBatcher against ThreadPoolExecutor(1)\n\n{machine('microbatch')}")
    print(f"  settings  {vars(arguments)}; medians, in brackets the extremes\n")
    for name, measure in shapes.items():
        rates = interleaved(
            {
                "MicroBatcher": partial(with_batcher, measure, options),
                "ThreadPoolExecutor(1)": partial(with_executor, measure),
            },
            arguments.repetitions,
        )
        keep(name, rates)
        ours, theirs = rates.values()
        print(f"{name}\n" + "\n".join(absolute(side, values, "jobs/s") for side, values in rates.items()))
        print(ratio("ratio", ours, theirs) + "\n")


if __name__ == "__main__":
    main()
