"""Two or three threads with a step each, in every order of one or two preemptions.

One thread runs its step up to a line of the library, there the others run theirs, and then it goes on: for every line
of every step. With two preemptions the second thread stops at each of its lines in turn, and the first one ends before
it. The locks and the interpreter are the real ones. (`frontrun` puts locks of its own in their places, on which a
future falls back to another condition, and comes to no end with three steps.)

The batcher has no threads here but those of the scenario: a worker's turn and a supervisor's look are steps. What is
left to do at the end is done by wake-ups as usual. A scenario is only worth something if it fails on a library that
is broken on purpose: `tests/test_chaos_schedules.py` breaks it.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from types import FrameType
from typing import Any

import microbatch
from microbatch import BatcherClosed, BatcherShutDown, JobCancelled, JobCompleted, JobFailed, MicroBatcher, QueueFull
from microbatch.core import Core, cores
from microbatch.supervisor import Supervisor
from microbatch.worker import Worker, leave

from .verdict import Key, judge, outcome_of

Step = Callable[["Stage"], object]


class Unthreaded(MicroBatcher[Any, Any]):
    """Its worker and its supervisor are in their places, and somebody else calls them."""

    def _drive(self) -> tuple[Callable[[], float], Callable[[Core], None]]:
        return time.monotonic, place


def place(core: Core) -> None:
    for _ in range(core.options.max_concurrent_batches):
        Worker(core).claim()
    Supervisor(core).claim()
    # The scenario's threads are callers, whatever they call.
    core.own.clear()


class Stage:
    """A batcher, what it was asked, and what it did."""

    def __init__(self, **options: Any) -> None:
        self.processed: list[Any] = []
        self.heard: list[Any] = []
        self.accepted: dict[Key, Any] = {}
        self.refused: list[Any] = []
        self.flushes: list[tuple[list[Any], bool]] = []
        self.batcher = Unthreaded(self.process, when_full="raise", **options)
        self.core = self.batcher._core
        self.core.inline = True
        cores.discard(self.core)
        for kind in (JobCompleted, JobFailed, JobCancelled, BatcherShutDown):
            self.batcher.on(kind, self.heard.append)
        place(self.core)
        self.workers = list(self.core.workers)

    def process(self, batch: Any) -> list[Any]:
        self.processed += batch
        return list(batch)

    def submit(self, job: Any) -> None:
        try:
            self.accepted[job] = self.batcher.submit(job)
        except (BatcherClosed, QueueFull):
            self.refused.append(job)

    def take(self) -> None:
        self.workers[0].turn(wait=False)

    def take_too(self) -> None:
        self.workers[1].turn(wait=False)

    def cancel(self) -> None:
        self.cancelled = self.accepted["early"].cancel()

    def shut_down(self) -> None:
        self.batcher.shutdown(wait=False)

    def look(self) -> None:
        self.core.supervisor.check()

    def flush(self) -> None:
        self.batcher._core.flush_open_batch()

    def bury(self) -> None:
        """The worker has died, with what it holds; the supervisor comes by."""
        self.workers[0].gone = True
        self.look()

    def end(self) -> None:
        """A whole shutdown, with the turns and the looks that it takes."""
        self.shut_down()
        self.take()
        if not self.core.outstanding:
            leave(self.workers[0])
        self.look()

    def __str__(self) -> str:
        outcomes = {job: str(future) for job, future in self.accepted.items()}
        return f"{outcomes} processed={self.processed} refused={self.refused} heard={self.heard}"

    def finish(self) -> None:
        """What the threads would do from here on: the wake-ups that they left must be enough."""
        self.batcher.shutdown(wait=False)
        for _ in range(20):
            self.core.supervisor.check()
            for worker in list(self.core.workers):
                while worker.turn(wait=False):
                    pass
                if self.core.closed and not self.core.outstanding:
                    leave(worker)
            if self.core.finished:
                return

    def holds(self) -> bool:
        """The invariant of every scenario."""
        self.finish()
        outcomes = {job: outcome_of(future) for job, future in self.accepted.items()}
        verdict = judge(dict.fromkeys(self.accepted), list(enumerate(self.processed)), outcomes)
        ends = [event for event in self.heard if not isinstance(event, BatcherShutDown)]
        return (
            not verdict.violations()
            and self.core.finished
            and sorted(event.job for event in ends) == sorted(map(str, self.accepted))
            and sum(isinstance(event, BatcherShutDown) for event in self.heard) == 1
            and isinstance(self.heard[-1], BatcherShutDown)
            and not set(self.refused) & set(self.processed)
        )


def early() -> Stage:
    """With a job in the queue."""
    stage = Stage()
    stage.submit("early")
    return stage


def two_workers() -> Stage:
    stage = Stage(max_concurrent_batches=2, max_batch_size=1)
    stage.submit("early")
    stage.submit("next")
    return stage


def full() -> Stage:
    return Stage(max_outstanding=1)


def lingering() -> Stage:
    stage = Stage(linger=9.0)
    stage.submit("early")
    return stage


def dying() -> Stage:
    """The worker has taken a job, and holds it."""
    stage = early()
    with stage.core.collecting:
        stage.workers[0]._collect(wait=False)
    return stage


def cancelled_is_not_processed(stage: Stage) -> bool:
    future = stage.accepted["early"]
    try:
        completed = future.exception(0) is None
    except CancelledError:
        completed = False
    return stage.holds() and stage.cancelled is not ("early" in stage.processed) and not (stage.cancelled and completed)


def one_has_the_place(stage: Stage) -> bool:
    return len(stage.accepted) == 1 and len(stage.refused) == 1 and stage.holds()


def what_the_dead_held_is_unknown(stage: Stage) -> bool:
    stage.finish()
    return (
        stage.accepted["early"].status.value == "unknown"
        and stage.accepted["a"].done()
        and stage.processed == ["a"]
        and stage.core.finished
    )


def flushed_goes_at_once(stage: Stage) -> bool:
    """What was accepted before the flush does not linger any more."""
    stage.workers[0].turn(wait=False)
    return "early" in stage.processed and stage.holds()


@dataclass(frozen=True)
class Scenario:
    setup: Callable[[], Stage]
    steps: tuple[Step, ...]
    invariant: Callable[[Stage], bool] = Stage.holds


def submit(job: str) -> Step:
    return lambda stage: stage.submit(job)


SCENARIOS: dict[str, Scenario] = {
    "submit, end of a shutdown": Scenario(Stage, (submit("a"), Stage.end)),
    "submit, shutdown, worker": Scenario(early, (submit("a"), Stage.shut_down, Stage.take)),
    "submit, submit when full": Scenario(full, (submit("a"), submit("b")), one_has_the_place),
    "cancel, take": Scenario(early, (Stage.cancel, Stage.take), cancelled_is_not_processed),
    "cancel, end of a shutdown": Scenario(early, (Stage.cancel, Stage.end), cancelled_is_not_processed),
    "shutdown, shutdown": Scenario(early, (Stage.end, Stage.shut_down)),
    "shutdown, look, worker": Scenario(early, (Stage.shut_down, Stage.look, Stage.take)),
    "take, take": Scenario(two_workers, (Stage.take, Stage.take_too)),
    "death of the worker, submit": Scenario(dying, (Stage.bury, submit("a")), what_the_dead_held_is_unknown),
    "flush, submit": Scenario(lingering, (Stage.flush, submit("a")), flushed_goes_at_once),
    "flush, submit, worker": Scenario(lingering, (Stage.flush, submit("a"), Stage.take), flushed_goes_at_once),
}

_LIBRARY = os.path.dirname(microbatch.__file__) + os.sep
# So long the others may take before they count as blocked by whoever was stopped, which then goes on.
BLOCKED = 0.05
BOUND = 20.0


class Hang(AssertionError):
    """A step that never ends."""


class Stop:
    """A trace function: at the line with this number, from 1, it does something once, unless the lock is held there."""

    def __init__(self, at: int, core: Core, do: Callable[[], None]) -> None:
        self.at, self.core, self.do = at, core, do
        self.lines = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at and not self.core.lock._is_owned():  # type: ignore[attr-defined]
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                self.do()
        return self

    def trace(self, step: Step, stage: Stage) -> None:
        sys.settrace(self)
        try:
            step(stage)
        finally:
            sys.settrace(None)


class Run:
    """One order: *first* stops at its line *at*; of the others the first stops at *then*, 0 for not at all."""

    def __init__(self, scenario: Scenario, order: tuple[Step, ...], at: int, then: int = 0) -> None:
        self.stage = scenario.setup()
        first, *others = order
        self.errors: list[BaseException] = []
        self.rest = threading.Event()  # the others are done, or stopped
        self.first_is_done = threading.Event()
        self.second = Stop(then, self.stage.core, self._hand_back)
        self.thread = threading.Thread(target=self._run_others, args=(others,), daemon=True)
        self.first = Stop(at, self.stage.core, self._hand_over)
        self._contain(lambda: self.first.trace(first, self.stage))
        self.first_is_done.set()
        if self.first.where:
            self.thread.join(BOUND)
        else:
            self._run_others(others)
        if self.thread.is_alive():
            raise Hang(f"a step never ends after a stop at {self.first.where} and {self.second.where}")

    def _hand_over(self) -> None:
        self.thread.start()
        self.rest.wait(BLOCKED)

    def _hand_back(self) -> None:
        self.rest.set()
        self.first_is_done.wait(BLOCKED)

    def _run_others(self, others: list[Step]) -> None:
        for number, step in enumerate(others):
            if number == 0 and self.second.at:
                self._contain(lambda step=step: self.second.trace(step, self.stage))  # type: ignore[misc]
            else:
                self._contain(lambda step=step: step(self.stage))  # type: ignore[misc]
        self.rest.set()

    def _contain(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            self.errors.append(error)


def orders(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    yield from itertools.permutations(steps)


def explore(
    scenario: Scenario, preemptions: int = 1, seconds: float = 60.0, most: int = 10
) -> tuple[int, list[str], bool]:
    """How many orders there were, what is wrong with which, and whether it came to an end: in *seconds*, and before so
    many are wrong as *most* says.
    """
    count, problems = 0, []
    give_up = time.monotonic() + seconds
    for order in orders(scenario.steps):
        for at in itertools.count(1):
            if time.monotonic() > give_up or len(problems) >= most:
                return count, problems, False
            for then in itertools.count() if preemptions > 1 else (0,):
                run = Run(scenario, order, at, then)
                count += 1
                if run.errors or not scenario.invariant(run.stage):
                    names = [getattr(step, "__name__", str(step)) for step in order]
                    where = f"{run.first.where} and {run.second.where}" if then else run.first.where
                    problems.append(f"{names} stopped at {where}: {run.errors} {run.stage}")
                over = time.monotonic() > give_up or len(problems) >= most
                if over or not run.first.where or (then and run.second.lines < then):
                    break
            if run.first.lines < at:
                break
    return count, problems, True
