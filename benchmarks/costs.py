"""Where does a row's time go?

Saturated, microseconds per row: the whole way from submit to result, the processor alone (the same batches, called
without a batcher), no-op jobs alone (submit, batch, settle, result), and the raw loop. One thread that waits,
milliseconds at the median: the whole way, the processor alone with batches of one, a no-op job (two switches between
threads), and BEGIN; INSERT; COMMIT without the library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import in_process
import postgres_bulk
import postgres_statement
from database import add_options, bench
from loops import closed_loop
from options import FORMS, Processor
from postgres_statement import CREATE, TABLE, Row, payment
from scale import report

from microbatch import Batch, MicroBatcher

RAW: Mapping[str, Callable[[str, int, int], float]] = {
    "insert_into": postgres_bulk.raw_flights,
    "statement": postgres_statement.raw_loop,
}
WHOLE: Mapping[str, Callable[[str, int, int], float]] = {
    "insert_into": postgres_bulk.through_batcher,
    "statement": postgres_statement.through_batcher,
}


def processor_alone(dsn: str, form: Processor, rows: int, size: int) -> float:
    """Microseconds per row."""
    processor = form(dsn)
    processor.open()
    try:
        took = [one_batch(processor, number, size) for number in range(max(1, rows // size) + 1)]
    finally:
        processor.close()
    return sum(took[1:]) / (len(took) - 1) / size * 1e6  # the first one looks at the table


def one_batch(processor: Any, number: int, size: int) -> float:
    begin = time.perf_counter()
    jobs = [payment(n) for n in range(size)]
    batch = Batch(jobs, id=f"costs-{number}", attempt=1, trigger="size", deadline=time.monotonic() + 60)
    assert len(processor.process(batch)) == size
    return time.perf_counter() - begin


def processor_alone_once(dsn: str, form: Processor, seconds: float) -> float:
    """Milliseconds of a batch of one, the median."""
    processor = form(dsn)
    processor.open()
    try:
        took, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            took.append(one_batch(processor, len(took), 1))
    finally:
        processor.close()
    return median(took) * 1e3


def no_op_jobs(rows: int, size: int) -> float:
    options = {"max_batch_size": size, "max_outstanding": rows}
    return 1e6 / in_process.with_batcher(partial(in_process.at_once, jobs=rows), options)


def no_op_once(seconds: float) -> float:
    with MicroBatcher[Row, None](lambda batch: None) as batcher:
        return closed_loop(batcher.execute, 1, seconds, payment).p50


def waiting(dsn: str, form: Processor, seconds: float) -> float:
    with MicroBatcher[Row, Row](form(dsn)) as batcher:
        batcher.execute(payment(0))
        return closed_loop(batcher.execute, 1, seconds, payment).p50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, default=20_000, help="saturated")
    parser.add_argument("--batch-size", type=int, default=1000, help="saturated")
    parser.add_argument("--seconds", type=float, default=0.7, help="of a run of one thread")
    arguments = parser.parse_args()
    rows, size, seconds = arguments.rows, arguments.batch_size, arguments.seconds

    def each(rate: Callable[[str, int, int], float]) -> float:
        return 1e6 / rate(dsn, rows, size)

    with bench("Where a row's time goes", CREATE, f"DROP TABLE {TABLE}", arguments) as dsn:
        for name, form in FORMS.items():
            saturated: dict[str, Callable[[], float]] = {
                "the whole way": partial(each, WHOLE[name]),
                "the processor alone": partial(processor_alone, dsn, form, rows, size),
                "no-op jobs alone": partial(no_op_jobs, rows, size),
                "the raw loop": partial(each, RAW[name]),
            }
            report(f"{name}, batches of {size}", saturated, "the whole way", arguments.repetitions)
        for name, form in FORMS.items():
            alone: dict[str, Callable[[], float]] = {
                "the whole way": partial(waiting, dsn, form, seconds),
                "the processor alone": partial(processor_alone_once, dsn, form, seconds),
                "a no-op job": partial(no_op_once, seconds),
                "BEGIN; INSERT; COMMIT": lambda: postgres_statement.loop_direct(dsn, 1, 1, seconds).p50,
            }
            report(f"{name}, one thread", alone, "the whole way", arguments.repetitions, "ms")


if __name__ == "__main__":
    main()
