"""The queue that comes along, the contract suite over every kind, and the store that makes any of them safe."""

from __future__ import annotations

import itertools
import queue
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microbatch import DeliveryTimeout, MemoryQueue, QueueFull
from microbatch.job import Job, JobFuture
from microbatch.queues import Store, store_factory
from microbatch.testing import FaultyProcessor, InlineBatcher, ManualClock, QueueContract


class Ring:
    """A foreign queue: no base class of ours or the standard library's."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put_nowait(self, item: Any) -> None:
        self.items.append(item)

    def get_nowait(self) -> Any:
        if not self.items:
            raise queue.Empty
        return self.items.pop(0)

    def qsize(self) -> int:
        return len(self.items)


class Sorted(Ring):
    """A foreign queue with an order, that gives many at once."""

    ordered = True

    def put_nowait(self, item: Any) -> None:
        super().put_nowait(item)
        self.items.sort()

    def get_many(self, n: int) -> list[Any]:
        taken, self.items = self.items[:n], self.items[n:]
        return taken


class Hooked(queue.Queue[Any]):
    """A subclass of the standard library's queue that keeps its items elsewhere."""

    def _init(self, maxsize: int) -> None:
        self.elsewhere: list[Any] = []

    def _qsize(self) -> int:
        return len(self.elsewhere)

    def _put(self, item: Any) -> None:
        self.elsewhere.append(item)

    def _get(self) -> Any:
        return self.elsewhere.pop(0)


class TestMemoryQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return MemoryQueue()


class TestQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return queue.Queue()


class TestLifoQueueContract(QueueContract):
    fifo = False

    def make_queue(self) -> Any:
        return queue.LifoQueue()


class TestPriorityQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return queue.PriorityQueue()


class TestSimpleQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return queue.SimpleQueue()


class TestForeignQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return Ring()


class TestForeignSortedQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return Sorted()


class TestHookedQueueContract(QueueContract):
    def make_queue(self) -> Any:
        return Hooked()


EVERY_KIND = [
    MemoryQueue,
    queue.Queue,
    queue.LifoQueue,
    queue.PriorityQueue,
    queue.SimpleQueue,
    Ring,
    Sorted,
    Hooked,
]
ORDERED = [MemoryQueue, queue.PriorityQueue, Sorted]


def jobs(n: int) -> list[Job]:
    made = []
    for number in range(n):
        job = Job(number, JobFuture(), 0, 0.0, 1e9)
        job.sequence = number
        made.append(job)
    return made


def payloads(taken: list[Any]) -> list[Any]:
    return [job.payload for job in taken]


# The queue that comes along.


class Item:
    def __init__(self, priority: int, number: int) -> None:
        self.priority, self.number = priority, number


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-3, 3), st.none())), st.integers(1, 5))
def test_memory_queue_is_a_stable_sort_by_priority_whatever_goes_in_and_out(
    moves: list[int | None], at_once: int
) -> None:
    made, expected = MemoryQueue(), list[Item]()
    for number, priority in enumerate(moves):
        if priority is not None:
            made.put_nowait(Item(priority, number))
            expected.append(Item(priority, number))
            continue
        expected.sort(key=lambda item: (-item.priority, item.number))
        taken, expected = expected[:at_once], expected[at_once:]
        assert [item.number for item in made.get_many(at_once)] == [item.number for item in taken]
        assert made.qsize() == len(expected)
    expected.sort(key=lambda item: (-item.priority, item.number))
    assert [made.get_nowait().number for _ in range(made.qsize())] == [item.number for item in expected]


def test_memory_queue_takes_items_without_a_priority() -> None:
    made = MemoryQueue()
    for item in "abc":
        made.put(item)
    assert made.get_many(2) == ["a", "b"]
    assert made.get() == "c"


def test_memory_queue_has_the_bound_of_its_base_class() -> None:
    made = MemoryQueue(maxsize=2)
    made.put_nowait(1)
    made.put_nowait(2)
    assert made.full()
    with pytest.raises(queue.Full):
        made.put_nowait(3)
    assert made.get_many(5) == [1, 2]
    assert made.empty()


# The store.


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_store_gives_out_what_was_put_once_and_never_more_than_asked_for(kind: Callable[[], Any]) -> None:
    store = Store(kind())
    for job in jobs(10):
        store.put(job)
    taken = [store.take(3), store.take(3), store.take(100), store.take(1)]
    assert [len(part) for part in taken] == [3, 3, 4, 0]
    assert sorted(job.payload for part in taken for job in part) == list(range(10))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_dead_are_dropped_and_the_living_keep_their_order(kind: Callable[[], Any]) -> None:
    swept, untouched = Store(kind()), Store(kind())
    for job in jobs(20):
        swept.put(job)
        untouched.put(job)
    swept.remove(lambda job: job.payload % 3 == 0)
    expected = [payload for payload in payloads(untouched.take(20)) if payload % 3]
    assert [payload for payload in payloads(swept.take(20)) if payload % 3] == expected


@pytest.mark.parametrize("kind", [MemoryQueue, queue.Queue, queue.LifoQueue, queue.PriorityQueue, queue.SimpleQueue])
def test_our_queue_and_the_standard_ones_give_back_the_memory_of_the_dead(kind: Callable[[], Any]) -> None:
    store = Store(kind())
    for job in jobs(20):
        store.put(job)
    store.remove(lambda job: job.payload < 15)
    assert store.size() == 5


@pytest.mark.parametrize("kind", [MemoryQueue, queue.Queue, queue.LifoQueue, queue.PriorityQueue])
def test_the_bound_of_a_queue_is_kept_without_its_lock(kind: Callable[..., Any]) -> None:
    store = Store(kind(maxsize=2))
    assert (store.fits(2), store.fits(3)) == (True, False)
    first, second, third = jobs(3)
    store.put(first)
    store.put(second)
    with pytest.raises(queue.Full):
        store.put(third)
    assert len(store.take(5)) == 2


def test_a_queue_without_a_bound_fits_any_number() -> None:
    assert all(Store(kind()).fits(10**9) for kind in EVERY_KIND)


def test_the_mutex_of_a_standard_queue_is_not_touched() -> None:
    for kind in (MemoryQueue, queue.Queue, queue.LifoQueue, queue.PriorityQueue):
        made: Any = kind()
        store = Store(made)
        with made.mutex:  # no RLock: whoever took it again would hang
            for job in jobs(3):
                store.put(job)
            store.remove(lambda job: job.payload == 0)
            assert len(store.take(3)) == 2


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_only_a_queue_that_keeps_an_order_is_known_to_be_ordered(kind: Callable[[], Any]) -> None:
    assert Store(kind()).ordered is (kind in ORDERED)


# The option `queue`.


@pytest.mark.parametrize("kind", [MemoryQueue, queue.Queue, queue.LifoQueue, queue.PriorityQueue])
def test_a_given_queue_is_used_and_after_a_fork_another_of_its_type_and_size(kind: Callable[..., Any]) -> None:
    given_queue = kind(maxsize=7)
    make = store_factory(given_queue)
    first, second = make(), make()
    target: Any = second.target
    assert first.target is given_queue
    assert target is not given_queue
    assert (type(target), target.maxsize) == (kind, 7)


def test_a_given_simple_queue_is_used_and_then_a_new_one() -> None:
    given_queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
    make = store_factory(given_queue)
    assert make().target is given_queue
    assert isinstance(make().target, queue.SimpleQueue)


def test_a_factory_is_asked_for_each_store() -> None:
    make = store_factory(Ring)
    assert make().target is not make().target


@pytest.mark.parametrize("choice", [Hooked(), Ring(), "MemoryQueue", None, 5])
def test_what_is_no_factory_and_cannot_be_made_again_is_refused(choice: Any) -> None:
    with pytest.raises(TypeError, match=r"queue must be a factory such as queue=MyQueue.*a forked child needs"):
        store_factory(choice)


def test_what_a_factory_makes_must_be_a_queue() -> None:
    with pytest.raises(TypeError, match=r"queue factory made \[\], which has no put_nowait, get_nowait, qsize"):
        store_factory(list)()


def test_a_queue_that_holds_something_is_refused() -> None:
    full: queue.Queue[int] = queue.Queue()
    full.put(1)
    with pytest.raises(ValueError, match="holds 1 items already; pass an empty one"):
        InlineBatcher(FaultyProcessor(), queue=full, clock=ManualClock())


# A foreign queue can break no promise.


def test_P1_submit_many_into_a_bounded_queue_accepts_all_or_none() -> None:
    processor = FaultyProcessor[int, int]()
    batcher = InlineBatcher(processor, queue=queue.Queue(maxsize=2), clock=ManualClock())
    with pytest.raises(QueueFull, match="3 more jobs"):
        batcher.submit_many([1, 2, 3])
    assert batcher.submit(4).result() == 4
    assert [future.result() for future in batcher.submit_many([5, 6])] == [5, 6]
    assert processor.batches == [(4,), (5, 6)]
    assert (batcher.stats().submitted, batcher.stats().rejected) == (3, 3)


def test_a_full_queue_is_named_as_what_is_full() -> None:
    batcher = InlineBatcher(FaultyProcessor(), queue=queue.Queue(maxsize=1), clock=ManualClock())
    with batcher.hold():
        batcher.submit(1)
        with pytest.raises(QueueFull, match="the queue has a bound of its own"):
            batcher.submit(2)


class Narrow(Ring):
    """Has a bound that nobody knows of."""

    def put_nowait(self, item: Any) -> None:
        if len(self.items) >= 2:
            raise queue.Full
        super().put_nowait(item)


def test_P1_a_foreign_queue_that_fills_up_in_the_middle_takes_none_and_doubles_none() -> None:
    processor = FaultyProcessor[int, int]()
    batcher = InlineBatcher(processor, queue=Narrow, clock=ManualClock())
    with batcher.hold():
        with pytest.raises(QueueFull):
            batcher.submit_many([1, 2, 3])
        batcher.run()
        taken = batcher.submit_many([4, 5])
    assert [future.result() for future in taken] == [4, 5]
    assert processor.batches == [(4, 5)]


class Echo(Ring):
    """Gives everything it has, twice, however little was asked for."""

    def get_many(self, n: int) -> list[Any]:
        taken, self.items = self.items, []
        return taken + taken


def test_P4_a_queue_that_gives_too_much_and_twice_doubles_no_job_and_overfills_no_batch() -> None:
    processor = FaultyProcessor[int, int]()
    batcher = InlineBatcher(processor, queue=Echo, max_batch_size=2, clock=ManualClock())
    assert [future.result() for future in batcher.submit_many(range(5))] == list(range(5))
    assert processor.batches == [(0, 1), (2, 3), (4,)]


class Sticky(Ring):
    """Gives what it has again and again."""

    def get_many(self, n: int) -> Any:
        return self.items[:n]


class Boundless(Sticky):
    def qsize(self) -> int:
        return 10**12 if self.items else 0


class Endless(Sticky):
    def get_many(self, n: int) -> Any:
        return itertools.cycle(self.items) if self.items else []


@pytest.mark.parametrize("kind", [Sticky, Boundless, Endless])
@pytest.mark.timeout(20)
def test_P5_a_queue_that_never_gets_empty_does_not_keep_the_lock(kind: Callable[[], Any]) -> None:
    processor = FaultyProcessor[int, int]()
    batcher = InlineBatcher(processor, queue=kind, max_batch_size=2, delivery_timeout=3.0, clock=ManualClock())
    assert [future.result() for future in batcher.submit_many([1, 2])] == [1, 2]
    late = batcher.submit(3)
    assert isinstance(late.exception(), DeliveryTimeout), "it hides behind those that come again and again"
    assert processor.batches == [(1, 2)]
    batcher._core.intake.rebuild(list)
    assert batcher.shutdown().finished


class Thief(Ring):
    """Loses every other item."""

    def put_nowait(self, item: Any) -> None:
        if item.payload % 2:
            super().put_nowait(item)


def test_P5_a_job_that_the_queue_lost_ends_at_its_deadline() -> None:
    batcher = InlineBatcher(FaultyProcessor[int, int](), queue=Thief, clock=ManualClock())
    lost, kept = batcher.submit_many([0, 1])
    assert kept.result() == 1
    assert isinstance(lost.exception(), DeliveryTimeout)


class Broken(Ring):
    def get_nowait(self) -> Any:
        raise ZeroDivisionError("the queue is broken")


class Junk(Ring):
    def get_nowait(self) -> Any:
        return None


@pytest.mark.parametrize("kind", [Broken, Junk])
def test_P5_a_queue_that_is_broken_holds_its_jobs_up_to_their_deadlines_and_no_longer(kind: Callable[[], Any]) -> None:
    batcher = InlineBatcher(FaultyProcessor[int, int](), queue=kind, delivery_timeout=3.0, clock=ManualClock())
    future = batcher.submit(1)
    assert isinstance(future.exception(), DeliveryTimeout)
    assert batcher.clock.now == 1003.0
    assert batcher.shutdown().finished


def test_P1_what_a_full_queue_cannot_take_back_after_an_interruption_is_kept() -> None:
    processor = FaultyProcessor[int, int]()
    batcher = InlineBatcher(processor, queue=queue.Queue(maxsize=2), linger=1.0, clock=ManualClock())
    core = batcher._core
    with batcher.hold():
        futures = batcher.submit_many([1, 2])
        batcher._worker.turn(wait=False)  # the open batch has them now, and the queue has room again
        futures += batcher.submit_many([3, 4])
        core.intake.rebuild(lambda: list(core.outstanding.values()))
    assert [future.result() for future in futures] == [1, 2, 3, 4]


def test_the_hooks_are_those_of_the_stdlib_though_another_class_has_taken_the_place_of_its_queue() -> None:
    """As under gevent, whose queues are made in another way."""
    script = """
import queue
genuine = queue.Queue
queue.Queue = type("Queue", (), {"__module__": "elsewhere", "maxsize": None})
from microbatch import MemoryQueue, MicroBatcher
assert not issubclass(MemoryQueue, (genuine, queue.Queue)), MemoryQueue.__mro__
with MicroBatcher(lambda batch: list(batch), queue=lambda: MemoryQueue(5), submit_timeout=0) as batcher:
    assert [batcher.execute(n) for n in range(20)] == list(range(20))
full = MemoryQueue(1)
full.put_nowait(1)
try:
    full.put_nowait(2)
except queue.Full:
    print("full")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("full\n", "")
