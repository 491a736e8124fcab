"""Signal handlers and finalisers in the middle of the batcher's own code: no wait there hangs (P1, P5, P6), and a fork
there leaves a child that works (P7).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import as_completed, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from interrupts import bounded
from programs import Told, run

from microbatch import Batch, BatcherClosed, JobCancelled, JobFailed, JobFuture, JobStatus, MicroBatcher, QueueFull
from microbatch import core as core_module
from microbatch.job import births

pytestmark = pytest.mark.timeout(120)

BOUND = 10.0
Making = MicroBatcher[Any, Any]


class Gated:
    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def process(self, batch: Batch[Any]) -> list[Any]:
        self.inside.set()
        assert self.go.wait(BOUND)
        return list(batch)


class Held:
    """A batcher with one job that runs, and moments at which its own code may be interrupted."""

    def __init__(self) -> None:
        self.gated = Gated()
        self.batcher: Making = MicroBatcher(self.gated, delivery_timeout=BOUND, max_batch_size=1)
        self.running = self.batcher.submit("running")
        assert self.gated.inside.wait(BOUND)
        assert not wait([self.running], 0).done  # so that there is a condition

    def moment(self, name: str) -> AbstractContextManager[Any]:
        if name == "its lock":
            return self.batcher._core.lock
        if name == "the lock of every future's end":
            return births()  # type: ignore[no-any-return]
        if name == "the condition of a future":
            return self.running._condition  # type: ignore[no-any-return]
        return self.batcher._core.starting[threading.get_ident()]  # type: ignore[no-any-return]


MOMENTS = ["its lock", "the lock of every future's end", "the condition of a future", "a thread's start"]


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.gated.go.set()
    assert held.batcher.shutdown(timeout=BOUND).finished


WAITS: dict[str, Callable[[Making, JobFuture[Any]], object]] = {
    "execute": lambda batcher, future: batcher.execute("new"),
    "result": lambda batcher, future: future.result(),
    "result within a time": lambda batcher, future: future.result(BOUND),
    "exception": lambda batcher, future: future.exception(),
    "wait": lambda batcher, future: wait([future]),
    "as_completed": lambda batcher, future: next(as_completed([future])),
    "flush": lambda batcher, future: batcher.flush(),
    "flush within a time": lambda batcher, future: batcher.flush(BOUND),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", WAITS)
def test_P5_a_wait_below_the_batchers_own_code_is_refused_at_once(held: Held, name: str, moment: str) -> None:
    with held.moment(moment):
        with pytest.raises(RuntimeError, match="would wait for itself"):
            WAITS[name](held.batcher, held.running)
        assert held.batcher.stats().submitted == 1, "refused means not accepted"

    held.gated.go.set()
    assert held.running.result(BOUND) == "running"
    assert held.batcher.execute("new") == "new"


@pytest.mark.parametrize("moment", MOMENTS)
def test_P6_a_shutdown_below_the_batchers_own_code_begins_and_does_not_wait(held: Held, moment: str) -> None:
    with held.moment(moment):
        report = held.batcher.shutdown()

    assert (report.finished, report.completed) == (False, 0)
    with pytest.raises(BatcherClosed):
        held.batcher.submit("late")
    held.gated.go.set()
    assert held.batcher.shutdown(timeout=BOUND).finished
    assert held.running.result(0) == "running"


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_does_not_wait_goes_on_below_the_batchers_own_code(held: Held, moment: str) -> None:
    told: list[Any] = []
    held.batcher.on(JobCancelled, told.append)
    with held.moment(moment):
        queued = held.batcher.submit("queued")
        many = held.batcher.submit_many(["a", "b"])
        named = held.batcher.submit("named", job_id="mine")
        assert (held.batcher.status("mine"), queued.status) == (JobStatus.PENDING, JobStatus.PENDING)
        assert held.batcher.stats().outstanding == 5
        held.batcher.on(JobFailed, told.append)
        held.batcher.off(JobFailed, told.append)
        for ask in (queued.result, queued.exception):
            with pytest.raises(FutureTimeoutError):
                ask(0)
        assert not held.running.cancel()
        if moment != "the condition of a future":
            assert not wait([queued], 0).done
        many[0].add_done_callback(told.append)
        assert many[0].cancel()
        assert (many[0].cancelled(), many[0].status) == (True, JobStatus.CANCELLED)
        assert told == [], "callbacks and listeners are called when the section is over"

    held.gated.go.set()
    assert wait([queued, *many, named], BOUND).not_done == set()
    assert held.batcher.shutdown(timeout=BOUND).finished
    assert told[0] is many[0]
    assert [event.job for event in told[1:]] == ["a"]


def test_P5_a_submit_below_the_batchers_own_code_never_waits_for_a_place(held: Held) -> None:
    full = MicroBatcher[Any, Any](Gated(), max_outstanding=1, submit_timeout=BOUND, delivery_timeout=0.5)
    full.submit("one")
    with births(), pytest.raises(QueueFull):
        full.submit("another")
    full.shutdown(timeout=0)


def test_P5_a_wait_below_a_lock_of_the_librarys_own_listeners_is_refused(held: Held) -> None:
    lock = threading.RLock()
    core_module.listeners_locks.append(lock)
    try:
        with lock, pytest.raises(RuntimeError, match="would wait for itself"):
            held.running.result()
    finally:
        core_module.listeners_locks.remove(lock)


def test_a_condition_that_an_interruption_left_locked_refuses_nothing(held: Held) -> None:
    def interrupted() -> None:
        held.running._condition.acquire()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    threading.Timer(0.1, held.gated.go.set).start()

    assert held.running.result(BOUND) == "running"


@pytest.mark.parametrize("many", [False, True])
def test_P6_what_a_handler_closes_in_the_middle_of_a_submit_accepts_nothing_more(many: bool) -> None:
    batcher = MicroBatcher[str, str](lambda batch: list(batch))
    batcher.execute("first")
    put = batcher._core.put

    def closing(job: Any) -> None:
        assert not batcher.shutdown().finished
        put(job)

    batcher._core.put = closing
    with pytest.raises(BatcherClosed):
        batcher.submit_many(["late"]) if many else batcher.submit("late")

    assert bounded(lambda: batcher.shutdown(timeout=BOUND)).finished
    stats = batcher.stats()
    assert (stats.submitted, stats.rejections["closed"]) == (1, 1)


# With real signals at random moments.

WORKS = ["submit", "first submit", "submit_many", "wait", "cancel", "flush"]


def handle(tmp_path: Path, work: str, question: str, tries: int, others: int = 0) -> Told:
    script = (Path(__file__).parent / "scripts" / "handlers.py").read_text()
    told = run(script, tmp_path, str(tries), work, question, str(others), preamble="")
    assert told.code == 0, told
    assert [line[0] for line in told.lines] == ["seed", "done"], told
    return told


@pytest.mark.parametrize(
    "question", ["execute", "result", "wait", "as_completed", "flush", "shutdown", "cancel", "look"]
)
def test_P1_what_a_signal_handler_asks_at_any_moment_of_a_submit_ends(tmp_path: Path, question: str) -> None:
    for work in WORKS:
        handle(tmp_path, work, question, 60)
        (tmp_path / "ledger").unlink()


@pytest.mark.parametrize("work", [*WORKS, "submit with an id", "full", "execute", "shutdown"])
@pytest.mark.parametrize("others", [0, 2])
def test_P7_a_child_that_a_signal_handler_forks_goes_on_with_what_it_was_at(
    tmp_path: Path, work: str, others: int
) -> None:
    handle(tmp_path, work, "fork", 40, others)


def test_P7_a_fork_between_the_look_at_the_lock_and_its_entering(tmp_path: Path) -> None:
    told = run(
        """
        batcher = MicroBatcher(lambda batch: list(batch), delivery_timeout=5)
        batcher.execute("first")
        children = []

        def fork(number, frame):
            children.append(os.fork())

        signal.signal(signal.SIGALRM, fork)
        locked = threading.Event()

        def hold():
            with batcher._core.lock:
                locked.set()
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGALRM)
                time.sleep(0.2)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        locked.wait()
        future = batcher.submit("blocked at the lock when the process forks")
        note("outcome", future.result(20)[:7])
        assert batcher.shutdown(timeout=5).finished
        if children[0]:
            assert os.waitpid(children[0], 0)[1] == 0
        """,
        tmp_path,
    )
    told.assert_quiet()
    assert [line[2] for line in told.lines] == ["blocked"] * 2, told


@pytest.mark.parametrize("place", ["put", "next_sequence", "after"])
def test_P7_a_fork_in_the_middle_of_an_acceptance(tmp_path: Path, place: str) -> None:
    told = run(
        f"""
        batcher = MicroBatcher(lambda batch: list(batch), delivery_timeout=5)
        batcher.execute("first")
        core, children = batcher._core, []

        class Numbers:
            def __init__(self, numbers):
                self.numbers = numbers
            def __next__(self):
                number = next(self.numbers)
                if threading.current_thread() is threading.main_thread():
                    fork()
                return number

        def fork():
            if not children:
                children.append(os.fork())

        put = core.put
        if {place!r} == "put":
            core.put = lambda job: (fork(), put(job))
        elif {place!r} == "after":
            core.put = lambda job: (put(job), fork())
        else:
            core.sequence = Numbers(core.sequence)
        future = batcher.submit("job")
        note("outcome", future.result(20), batcher.stats().completed)
        assert batcher.execute("another") == "another"
        assert batcher.shutdown(timeout=5).finished
        if children[0]:
            assert os.waitpid(children[0], 0)[1] == 0
        """,
        tmp_path,
    )
    told.assert_quiet()
    assert sorted(line[2:] for line in told.lines) == [["job", "1"], ["job", "2"]], told


def test_P7_a_main_thread_that_waits_when_its_handler_forks_is_woken_in_the_child(tmp_path: Path) -> None:
    told = run(
        """
        from concurrent.futures import wait, as_completed, FIRST_COMPLETED
        ways = {
            "result": lambda: future.exception(),
            "wait": lambda: wait([future, other]),
            "first": lambda: wait([future], return_when=FIRST_COMPLETED),
            "as_completed": lambda: list(as_completed([future, other])),
            "flush": lambda: batcher.flush(),
            "shutdown": lambda: batcher.shutdown(),
            "submit": lambda: batcher.submit("blocked", submit_timeout=15),
        }
        for way, ask in ways.items():
            go, child = threading.Event(), []
            batcher = MicroBatcher(lambda batch: go.wait(20) and list(batch), max_outstanding=2, delivery_timeout=30)
            future, other = batcher.submit("one"), batcher.submit("two")

            def fork(number, frame):
                child.append(os.fork())
                if child[0]:
                    go.set()

            signal.signal(signal.SIGALRM, fork)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            began = time.monotonic()
            ask()
            assert time.monotonic() - began < 10, way
            if not child[0]:
                assert type(future.exception(0)) is ForkedError
                if way != "shutdown":
                    go.set()
                    assert batcher.execute("own", delivery_timeout=5) == "own"
                assert batcher.shutdown(timeout=5).finished
                note("well", way)
                os._exit(0)
            assert os.waitpid(child[0], 0)[1] == 0, way
            assert batcher.shutdown(timeout=20).finished
        note("well", "parent")
        """,
        tmp_path,
    )
    told.assert_quiet()
    assert len(told.lines) == 8, told
