"""Does a job cost the same, few or many of them, and what does it hold?

No-op jobs, in process. Microseconds per job of bursts of 1 to the bound of outstanding jobs; of 1 to 512 threads that
wait for each job, against `ThreadPoolExecutor(1)`; of batch sizes from 1 to 10,000; of 1 to 4 workers. Bytes that an
outstanding job holds, by tracemalloc, its future included and its payload not. What an idle batcher does.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from in_process import with_batcher, with_executor
from loops import closed_loop
from report import absolute, interleaved, keep, machine, ratio

from microbatch import MicroBatcher

Submit = Callable[[int], Any]
BOUND = 10_000  # max_outstanding, as it is by default


def bursts(submit: Submit, outstanding: int, jobs: int) -> float:
    """Microseconds per job, *outstanding* submitted and awaited before the next."""
    rounds = max(1, jobs // outstanding)
    begin = time.perf_counter()
    for _ in range(rounds):
        for future in [submit(number) for number in range(outstanding)]:
            future.result()
    return (time.perf_counter() - begin) / (rounds * outstanding) * 1e6


def waiting(submit: Submit, threads: int, seconds: float) -> float:
    """Microseconds per job of threads that wait for each."""
    return 1e6 / closed_loop(lambda job: submit(job).result(), threads, seconds, int).rate


def report(
    section: str, variants: dict[str, Callable[[], float]], first: str, repetitions: int, unit: str = "µs"
) -> None:
    measured = interleaved(variants, repetitions)
    keep(section, measured)
    print(section)
    print("\n".join(absolute(name, values, unit) for name, values in measured.items()))
    print("\n".join(ratio(f"{name} to {first}", measured[name], measured[first]) for name in measured if name != first))
    print()


def report_outstanding(arguments: argparse.Namespace) -> None:
    options = {"max_batch_size": 1000, "max_outstanding": BOUND}
    variants = {
        f"{n} outstanding": partial(with_batcher, partial(bursts, outstanding=n, jobs=arguments.jobs), options)
        for n in arguments.outstanding
    }
    report("microseconds per job, bursts", variants, "1000 outstanding", arguments.repetitions)


def report_threads(arguments: argparse.Namespace) -> None:
    for threads in arguments.threads:
        measure = partial(waiting, threads=threads, seconds=arguments.seconds)
        variants = {
            "MicroBatcher": partial(with_batcher, measure, {}),
            "ThreadPoolExecutor(1)": partial(with_executor, measure),
        }
        section = f"microseconds per job, {threads} waiting thread{'s' if threads > 1 else ''}"
        report(section, variants, "ThreadPoolExecutor(1)", arguments.repetitions)


def report_options(arguments: argparse.Namespace) -> None:
    measure = partial(bursts, outstanding=BOUND, jobs=arguments.jobs)
    sizes = {
        f"max_batch_size {size}": partial(with_batcher, measure, {"max_batch_size": size, "max_outstanding": BOUND})
        for size in (1, 10, 100, 1000, 10_000)
    }
    report("microseconds per job, by batch size", sizes, "max_batch_size 1000", arguments.repetitions)
    workers = {
        f"max_concurrent_batches {n}": partial(with_batcher, measure, {"max_concurrent_batches": n})
        for n in (1, 2, 3, 4)
    }
    report("microseconds per job, by workers", workers, "max_concurrent_batches 1", arguments.repetitions)


def report_memory(jobs: int) -> None:
    """A worker is held inside the processor, so that all jobs are outstanding at once."""
    held = threading.Event()
    with MicroBatcher[int, None](lambda batch: held.wait(60), max_outstanding=jobs + 1) as batcher:
        batcher.submit(0)
        futures: list[Any] = [None] * jobs
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(jobs):
                futures[number] = batcher.submit(0)
            gc.collect()
            held_bytes = tracemalloc.get_traced_memory()[0] / jobs
        finally:
            tracemalloc.stop()
            held.set()
    keep("bytes per outstanding job", {"MicroBatcher": [held_bytes]})
    print(f"memory, {jobs} outstanding\n" + absolute("an outstanding job", [held_bytes], "bytes") + "\n")


def report_idle(seconds: float) -> None:
    """Of all threads of the batcher, after the last job is settled and what it rang for is over."""
    before = {thread.native_id for thread in threading.enumerate()}
    with MicroBatcher[int, None](lambda batch: None) as batcher:
        batcher.execute(0)
        ours = [thread.native_id for thread in threading.enumerate() if thread.native_id not in before]
        pause = threading.Event()  # never set
        pause.wait(1)
        wakes, cpu = wake_ups(ours), time.process_time()
        pause.wait(seconds)
        idle = {"wake-ups": [wake_ups(ours) - wakes], "CPU milliseconds": [(time.process_time() - cpu) * 1000]}
    keep("idle", idle)
    print(f"idle for {seconds:g} seconds, {len(ours)} threads")
    print("\n".join(absolute(name, values, "") for name, values in idle.items()) + "\n")


def wake_ups(threads: list[int | None]) -> int:
    status = [Path(f"/proc/{os.getpid()}/task/{thread}/status").read_text().splitlines() for thread in threads]
    return sum(int(line.split()[1]) for lines in status for line in lines if line.startswith("voluntary_ctxt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=20_000, help="of a run of bursts")
    parser.add_argument("--outstanding", type=int, nargs="*", default=[1, 10, 100, 1000, BOUND])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 8, 32, 128, 512], help="that wait for each job")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a run of waiting threads, and idle")
    arguments = parser.parse_args()
    print(f"What a job costs, few or many\n\n{machine('microbatch')}")
    print(f"  settings  {vars(arguments)}; medians, in brackets the extremes\n")
    report_memory(BOUND)
    report_idle(arguments.seconds)
    report_outstanding(arguments)
    report_threads(arguments)
    report_options(arguments)


if __name__ == "__main__":
    main()
