"""Many threads, random cancels, raising callbacks, a shutdown in the middle; then sets are compared.

    python -m tests.stress                             a short round
    python -m tests.stress --jobs 1000000 --repeat 20  the long one
    python -m tests.stress --seconds 60                rounds until the time is over

Prints one line a round and exits with 1 at the first violation; a hang dumps every thread's stack.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import logging
import random
import sys
import threading
import time
from concurrent.futures import CancelledError

from microbatch import Batch, BatcherClosed, JobFuture, MicroBatcher

Job = list[int]


class Echo:
    """Answers every job with itself, and counts how often it saw each."""

    def __init__(self, jobs: int) -> None:
        self.seen = bytearray(jobs)

    def process(self, batch: Batch[Job]) -> list[Job]:
        for job in batch:
            self.seen[job[0]] += 1
        return list(batch)


class Round:
    def __init__(self, jobs: int, threads: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.jobs, self.threads = jobs, threads
        self.echo = Echo(jobs)
        self.batcher: MicroBatcher[Job, Job] = MicroBatcher(
            self.echo,
            max_batch_size=self.random.choice((1, 7, 100, 1000)),
            max_concurrent_batches=self.random.choice((1, 1, 2, 4)),
            max_outstanding=self.random.choice((50, 1000, 10_000)),
            linger=self.random.choice((0.0, 0.0, 0.001)),
            submit_timeout=600.0,
            delivery_timeout=600.0,
        )
        self.taken: list[list[tuple[Job, JobFuture[Job]]]] = [[] for _ in range(threads)]
        self.refused = [0] * threads
        self.raised = [0] * threads
        self.offered = itertools.count()
        self.half = threading.Event()

    def run(self) -> str:
        """Submit, shut down in the middle, compare; the line to print."""
        began = time.monotonic()
        submitters = [
            threading.Thread(target=self.submit, args=(number, self.random.random())) for number in range(self.threads)
        ]
        for thread in submitters:
            thread.start()
        self.half.wait()
        report = self.batcher.shutdown()
        for thread in submitters:
            thread.join()
        cancelled = self.compare()
        stats = self.batcher.stats()
        accepted = sum(map(len, self.taken))
        assert report.finished, report
        assert stats.submitted == accepted, (stats, accepted)
        assert stats.completed + stats.cancelled == accepted, stats
        assert stats.cancelled == cancelled, (stats, cancelled)
        return (
            f"accepted {accepted:,} completed {stats.completed:,} cancelled {cancelled:,} "
            f"refused after shutdown {sum(self.refused):,} mean batch {stats.batch_jobs / max(1, stats.batches):.1f} "
            f"in {time.monotonic() - began:.1f} s; violations 0"
        )

    def submit(self, number: int, seed: float) -> None:
        draw = random.Random(seed).random
        mine = self.taken[number]
        ids = range(number, self.jobs, self.threads)
        for nth, n in enumerate(ids):
            if next(self.offered) == self.jobs // 2:
                self.half.set()
            job = [n]
            try:
                future = self.batcher.submit(job)
            except BatcherClosed:
                self.refused[number] += 1
                continue
            mine.append((job, future))
            chance = draw()
            if chance < 0.03:
                future.cancel()
            elif chance < 0.05:
                future.add_done_callback(self.raising)
            elif chance < 0.06 and nth > 10:
                mine[-10][1].cancel()

    def raising(self, future: object) -> None:
        raise SystemExit("a callback that raises")

    def compare(self) -> int:
        """Accepted, outcomes and what the processor saw, job by job."""
        cancelled = 0
        for mine in self.taken:
            for job, future in mine:
                assert future.done(), f"unresolved: {future!r}"
                seen = self.echo.seen[job[0]]
                try:
                    result = future.result(0)
                except CancelledError:
                    cancelled += 1
                    assert seen == 0, f"job {job[0]} was cancelled and processed"
                else:
                    assert result is job, f"job {job[0]} got the result of {result!r}"
                    assert seen == 1, f"job {job[0]} was processed {seen} times"
        assert sum(self.echo.seen) == sum(map(len, self.taken)) - cancelled, "a stranger was processed"
        return cancelled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=100_000, help="offered in a round (default %(default)s)")
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on until so much time has passed")
    parser.add_argument("--bound", type=float, default=300.0, help="seconds after which a round counts as hung")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args(argv)
    # Every raising callback is logged with its traceback, as it should be; here that is noise.
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
    sys.setswitchinterval(1e-6)
    end = time.monotonic() + arguments.seconds
    number = 0
    while number < arguments.repeat or time.monotonic() < end:
        seed = arguments.seed + number
        faulthandler.dump_traceback_later(arguments.bound, exit=True)
        try:
            line = Round(arguments.jobs, arguments.threads, seed).run()
        except AssertionError as error:
            print(f"round {number + 1} (--seed {seed}): VIOLATION {error}", flush=True)
            return 1
        print(f"round {number + 1} (seed {seed}): {line}", flush=True)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
