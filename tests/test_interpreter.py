"""The private things of the interpreter that the library leans on: each is there, and each fall-back works."""

from __future__ import annotations

import concurrent.futures
import dis
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from interrupts import bounded, interrupted_everywhere

import microbatch
from microbatch import interpreter
from microbatch.interpreter import Bell, FutureCondition, Token, Waiters, call_before_threads_end, future_is_known
from microbatch.job import JobFuture

PACKAGE = Path(microbatch.__file__).parent


def program(script: str) -> str:
    """What *script* prints in a process of its own, which must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The guards.


def test_this_interpreter_is_known() -> None:
    assert future_is_known()
    assert interpreter.rlock_is_known()
    assert "_condition" not in vars(JobFuture())
    assert issubclass(FutureCondition, type(threading.RLock()))
    assert callable(threading._register_atexit)  # type: ignore[attr-defined]


class _OtherState(Future[Any]):
    def __init__(self) -> None:
        super().__init__()
        self._state = "QUEUED"


class _MoreAttributes(Future[Any]):
    def __init__(self) -> None:
        super().__init__()
        self._lock = None


class _NoHandShake(Future[Any]):
    def set_running_or_notify_cancel(self) -> bool:
        return not self.cancelled()


@pytest.mark.parametrize("changed", [_OtherState, _MoreAttributes, _NoHandShake])
def test_a_future_with_other_insides_is_not_known(changed: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "Future", changed)

    assert not future_is_known()


def test_an_rlock_without_the_methods_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_RLock", threading._PyRLock)  # type: ignore[attr-defined]
    assert not interpreter.rlock_is_known()

    monkeypatch.undo()
    monkeypatch.delattr(sys, "_getframe")
    assert not interpreter.rlock_is_known()


def test_P1_a_future_that_ends_in_a_collection_in_the_middle_of_a_wait_keeps_its_outcome() -> None:
    said = program(
        """
        import gc
        from microbatch import JobFuture

        ended, told = set(), []

        def end(phase, info):
            if phase == "start" and not future.done():
                ended.add(number)
                future.add_done_callback(told.append)
                future.set_result(number)

        for number in range(20):
            future = JobFuture()
            future._job_id = str(number)  # as submit has it: the first attribute in the dict
            gc.collect()  # the free lists are empty: each object that is made brings the next collection nearer
            made = [[] for _ in range(number % 4)]
            gc.callbacks.append(end)
            gc.set_threshold(1)
            assert future.result(timeout=10) == number
            gc.set_threshold(0)
            gc.callbacks.clear()
            kept = dict(vars(future))
            assert (kept.get("_job_id"), told.pop()) == (str(number), future), kept
        assert ended == set(range(20)), ended
        print("kept")
        """
    )

    assert said == "kept\n"


def test_where_the_rlock_is_not_known_the_condition_of_the_stdlib_serves() -> None:
    said = program(
        """
        import sys, threading
        import microbatch
        for name in [name for name in sys.modules if name.startswith("microbatch")]:
            del sys.modules[name]
        getframe = sys._getframe
        del sys._getframe
        import microbatch.interpreter as interpreter
        sys._getframe = getframe
        assert interpreter.FutureCondition is threading.Condition
        import concurrent.futures as cf
        from microbatch import MicroBatcher
        with MicroBatcher(lambda batch: list(batch)) as batcher:
            futures = batcher.submit_many(range(20))
            assert not cf.wait(futures, 20).not_done
            assert {future.result() for future in cf.as_completed(futures, 20)} == set(range(20))
        print("served")
        """
    )

    assert said == "served\n"


def test_at_exit_without_the_private_hook_the_public_one_of_multiprocessing_serves() -> None:
    said = program(
        """
        import concurrent.futures.thread, threading
        del threading._register_atexit
        from microbatch.interpreter import call_before_threads_end
        call_before_threads_end(lambda: print("called"))
        """
    )

    assert said == "called\n"


def test_at_exit_the_private_hook_is_too_late_once_the_end_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object) -> None:
        raise RuntimeError("can't register atexit after shutdown")

    monkeypatch.setattr(threading, "_register_atexit", refuse)

    call_before_threads_end(lambda: None)


def test_the_waiters_of_the_stdlib_have_what_is_taken_from_them() -> None:
    future = JobFuture[int]()
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(concurrent.futures.wait([future], 20)), daemon=True)
    thread.start()
    while not future._waiters:
        assert thread.is_alive()
    waiter = future._waiters[0]

    assert isinstance(waiter.event, Bell)
    assert waiter.finished_futures == []
    future.set_result(1)
    thread.join(20)
    assert waiter.finished_futures == [future]
    assert seen[0].done == {future}


# The condition.


def test_a_condition_excludes_other_threads_and_can_be_entered_twice() -> None:
    condition = FutureCondition()
    with condition, condition:
        assert bounded(lambda: condition.acquire(False)) is False
    assert bounded(lambda: condition.acquire(False) and (condition.release() or True)) is True
    with pytest.raises(RuntimeError):
        condition.release()
    assert not condition._holds


def test_a_condition_wakes_who_waits_on_it() -> None:
    condition = FutureCondition()
    woken = threading.Event()

    def sleep() -> None:
        with condition:
            ready.set()
            assert condition.wait(20)
        woken.set()

    ready = threading.Event()
    thread = threading.Thread(target=sleep, daemon=True)
    thread.start()
    assert ready.wait(20)
    with condition:
        condition.notify_all()
    assert woken.wait(20)
    thread.join(20)


def test_P1_a_condition_that_an_interrupted_call_left_locked_comes_free() -> None:
    condition = FutureCondition()

    def locks() -> None:
        condition.acquire()

    locks()

    assert bounded(lambda: condition.acquire(False) and (condition.release() or True)) is True
    # The thread that had it can use it too, and gives it back whole.
    locks()
    with condition:
        assert bounded(lambda: condition.acquire(False)) is False
    assert bounded(lambda: condition.acquire() and (condition.release() or True)) is True
    assert not condition._holds


def test_P1_a_condition_left_locked_by_a_thread_that_is_gone_comes_free() -> None:
    condition = FutureCondition()
    thread = threading.Thread(target=condition.acquire, daemon=True)
    thread.start()
    thread.join(20)

    assert condition.acquire(False)
    condition.release()


def test_a_condition_that_a_running_call_locked_is_left_to_it() -> None:
    condition = FutureCondition()
    locked, go = threading.Event(), threading.Event()

    def holds() -> None:
        with condition:
            locked.set()
            assert go.wait(20)

    def generator() -> Iterator[None]:
        with condition:
            locked.set()
            assert go.wait(20)
            yield

    for call in (holds, lambda: next(generator())):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        assert locked.wait(20)
        assert not condition.acquire(False)
        go.set()
        assert condition.acquire()
        condition.release()
        thread.join(20)
        locked.clear()
        go.clear()


def test_P1_a_lost_condition_taken_again_in_the_last_moment_is_not_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = FutureCondition()

    def locks() -> None:
        condition.acquire()

    locks()
    is_over = interpreter._is_over
    looked, taken_again = threading.Event(), threading.Event()
    answers: list[bool] = []

    def slow_look(call: Any) -> bool:
        seen = is_over(call)
        if not looked.is_set():
            looked.set()
            assert taken_again.wait(20)
            assert seen
        return seen

    monkeypatch.setattr(interpreter, "_is_over", slow_look)
    thread = threading.Thread(target=lambda: answers.append(condition.acquire(False)), daemon=True)
    thread.start()
    assert looked.wait(20)
    with condition:
        taken_again.set()
        thread.join(20)
        assert answers == [False]

    # Not lost for ever either.
    assert bounded(lambda: condition.acquire(False) and (condition.release() or True)) is True


@pytest.mark.parametrize("use", ["acquire", "with"])
def test_P1_interrupts_at_every_point_of_a_condition_lose_nothing(use: str) -> None:
    def take(condition: Any) -> None:
        if use == "with":
            with condition:
                pass
        else:
            condition.acquire()
            condition.release()

    points = 0
    for where, condition in interrupted_everywhere(FutureCondition, take):
        points += 1
        freed = bounded(lambda it=condition: it.acquire() and (it.release() or True))
        assert freed, where
        assert not condition._holds, where
    assert points > 5


# The token.


def test_a_token_is_kept_until_it_is_taken() -> None:
    token = Token()
    assert not token.is_put()
    assert not token.take(0)
    assert not token.take(-1.0)
    token.put()
    token.put()
    assert token.is_put()
    assert token.take()
    assert not token.take(0.001)
    token.put()
    assert token.take(threading.TIMEOUT_MAX * 2)
    assert not token.is_put()


def test_a_token_wakes_its_sleeper() -> None:
    token = Token()
    for seconds in (None, 10.0):
        threading.Timer(0.01, token.put).start()
        assert bounded(lambda seconds=seconds: token.take(seconds))


def test_who_waits_for_a_token_wakes_in_time_however_short_it_is() -> None:
    def wait() -> list[bool]:
        return [Token().take(n * 1e-6) for n in (0.001, 1, 2, 5) for _ in range(2000)]

    assert set(bounded(wait)) == {False}


# The mark of a process.


def _kernel(answers: dict[int, bool]) -> Any:
    class Page(dict[int, int]):
        def madvise(self, advice: int) -> None:
            if not answers.get(advice, False):
                raise OSError

    return lambda *_, **__: Page({0: 0})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "answers", [None, {}, {-1: True, 18: True}], ids=["this kernel", "an old one", "one that says yes to everything"]
)
def test_P7_a_mark_is_not_inherited(answers: dict[int, bool] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if answers is not None:
        monkeypatch.setattr(interpreter.mmap, "mmap", _kernel(answers))
    mark = interpreter.process_mark()
    assert mark[0]
    child = os.fork()
    if not child:
        os._exit(bool(mark[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mark[0]


def test_where_there_is_no_anonymous_memory_a_mark_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interpreter.mmap, "MAP_PRIVATE")
    mark = interpreter.process_mark()
    assert mark[0]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not mark[0]


# The bell.


def test_a_bell_is_an_event() -> None:
    bell = Bell()
    assert not bell.is_set()
    assert not bell.wait(0)
    assert not bell.wait(-1.0)
    bell.set()
    assert bell.is_set()
    assert bell.wait()
    assert bell.wait(threading.TIMEOUT_MAX * 2)
    bell.clear()
    assert not bell.wait(0.001)
    assert not bell.sleepers


def test_a_bell_wakes_everybody() -> None:
    bell = Bell()
    threads = [threading.Thread(target=bell.wait, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len(bell.sleepers) < 20:
        assert all(thread.is_alive() for thread in threads)
    bell.set()
    bell.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_P1_interrupts_at_every_point_of_a_wait_do_not_hang_who_rings() -> None:
    for where, bell in interrupted_everywhere(Bell, lambda bell: bell.wait(0.001)):
        bounded(bell.set)
        assert bell.wait(0), where


def test_waiters_change_the_event_once() -> None:
    class Waiter:
        event: Any = threading.Event()

    first, second = Waiters(), Waiters()
    waiter = Waiter()
    first.append(waiter)
    bell = waiter.event
    second.append(waiter)

    assert isinstance(bell, Bell)
    assert waiter.event is bell
    assert first == second == [waiter]


# What the interpreter leaves open.


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _open_jumps(code: CodeType) -> Iterator[int | None]:
    """Lines with a loop inside a `with` whose jump back is not under the protection of that `with`."""
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    instructions = list(dis.get_instructions(code))
    names = [instruction.opname for instruction in instructions]
    place = {instruction.offset: number for number, instruction in enumerate(instructions)}

    def handlers(offset: int) -> list[int]:
        found: list[int] = []
        while True:
            target = next((entry.target for entry in table if entry.start <= offset < entry.end), None)
            if target is None or target in found:
                return found
            found.append(target)
            offset = target

    for instruction in instructions:
        if "JUMP_BACKWARD" in instruction.opname and "NO_INTERRUPT" not in instruction.opname:
            outside = handlers(instruction.offset)
            for handler in handlers(instruction.argval):
                exits = names[place[handler] : place[handler] + 3]
                if handler not in outside and "WITH_EXCEPT_START" in exits:
                    yield instruction.positions.lineno if instruction.positions else None


LOCKING = ["batcher", "collector", "core", "events", "interpreter", "job", "life", "queues", "registry"]
LOCKING += ["stats", "supervisor", "testing", "worker"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="blocks are not protected by a table before Python 3.11")
@pytest.mark.parametrize("module", LOCKING)
def test_P1_no_loop_can_be_left_without_releasing_its_lock(module: str) -> None:
    """python/cpython#108214: a signal handler's exception at such a jump passes the `with` by."""
    source = (PACKAGE / f"{module}.py").read_text()
    found = [
        f"{module}.py:{line} in {code.co_name}"
        for code in _codes(compile(source, module, "exec"))
        for line in _open_jumps(code)
    ]

    assert not found, "put the loop into a function of its own"


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 12), (3, 13)), reason="only Python 3.12 and 3.13 have the defect")
def test_such_a_loop_would_be_found() -> None:
    source = """
        def f(lock, things):
            with lock:
                for thing in things:
                    if thing:
                        thing.go()
        """
    assert [line for code in _codes(compile(textwrap.dedent(source), "f", "exec")) for line in _open_jumps(code)] == [5]
