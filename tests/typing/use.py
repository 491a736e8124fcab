"""The API as a user's editor sees it. Never run: `test_typing.py` has mypy read it, strictly."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass
from typing import Any

from typing_extensions import assert_type

from microbatch import (
    Batch,
    BatchProcessor,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobQueue,
    JobStatus,
    MemoryQueue,
    MicroBatcher,
    OutcomeUnknown,
    RetryPolicy,
    ShutdownReport,
    Stats,
)
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock, ProcessorContract, QueueContract


@dataclass
class Payment:
    user_id: int


@dataclass
class Row:
    id: int


class Insert:
    """A processor with everything that is optional."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def is_retryable(self, exc: BaseException) -> bool:
        return isinstance(exc, ConnectionError)

    def process(self, batch: Batch[Payment]) -> Sequence[Row | Exception]:
        assert_type(batch[0], Payment)
        assert_type(batch[1:], tuple[Payment, ...])
        assert_type(batch.deadline, "float | None")
        return [Row(payment.user_id) for payment in batch]


class InsertAnything:
    """Takes more than payments, gives exactly rows."""

    def process(self, batch: Batch[object]) -> list[Row]:
        return [Row(0) for _ in batch]


class InsertSilently:
    def process(self, batch: Batch[Payment]) -> None: ...


def insert(batch: Batch[Payment]) -> list[Row]:
    return [Row(payment.user_id) for payment in batch]


def insert_or_not(batch: Batch[Payment]) -> list[Row | Exception]:
    return [Row(1), ValueError()]


processor: BatchProcessor[Payment, Row] = Insert()
anything: BatchProcessor[Payment, Row] = InsertAnything()
silent: BatchProcessor[Payment, Row] = InsertSilently()

batcher = MicroBatcher[Payment, Row](Insert(), max_batch_size=100, linger=0.005, retry=RetryPolicy(max_attempts=3))
MicroBatcher[Payment, Row](InsertAnything(), delivery_timeout=None, retry=None)
MicroBatcher[Payment, Row](InsertSilently(), queue=queue.SimpleQueue())
MicroBatcher[Payment, Row](lambda batch: [Row(payment.user_id) for payment in batch], queue=MemoryQueue)
assert_type(MicroBatcher(processor), MicroBatcher[Payment, Row])
assert_type(MicroBatcher(Insert()), MicroBatcher[Payment, Row])
assert_type(MicroBatcher(insert), MicroBatcher[Payment, Row])

future = batcher.submit(Payment(1), job_id="one", priority=5, submit_timeout=0.1, delivery_timeout=None)
assert_type(future, JobFuture[Row])
assert_type(future.result(timeout=5), Row)
assert_type(future.exception(), "BaseException | None")
assert_type(future.job_id, str)
assert_type(future.status, JobStatus)
assert_type(future.cancel(), bool)
assert_type(batcher.submit_many(Payment(n) for n in range(3)), list[JobFuture[Row]])
assert_type(batcher.execute(Payment(1), delivery_timeout=5), Row)
assert_type(batcher.status("one"), JobStatus)
assert_type(batcher.future("one"), JobFuture[Row])
assert_type(batcher.flush(timeout=1), bool)
assert_type(batcher.shutdown(cancel_futures=True, timeout=3), ShutdownReport)
assert_type(batcher.stats(), Stats)
assert_type(batcher.stats().last_success, "float | None")

plain: Future[Row] = future
wait([future])
for done in as_completed([future]):
    assert_type(done.result(), Row)
future.add_done_callback(lambda finished: print(finished.result().id))


async def in_asyncio() -> Row:
    return await asyncio.wrap_future(future)


with MicroBatcher[Payment, Row](processor) as scoped:
    assert_type(scoped, MicroBatcher[Payment, Row])


@batcher.on(JobFailed)
def dead_letter(event: JobFailed) -> None:
    assert_type(event.error, BaseException)
    assert_type(event.job_id, "str | None")


def listener(event: JobCompleted) -> None: ...


batcher.on(JobCompleted, listener)
batcher.off(JobCompleted, listener)
batcher.on(JobCompleted, lambda event: event.seconds)

assert_type(MicroBatcher.from_env(Insert(), prefix="SHOP_", max_batch_size=5), MicroBatcher[Payment, Row])


class Ring:
    ordered = True

    def put_nowait(self, item: Any) -> None: ...

    def get_nowait(self) -> Any:
        raise queue.Empty

    def qsize(self) -> int:
        return 0


mine: JobQueue = Ring()
ours: JobQueue = MemoryQueue()
theirs: JobQueue = queue.PriorityQueue[Any]()
simple: JobQueue = queue.SimpleQueue[Any]()


inline = InlineBatcher[Payment, Row](Insert(), clock=ManualClock(), max_batch_size=3)
assert_type(inline.submit(Payment(1)), JobFuture[Row])
with inline.hold():
    assert_type(inline.clock(), float)
faulty = FaultyProcessor[Payment, Row]([ConnectionError(), None, lambda batch: [Row(1)]], work=lambda p: Row(p.user_id))
assert_type(faulty.batches, list[tuple[Payment, ...]])


class TestRing(QueueContract):
    def make_queue(self) -> Ring:
        return Ring()


class TestInsert(ProcessorContract):
    def make_processor(self) -> Insert:
        return Insert()

    def make_jobs(self, n: int) -> list[Payment]:
        return [Payment(number) for number in range(n)]

    def check(self, job: Payment, result: Row) -> None:
        assert result.id == job.user_id


try:
    future.result()
except OutcomeUnknown as unknown:
    assert_type(unknown.batch_id, "str | None")

# What must not pass.


class NoProcessor:
    def work(self, batch: Batch[Payment]) -> None: ...


class InsertRefunds:
    def process(self, batch: Batch[str]) -> list[Row]:
        return []


MicroBatcher[Payment, Row](NoProcessor())  # type: ignore[arg-type]
MicroBatcher[Payment, Row](InsertRefunds())  # type: ignore[arg-type]
MicroBatcher[Payment, Row](Insert(), 100)  # type: ignore[call-arg]
MicroBatcher[Payment, Row](Insert(), max_batch_size="100")  # type: ignore[arg-type]
MicroBatcher[Payment, Row](Insert(), batch_size=100)  # type: ignore[call-arg]
batcher.submit("not a payment")  # type: ignore[arg-type]
batcher.submit(Payment(1), job_id=5)  # type: ignore[arg-type]
batcher.on(JobCompleted, dead_letter)  # type: ignore[arg-type]
batcher.on("JobCompleted", listener)  # type: ignore[call-overload]
print(future.result().user_id)  # type: ignore[attr-defined]
