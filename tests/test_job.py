"""`JobFuture` is a `concurrent.futures.Future`: CPython's own tests say so, and no race or interrupt makes it less."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import gc
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from pathlib import Path
from typing import Any

import pytest
from interrupts import bounded, interrupted_everywhere
from programs import PREAMBLE, run

import microbatch.job
from microbatch import JobFuture, JobStatus, MicroBatcher
from microbatch.interpreter import CANCELLED_AND_NOTIFIED, FINISHED
from microbatch.job import COMPLETED, Job
from microbatch.testing import InlineBatcher

HERE = Path(__file__).parent
PATIENCE = 30.0


# CPython's own tests.

CASES = ("FutureTests", "ThreadPoolWaitTests", "ThreadPoolAsCompletedTest", "ThreadPoolExecutorTest")


@pytest.fixture(scope="module")
def cpython() -> Iterator[dict[tuple[str, str], Any]]:
    """The runs of CPython's tests, all at once: they mostly sleep."""
    runs = {
        (mode, case): subprocess.Popen(
            [sys.executable, str(HERE / "cpython_futures.py"), *mode.split(), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for mode in ("", "--plain")
        for case in CASES
    }
    yield runs
    for process in runs.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["", "--plain"], ids=["late", "plain"])
def test_cpythons_own_tests_pass(cpython: dict[tuple[str, str], Any], mode: str, case: str) -> None:
    output, _ = cpython[mode, case].communicate(timeout=100)
    if cpython[mode, case].returncode == 3 and not (os.environ.get("CI") or os.environ.get("MICROBATCH_CI")):
        pytest.skip(output.strip())
    assert cpython[mode, case].returncode == 0, output
    facts = json.loads(output.splitlines()[-1])
    assert facts["run"] - facts["skipped"] >= 5, output


# The small print.


def test_a_future_that_nobody_waits_for_has_no_condition() -> None:
    future = JobFuture[int]()
    future.done(), future.running(), future.cancelled(), repr(future)
    future.set_result(1)
    assert future.result() == 1
    assert future.exception() is None
    future.add_done_callback(lambda done: None)

    assert not {"_condition", "_waiters", "_bell"} & set(vars(future))


def test_job_ids_are_made_when_first_read_and_cannot_be_guessed() -> None:
    first, second = JobFuture[int](), JobFuture[int]()
    assert "_job_id" not in vars(first)

    assert first.job_id == first.job_id
    assert first.job_id != second.job_id
    assert len(first.job_id) == 32
    assert int(first.job_id, 16) >= 0


def test_every_thread_reads_the_same_job_id() -> None:
    for _ in range(200):
        future = JobFuture[int]()
        barrier = threading.Barrier(4)
        seen: list[str] = []

        def read(future: Any = future, barrier: Any = barrier, seen: list[str] = seen) -> None:
            barrier.wait(PATIENCE)
            seen.append(future.job_id)

        together(read, 4)
        assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda future: None, JobStatus.PENDING),
        (lambda future: future.set_running_or_notify_cancel(), JobStatus.PROCESSING),
        (lambda future: future.set_result(None), JobStatus.COMPLETED),
        (lambda future: future.set_exception(ValueError()), JobStatus.FAILED),
        (lambda future: future.set_exception(microbatch.OutcomeUnknown()), JobStatus.UNKNOWN),
        (lambda future: future.set_exception(microbatch.WorkerDied()), JobStatus.UNKNOWN),
        (lambda future: future.cancel(), JobStatus.CANCELLED),
        (lambda future: future.cancel() and future.set_running_or_notify_cancel(), JobStatus.CANCELLED),
    ],
)
def test_the_status_is_what_the_future_says(end: Callable[[Any], object], status: JobStatus) -> None:
    future = JobFuture[None]()
    end(future)

    assert future.status is status


def test_a_result_is_set_once() -> None:
    future = JobFuture[int]()
    future.set_result(1)
    with pytest.raises(InvalidStateError):
        future.set_result(2)
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
    assert future.result() == 1
    assert not future.cancel()


def test_a_wait_longer_than_the_clock_can_say_is_a_wait_without_end() -> None:
    future = JobFuture[int]()
    timer = threading.Timer(0.05, future.set_result, (1,))
    timer.start()

    assert future.result(threading.TIMEOUT_MAX * 10) == 1
    timer.join(PATIENCE)


def test_who_notifies_the_condition_by_hand_wakes_who_waits() -> None:
    """As CPython's tests do, and code that subclasses `Future`."""
    future = JobFuture[int]()

    def end() -> None:
        while not (future._bell and future._bell.sleepers):
            pass
        with future._condition:
            future._result, future._state = 1, FINISHED  # type: ignore[assignment]
            future._condition.notify_all()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    assert future.result(PATIENCE) == 1
    thread.join(PATIENCE)


def test_a_wait_of_no_time_or_less_returns_at_once() -> None:
    future = JobFuture[int]()
    for timeout in (0, -1, -1e9):
        with pytest.raises(cf.TimeoutError):
            future.result(timeout)
        with pytest.raises(cf.TimeoutError):
            future.exception(timeout)


def test_waits_that_gave_up_leave_nothing() -> None:
    future = JobFuture[int]()
    for _ in range(1000):
        with pytest.raises(cf.TimeoutError):
            future.result(0)
    assert not future._bell.sleepers  # type: ignore[union-attr]


def test_P1_a_conclusion_is_one_and_the_second_changes_nothing() -> None:
    future = JobFuture[int]()
    assert future._conclude(FINISHED, 1, None) is True
    assert future._conclude(FINISHED, 2, ValueError()) is False
    assert future.result() == 1

    waited = JobFuture[int]()
    assert waited._condition
    assert waited._conclude(FINISHED, 1, None) is True
    assert waited._conclude(CANCELLED_AND_NOTIFIED, None, None) is False
    assert waited.result() == 1


def test_P5_the_supervisor_is_told_that_a_future_is_being_looked_at() -> None:
    """It must not wait for a caller who is inside `concurrent.futures.wait`."""
    future = JobFuture[int]()
    inside, go = threading.Event(), threading.Event()

    def look() -> None:
        with future._condition:
            inside.set()
            assert go.wait(PATIENCE)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    assert inside.wait(PATIENCE)
    assert future._conclude(FINISHED, 1, None, blocking=False) is None
    go.set()
    thread.join(PATIENCE)
    assert future._conclude(FINISHED, 1, None, blocking=False) is True


def test_a_batch_is_concluded_in_one_pass_but_for_who_is_waited_for() -> None:
    jobs = [Job(n, JobFuture(), 0, 0.0, 1.0) for n in range(4)]
    for job in jobs[:3]:
        job.verdict = (COMPLETED, job.payload, None)
    assert jobs[1].future._condition
    with pytest.raises(cf.TimeoutError):
        jobs[2].future.result(0)

    left = microbatch.job.complete(jobs)

    assert left == [jobs[1], jobs[2]]
    assert [job.future.done() for job in jobs] == [True, False, True, False]
    assert jobs[0].future.result() == 0


def test_P7_an_orphan_is_ended_whatever_its_locks_are() -> None:
    future = JobFuture[int]()
    called: list[Any] = []
    future.add_done_callback(called.append)
    thread = threading.Thread(target=future._condition.acquire, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    sleeper = threading.Thread(target=lambda: called.append(future.exception()), daemon=True)
    sleeper.start()
    while not (future._bell and future._bell.sleepers):
        assert sleeper.is_alive()
    error = microbatch.ForkedError("forked")

    future._orphan(error)

    sleeper.join(PATIENCE)
    assert called == [error], "callbacks are the parent's"
    assert future.status is JobStatus.UNKNOWN
    assert not cf.wait([future], PATIENCE).not_done


# Callbacks.


def test_P1_callbacks_are_contained_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    future = JobFuture[int]()
    called: list[Any] = []

    def fails(error: BaseException) -> Callable[[Future[int]], None]:
        def callback(done: Future[int]) -> None:
            called.append(type(error))
            raise error

        return callback

    errors = [
        ValueError(),
        SystemExit(),
        GeneratorExit(),
        StopIteration(),
        IndexError(),
        KeyError(),
        asyncio.CancelledError(),
    ]
    for error in errors:
        future.add_done_callback(fails(error))
    future.add_done_callback(called.append)
    future.set_result(1)

    assert called == [*map(type, errors), future]
    assert len(caplog.records) == len(errors)
    for error in errors:
        future.add_done_callback(fails(error))
    assert len(called) == 2 * len(errors) + 1


def test_P1_a_ctrl_c_in_a_callback_reaches_its_thread_after_the_others_were_called() -> None:
    future = JobFuture[int]()
    called: list[Any] = []

    def interrupted(done: Future[int]) -> None:
        raise KeyboardInterrupt

    future.add_done_callback(interrupted)
    future.add_done_callback(called.append)
    with pytest.raises(KeyboardInterrupt):
        future.set_result(1)

    assert called == [future]


def test_a_callback_may_be_anything_that_can_be_called() -> None:
    made: list[Any] = []

    class Called:
        def __init__(self, future: Any) -> None:
            made.append(future)

        def __call__(self) -> None:
            raise AssertionError("the instance is not what was given")

    future = JobFuture[int]()
    future.add_done_callback(Called)
    future.add_done_callback(made.append)
    future.set_result(1)

    assert made == [future, future]


def test_callbacks_are_called_in_the_order_they_were_added_and_may_add_others() -> None:
    future = JobFuture[int]()
    called: list[Any] = []

    def first(done: Future[int]) -> None:
        called.append(1)
        done.add_done_callback(lambda _: called.append(3))

    future.add_done_callback(first)
    future.add_done_callback(lambda _: called.append(2))
    future.set_result(0)

    assert sorted(called) == [1, 2, 3]
    assert called[0] == 1


def test_P1_every_callback_is_called_exactly_once_in_a_race_with_the_conclusion(fast_switches: None) -> None:
    for _ in range(1500):
        future = JobFuture[int]()
        calls: list[int] = []
        barrier = threading.Barrier(4)

        def add(number: int, future: Any = future, calls: list[int] = calls, barrier: Any = barrier) -> None:
            barrier.wait(PATIENCE)
            for n in range(3):
                future.add_done_callback(lambda done, own=number * 3 + n: calls.append(own))

        threads = [threading.Thread(target=add, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait(PATIENCE)
        future.set_result(1)
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(calls) == list(range(9))


def test_asyncio_waits_for_jobs() -> None:
    async def main(batcher: MicroBatcher[int, int]) -> list[Any]:
        futures = batcher.submit_many(range(50))
        wrapped = [asyncio.wrap_future(future) for future in futures]
        return await asyncio.wait_for(asyncio.gather(*wrapped, return_exceptions=True), PATIENCE)

    with MicroBatcher[int, int](lambda batch: [ValueError(n) if n % 5 == 0 else -n for n in batch]) as batcher:
        answers = asyncio.run(main(batcher))

    assert [a if isinstance(a, int) else type(a) for a in answers] == [-n if n % 5 else ValueError for n in range(50)]


def test_asyncio_cancels_a_queued_job() -> None:
    gate = threading.Event()
    batcher = MicroBatcher[int, int](lambda batch: gate.wait(PATIENCE) and None, max_batch_size=1)
    batcher.submit(0)

    async def main() -> None:
        wrapped = asyncio.wrap_future(future)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(wrapped, PATIENCE)

    future = batcher.submit(1)
    asyncio.run(main())
    gate.set()
    assert future.status is JobStatus.CANCELLED
    assert batcher.shutdown(timeout=PATIENCE).cancelled == 1


# Races.


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(call: Callable[..., object], threads: int) -> None:
    """Run *call* on so many threads; an exception in one of them fails the test by pytest's own means."""
    started = [threading.Thread(target=call, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()


ENDS: dict[str, Callable[[JobFuture[int]], object]] = {
    "result": lambda future: future._conclude(FINISHED, 1, None),
    "error": lambda future: future._conclude(FINISHED, None, ValueError()),
    "cancelled": lambda future: (future._mark_cancelled(), future._conclude(CANCELLED_AND_NOTIFIED, None, None)),
}


def wait_all(futures: list[JobFuture[int]]) -> None:
    done, not_done = cf.wait(futures, PATIENCE)
    assert done == set(futures)
    assert not not_done


def wait_first(futures: list[JobFuture[int]]) -> None:
    done, not_done = cf.wait(futures, PATIENCE, cf.FIRST_COMPLETED)
    assert done
    assert done | not_done == set(futures)


def wait_first_exception(futures: list[JobFuture[int]]) -> None:
    done, not_done = cf.wait(futures, PATIENCE, cf.FIRST_EXCEPTION)
    assert not not_done or any(not future.cancelled() and future.exception(0) for future in done)


def iterate(futures: list[JobFuture[int]]) -> None:
    seen = list(cf.as_completed(futures, PATIENCE))
    assert len(seen) == len(futures)
    assert set(seen) == set(futures)


def results(futures: list[JobFuture[int]]) -> None:
    for future in futures:
        try:
            future.result(PATIENCE)
        except (ValueError, CancelledError):
            pass


WAITS = [wait_all, wait_first, wait_first_exception, iterate, results]


@pytest.mark.parametrize("end", ENDS)
def test_P1_waits_that_begin_while_the_job_ends_miss_nothing_and_see_nothing_twice(
    end: str, fast_switches: None
) -> None:
    for number in range(300):
        futures = [JobFuture[int]() for _ in range(5)]
        if number % 3 == 0:
            futures[0]._condition  # noqa: B018 - somebody waited before
        barrier = threading.Barrier(len(WAITS) + 1)
        failures: list[BaseException] = []

        def wait(
            how: Callable[..., None], futures: Any = futures, barrier: Any = barrier, failures: Any = failures
        ) -> None:
            try:
                barrier.wait(PATIENCE)
                how(futures)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=wait, args=(how,), daemon=True) for how in WAITS]
        for thread in threads:
            thread.start()
        barrier.wait(PATIENCE)
        for future in futures:
            ENDS[end](future)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not failures


def test_P1_waits_on_a_batcher_miss_nothing_and_see_nothing_twice(fast_switches: None) -> None:
    failures: list[BaseException] = []
    with MicroBatcher[int, Any](
        lambda batch: [ValueError(n) if n % 7 == 0 else n for n in batch], max_batch_size=4
    ) as batcher:

        def client(number: int) -> None:
            try:
                for turn in range(150):
                    futures = [batcher.submit(number * 1000 + turn * 5 + n) for n in range(1 + turn % 5)]
                    if turn % 4 == 0:
                        futures[-1].cancel()
                    WAITS[(number + turn) % len(WAITS)](futures)
                    WAITS[turn % len(WAITS)](futures)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert not failures
    assert batcher.stats().outstanding == 0


def test_waits_mix_jobs_with_other_futures() -> None:
    with cf.ThreadPoolExecutor(2) as executor, MicroBatcher[int, int](lambda batch: list(batch)) as batcher:
        for _ in range(50):
            futures: list[Any] = [executor.submit(int), batcher.submit(1), executor.submit(int), batcher.submit(2)]
            assert not cf.wait(futures, PATIENCE).not_done
            assert len(list(cf.as_completed(futures, PATIENCE))) == 4


def test_a_wait_for_many_jobs_costs_no_more_for_each_than_for_few() -> None:
    """Ratios of whole runs with much room: a look through the list of all of them would show as a factor of 16."""

    def cost(number: int) -> float:
        futures = [JobFuture[int]() for _ in range(number)]
        thread = threading.Thread(target=cf.wait, args=(futures,), daemon=True)
        thread.start()
        while not all(vars(future).get("_waiters") for future in futures):
            assert thread.is_alive()
        began = time.thread_time()
        for future in futures:
            future.set_result(1)
        spent = time.thread_time() - began
        thread.join(PATIENCE)
        assert not thread.is_alive()
        return spent / number

    assert min(cost(16_000) for _ in range(3)) < 5 * min(cost(1_000) for _ in range(3))


# Interrupts, at every point where one can come.


def two_of_three_pending() -> list[JobFuture[int]]:
    futures = [JobFuture[int]() for _ in range(3)]
    futures[0].set_result(1)
    return futures


def gives_up(call: Callable[[list[JobFuture[int]]], object]) -> Callable[[list[JobFuture[int]]], None]:
    def patiently(futures: list[JobFuture[int]]) -> None:
        try:
            call(futures)
        except cf.TimeoutError:
            pass

    return patiently


INTERRUPTED: dict[str, Callable[[list[JobFuture[int]]], object]] = {
    "result": gives_up(lambda futures: futures[1].result(0)),
    "exception": gives_up(lambda futures: futures[1].exception(0.0001)),
    "wait": lambda futures: cf.wait(futures, 0),
    "wait for the first exception": lambda futures: cf.wait(futures, 0.0001, cf.FIRST_EXCEPTION),
    "as_completed": gives_up(lambda futures: list(cf.as_completed(futures, 0))),
    "as_completed with a wait": gives_up(lambda futures: list(cf.as_completed(futures, 0.01))),
    "add_done_callback": lambda futures: futures[1].add_done_callback(id),
    "repr": lambda futures: repr(futures),
    "status": lambda futures: futures[1].status,
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_P1_an_interrupt_at_any_point_of_a_call_hangs_nobody(name: str) -> None:
    """Neither the worker that ends the job, nor other threads, nor the same thread when it tries again."""
    points = 0
    for where, futures in interrupted_everywhere(two_of_three_pending, INTERRUPTED[name]):
        points += 1

        def end(futures: list[JobFuture[int]] = futures) -> list[Any]:
            return [future._conclude(FINISHED, 1, None) for future in futures]

        assert bounded(end) == [False, True, True], where
        assert bounded(lambda it=futures: [future.result(0) for future in it]) == [1, 1, 1], where
        assert not bounded(lambda it=futures: cf.wait(it)).not_done, where
        assert len(list(cf.as_completed(futures))) == 3, where
    assert points > 2


@pytest.mark.parametrize("retry", [wait_all, iterate, results])
def test_P1_who_was_interrupted_in_a_wait_may_wait_again_while_the_job_ends(retry: Callable[..., None]) -> None:
    for where, futures in interrupted_everywhere(two_of_three_pending, lambda futures: cf.wait(futures, 0)):
        ender = threading.Timer(0.0001, lambda it=futures: [future._conclude(FINISHED, 1, None) for future in it])
        ender.start()
        retry(futures)
        ender.join(PATIENCE)
        assert not ender.is_alive(), where


@pytest.mark.parametrize("before", ["nobody waits", "a wait", "an iteration", "a result", "a callback"])
def test_P1_an_interrupt_at_any_point_of_a_conclusion_is_made_good_by_the_next_try(before: str) -> None:
    """The worker's sweep calls it again."""

    def prepare() -> tuple[JobFuture[int], threading.Thread | None, list[Any]]:
        future = JobFuture[int]()
        answer: list[Any] = []
        waits = {
            "a wait": lambda: answer.extend(cf.wait([future], PATIENCE).done),
            "an iteration": lambda: answer.extend(cf.as_completed([future], PATIENCE)),
            "a result": lambda: answer.append(future.result(PATIENCE) and future),
        }
        if before not in waits:
            future.add_done_callback(answer.append)
            return future, None, answer
        thread = threading.Thread(target=waits[before], daemon=True)
        thread.start()
        while not (future._waiters or (future._bell and future._bell.sleepers)):
            assert thread.is_alive()
        return future, thread, answer

    def end(prepared: tuple[JobFuture[int], threading.Thread | None, list[Any]]) -> None:
        prepared[0]._conclude(FINISHED, 1, None)
        prepared[0]._run_callbacks()

    for where, (future, thread, answer) in interrupted_everywhere(prepare, end):
        bounded(lambda it=future: it._conclude(FINISHED, 1, None) in (True, False))
        bounded(lambda it=future: (it._run_callbacks(), True))
        if thread is not None:
            thread.join(PATIENCE)
            assert not thread.is_alive(), where
        assert answer == [future], where


def test_P1_an_interrupt_at_any_point_of_a_cancel_leaves_one_outcome() -> None:
    """And the job is not handed over where the future says that it is cancelled."""

    class Held:
        def __init__(self) -> None:
            self.processed: list[int] = []
            self.called: list[Any] = []
            self.batcher = InlineBatcher[int, int](self.process, delivery_timeout=None, retry=None)
            self.hold = self.batcher.hold()
            self.hold.__enter__()
            self.future = self.batcher.submit(1)
            self.future.add_done_callback(self.called.append)

        def process(self, batch: Any) -> list[int]:
            self.processed += batch
            return list(batch)

    points = 0
    for where, held in interrupted_everywhere(Held, lambda held: held.future.cancel()):
        points += 1
        with pytest.MonkeyPatch.context() as patch:
            # A wait for the outcome would wait for itself here.
            patch.setattr(held.batcher._core, "own", set())
            held.hold.__exit__(None, None, None)
            held.batcher.flush()
        stats = held.batcher.stats()
        assert held.future.done(), where
        assert (stats.completed, stats.cancelled) == ((0, 1) if held.future.cancelled() else (1, 0)), where
        assert held.processed == ([] if held.future.cancelled() else [1]), where
        assert held.called == [held.future], where
        assert stats.outstanding == stats.queued == 0, where
        assert held.batcher.shutdown().finished, where
    assert points > 20


def test_P4_a_future_that_says_cancelled_is_never_handed_over() -> None:
    """A caller on another thread looks at it at every point of the cancelling."""
    gate = threading.Event()
    processed: list[int] = []

    def process(batch: Any) -> None:
        gate.wait(PATIENCE)
        processed.extend(batch)

    said: list[bool] = []
    with MicroBatcher[int, None](process, max_batch_size=1) as batcher:
        batcher.submit(0)
        futures = []
        for _, future in interrupted_everywhere(lambda: batcher.submit(1), lambda future: future.cancel()):
            said.append(future.cancelled())
            futures.append(future)
        gate.set()
    cancelled = [future.cancelled() for future in futures]
    assert all(now for then, now in zip(said, cancelled, strict=True) if then)
    # The last one was cancelled without an interrupt.
    assert len(processed) - 1 == cancelled.count(False)
    assert all(future.done() for future in futures)


@pytest.mark.parametrize(("kind", "number"), [("signals", 10_000), ("asynchronous", 5_000)])
def test_P1_a_storm_of_interrupts_in_callers_hangs_nobody_and_loses_nothing(
    tmp_path: Path, kind: str, number: int
) -> None:
    told = run("import storm", tmp_path, kind, str(number))

    told.assert_quiet()
    assert told.said("over") == ["ok"]
    # It ends after some time on a slow machine.
    assert int(told.said("interrupts")[0]) >= number / 10, told


# Memory.


def test_P5_an_outstanding_job_takes_less_than_a_kilobyte() -> None:
    number = 10_000
    gate = threading.Event()
    with MicroBatcher[Any, None](lambda batch: gate.wait(PATIENCE) and None, max_outstanding=number + 100) as batcher:
        batcher.submit(None)
        payload = object()
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            futures = [batcher.submit(payload) for _ in range(number)]
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gate.set()
        assert (after - before) / number < 1024
        assert futures


class Payload:
    """Can be watched."""


class Refused(Exception):
    """So can this."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "waited for", "iterated", "called back"])
def test_P5_nothing_keeps_a_job_that_is_over(end: str, no_collector: None) -> None:
    """Payload, result and future go with the last reference of the caller, without the garbage collector."""
    gate = threading.Event()

    def process(batch: Any) -> list[Any]:
        gate.wait(PATIENCE)
        return [Refused("no") if end == "failed" else Payload() for _ in batch]

    with MicroBatcher[Payload, Any](process, max_batch_size=1) as batcher:
        first = batcher.submit(Payload())
        payload = Payload()
        future = batcher.submit(payload)
        watched = [weakref.ref(payload), weakref.ref(future)]
        if end == "cancelled":
            assert future.cancel()
        if end == "called back":
            future.add_done_callback(lambda done, payload=payload: None)
        gate.set()
        if end == "waited for":
            assert cf.wait([future], PATIENCE).done
        if end == "iterated":
            assert list(cf.as_completed([future], PATIENCE)) == [future]
        if end == "failed":
            with pytest.raises(Refused):
                future.result(PATIENCE)
            watched.append(weakref.ref(future.exception(0)))  # type: ignore[arg-type]
        elif end != "cancelled":
            watched.append(weakref.ref(future.result(PATIENCE)))
        del payload, future, first
        # The worker lets go of a batch a moment after the futures have it; the next one is proof.
        batcher.execute(Payload()) if end != "failed" else batcher.submit(Payload()).exception(PATIENCE)
        assert batcher.flush(PATIENCE)
    give_up = time.monotonic() + PATIENCE
    while any(reference() is not None for reference in watched):
        assert time.monotonic() < give_up, [gc.get_referrers(r()) for r in watched if r() is not None]
        time.sleep(0.001)


# The fall-back: only what `Future` promises in public.

PLAIN = {
    "asked for": """
import microbatch.job
microbatch.job.use_plain_future()
""",
    "an interpreter that is not known": """
import concurrent.futures as cf
its_own = cf.Future.__init__
def __init__(self):
    its_own(self)
    self._one_more = None
cf.Future.__init__ = __init__
import microbatch.job
""",
}


@pytest.mark.parametrize("reason", PLAIN)
def test_a_plain_future_serves_where_the_insides_are_not_known(tmp_path: Path, reason: str) -> None:
    told = run(
        """
import asyncio, concurrent.futures as cf
assert "_condition" in vars(microbatch.job.JobFuture())
assert microbatch.job.JobFuture.result is cf.Future.result

gate = threading.Event()
def process(batch):
    gate.wait(20)
    return [ValueError(job) if job == "bad" else job for job in batch]

with MicroBatcher(process, max_batch_size=2) as batcher:
    futures = [batcher.submit(number) for number in range(10)]
    bad, gone = batcher.submit("bad"), batcher.submit("gone")
    called = []
    for future in [*futures, bad, gone]:
        future.add_done_callback(called.append)
    assert gone.cancel() and gone.cancel() and gone.cancelled() and gone.status == "cancelled"
    assert called == [gone]
    assert bad.status == "pending" and batcher.status(bad.job_id) == "pending"
    until = time.monotonic() + 20
    while futures[0].status != "processing":
        assert time.monotonic() < until
    assert not futures[0].cancel()
    try:
        futures[0].result(0.01)
    except cf.TimeoutError:
        note("timeout")
    gate.set()
    assert not cf.wait([*futures, bad, gone], 20).not_done
    assert set(cf.as_completed([*futures, bad, gone], 20)) == {*futures, bad, gone}
    assert [future.result(20) for future in futures] == list(range(10))
    assert isinstance(bad.exception(20), ValueError) and bad.status == "failed"
    assert batcher.flush(20)
    until = time.monotonic() + 20
    while len(called) < 12:  # the stdlib's future calls them last
        assert time.monotonic() < until
    assert sorted(map(id, called)) == sorted(map(id, [*futures, bad, gone])), "each once"
    async def main():
        return await asyncio.wait_for(asyncio.wrap_future(batcher.submit("async")), 20)
    assert asyncio.run(main()) == "async"
    seen = threading.Event()
    def hurt(future):
        seen.set()
        raise SystemExit
    gate.clear()
    hurting = batcher.submit("hurting")
    hurting.add_done_callback(hurt)
    after = batcher.submit("after")
    gate.set()
    assert hurting.result(20) == "hurting" and after.result(20) == "after" and seen.wait(20)
    assert batcher.execute("more") == "more"
    assert batcher.stats().outstanding == 0
    note("served")

gate.clear()
batcher = MicroBatcher(process)
inherited = batcher.submit("inherited")
child = os.fork()
if not child:
    gate.set()
    assert isinstance(inherited.exception(5), ForkedError) and inherited.status == "unknown"
    assert batcher.execute("child's own") == "child's own"
    note("child")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
gate.set()
assert inherited.result(20) == "inherited"
note("parent")
batcher.shutdown(timeout=20)
""",
        tmp_path,
        preamble=PLAIN[reason] + PREAMBLE,
    )

    assert told.code == 0, told
    assert [line[0] for line in told.lines] == ["timeout", "served", "child", "parent"], told
