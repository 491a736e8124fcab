"""One of several processes that upsert the same rows: `upserts.py DSN LANE sorted|unsorted WAY`.

Prints how many batches met a deadlock.
"""

from __future__ import annotations

import logging
import random
import sys

import psycopg

from microbatch import BatchFailed, MicroBatcher, RetryPolicy
from microbatch.processors.postgres import PostgresProcessor

logging.disable()
dsn, lane, order, way = sys.argv[1:]
sort_key = (lambda job: job["n"]) if order == "sorted" else None
deadlocks: list[BaseException] = []
if way == "statement":
    upsert = "INSERT INTO item (n) VALUES (%(n)s) ON CONFLICT (n) DO UPDATE SET hits = item.hits + 1 RETURNING n"
    processor = PostgresProcessor(dsn, upsert, sort_key=sort_key)
else:
    processor = PostgresProcessor.insert_into(
        dsn, "item", ["n"], on_conflict="(n) DO UPDATE SET hits = item.hits + 1", sort_key=sort_key
    )
draw = random.Random(int(lane))
batcher = MicroBatcher(processor, max_batch_size=50, delivery_timeout=120, retry=RetryPolicy(backoff=0.01))


@batcher.on(BatchFailed)
def count(event: BatchFailed) -> None:
    if isinstance(event.error, psycopg.errors.DeadlockDetected):
        deadlocks.append(event.error)


with psycopg.connect(dsn, autocommit=True) as start:
    start.execute("SELECT pg_advisory_lock_shared(1)")  # all begin together

with batcher:
    for _ in range(10):
        numbers = draw.sample(range(50), 50)
        futures = batcher.submit_many([{"n": n} for n in numbers])
        assert [future.result()["n"] for future in futures] == numbers
print(len(deadlocks))
