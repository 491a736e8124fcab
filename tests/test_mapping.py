from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from microbatch import BatcherClosed, MicroBatcher, QueueFull, ThreadsUnavailable
from microbatch.testing import FaultyProcessor, InlineBatcher

PATIENCE = 20.0


def squares(batch: Any) -> list[Any]:
    return [ValueError(job) if job % 10 == 7 else job * job for job in batch]


def test_results_come_in_the_order_of_the_jobs() -> None:
    with MicroBatcher(lambda batch: [job * job for job in batch], max_batch_size=7) as batcher:
        assert list(batcher.map(range(1000))) == [n * n for n in range(1000)]
        assert list(batcher.map([])) == []


def test_the_first_error_is_raised_where_its_result_would_come() -> None:
    with MicroBatcher(squares, max_batch_size=3) as batcher:
        results = batcher.map(range(100))
        assert list(itertools.islice(results, 7)) == [n * n for n in range(7)]
        with pytest.raises(ValueError, match="7"):
            next(results)
        assert list(results) == []


def test_errors_are_yielded_where_that_is_asked_for() -> None:
    with MicroBatcher(squares, max_batch_size=3) as batcher:
        results = list(batcher.map(range(20), return_exceptions=True))
    assert [type(result) for result in results] == [ValueError if n % 10 == 7 else int for n in range(20)]


def test_a_cancelled_job_is_an_error_in_its_place() -> None:
    batcher = InlineBatcher(FaultyProcessor())
    with batcher.hold():
        results = batcher.map([1, 2], return_exceptions=True)
        submitted = batcher.submit
        batcher.submit = lambda *args, **options: cancelled(submitted(*args, **options))  # type: ignore[method-assign]
        results = batcher.map([1, 2], return_exceptions=True)
        assert isinstance(next(results), CancelledError)


def cancelled(future: Any) -> Any:
    assert future.cancel()
    return future


def test_no_more_is_read_than_a_few_batches_ahead() -> None:
    read = itertools.count()
    gate = threading.Event()
    with MicroBatcher(lambda batch: gate.wait(PATIENCE) and list(batch), max_batch_size=5) as batcher:
        results = batcher.map(read)
        taking = threading.Thread(target=lambda: next(results))
        taking.start()
        time.sleep(0.2)
        assert batcher.stats().outstanding <= 15
        gate.set()
        taking.join(PATIENCE)
        results.close()  # type: ignore[attr-defined]
        assert next(read) <= 32
    assert batcher.stats().completed == batcher.stats().submitted


def test_an_error_of_the_iterable_comes_behind_the_results_before_it() -> None:
    def jobs() -> Iterator[int]:
        yield from range(3)
        raise ZeroDivisionError

    with MicroBatcher(lambda batch: list(batch)) as batcher:
        results = batcher.map(jobs())
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_a_shutdown_comes_behind_the_results_before_it() -> None:
    batcher = MicroBatcher(lambda batch: list(batch))

    def jobs() -> Iterator[int]:
        yield from range(3)
        batcher.shutdown()
        yield 3

    results = batcher.map(jobs())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BatcherClosed):
        next(results)


@pytest.mark.parametrize("when_full", ["block", "raise"])
def test_a_small_bound_is_no_obstacle(when_full: str) -> None:
    with MicroBatcher(lambda batch: list(batch), max_outstanding=2, when_full=when_full) as batcher:
        assert list(batcher.map(range(500))) == list(range(500))


def test_it_waits_while_others_have_all_places() -> None:
    gate = threading.Event()
    with MicroBatcher(
        lambda batch: gate.wait(PATIENCE) and list(batch), max_outstanding=2, submit_timeout=0.01
    ) as batcher:
        batcher.submit_many([1, 2])
        with pytest.raises(QueueFull):
            batcher.submit(3)
        threading.Timer(0.2, gate.set).start()
        assert list(batcher.map([4, 5, 6])) == [4, 5, 6]


def test_where_nothing_waits_it_says_so() -> None:
    gate = threading.Event()
    with MicroBatcher(
        lambda batch: gate.wait(PATIENCE) and list(batch), max_outstanding=2, when_full="raise"
    ) as batcher:
        batcher.submit_many([1, 2])
        with pytest.raises(QueueFull):
            list(batcher.map([4]))
        gate.set()


def test_it_is_refused_where_it_would_wait_for_itself() -> None:
    errors: list[BaseException] = []

    def process(batch: Any) -> list[Any]:
        try:
            batcher.map([1])
        except BaseException as error:
            errors.append(error)
        return list(batch)

    with MicroBatcher(process) as batcher:
        batcher.execute(1)
    assert [type(error) for error in errors] == [RuntimeError]


def test_a_wrong_argument_is_refused_before_anything_is_read() -> None:
    with MicroBatcher(FaultyProcessor()) as batcher, pytest.raises(ValueError, match="delivery_timeout"):
        batcher.map(iter([1]), delivery_timeout=0)


# What else a batcher says of its process.


@pytest.mark.parametrize("move", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_batcher_and_a_future_stay_in_their_process(move: Any) -> None:
    with MicroBatcher(FaultyProcessor()) as batcher:
        for thing in (batcher, batcher.submit(1)):
            with pytest.raises(TypeError, match="in the process that uses it"):
                move(thing)
    with pytest.raises(TypeError, match="InlineBatcher"):
        move(InlineBatcher(FaultyProcessor()))


def test_P1_where_no_thread_can_be_started_nothing_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    batcher = MicroBatcher(FaultyProcessor())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(ThreadsUnavailable, match="not accepted") as caught:
            batcher.submit(1)
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(ThreadsUnavailable):
            batcher.submit_many([1, 2])
        stats = batcher.stats()
        assert (stats.submitted, stats.rejected, stats.rejections["threads"]) == (0, 3, 3)
    assert batcher.execute(1) == 1
    assert batcher.shutdown().completed == 1
