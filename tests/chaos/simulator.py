"""The whole library in one thread on virtual time, every decision drawn from a seed.

The worker's turn is taken in pieces (collect, process, settle), the supervisor's and the workers' sleeps are
simulated, and in between anybody may do anything: submit, cancel, flush, shut down, interrupt a thread, kill one, let
time pass. While the processor works, the others go on. A wake-up that gets lost leaves a sleeper asleep, and that is
seen the next time everything has come to rest.

    python -m tests.chaos --level simulator --seed 17    the one history, told
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from microbatch import (
    Batch,
    BatcherClosed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobStatus,
    MicroBatcher,
    OutcomeUnknown,
    QueueFull,
    RetryPolicy,
    supervisor,
)
from microbatch.collector import NEVER, Collected, Wait
from microbatch.core import Core, DeathWatch, cores
from microbatch.judge import Outcome as Answers
from microbatch.supervisor import Supervisor
from microbatch.testing import ManualClock
from microbatch.worker import Worker, leave

from .verdict import EXPIRED, Verdict, code_of, id_and_key, judge, outcome_of

# Far above what any history needs: one that gets here never ends.
ROUNDS = 3_000
DEPTH = 3

PENDING, PROCESSING, CANCELLED = JobStatus.PENDING, JobStatus.PROCESSING, JobStatus.CANCELLED


class Violation(AssertionError):
    """What a history did that no history may do."""


class Bad(Exception):
    """A job's own fault."""


class Refused(Exception):
    """A whole batch that nobody tries again."""


class Lost(Exception):
    """Left no trace and is worth another attempt."""


class NotOpened(Lost):
    """Of which the processor cannot say whom it hit."""


class Undecided(OutcomeUnknown):
    """Try me again with the same batch."""


class Hopeless(OutcomeUnknown):
    """Nobody will ever know."""


@dataclass(frozen=True, slots=True)
class Payload:
    n: int
    bad: bool


@dataclass(slots=True)
class Accepted:
    """What the model knows of a job."""

    n: int
    future: JobFuture[Any]
    rank: tuple[int, int]
    lingers_until: float
    deadline: float
    taken: bool = False
    handed: int = 0
    said: str | None = None  # the processor's last word on it
    called: int = 0


class State(Enum):
    STARTING = "has not claimed its place"
    AWAKE = "is about to collect, or to look"
    ASLEEP = "sleeps until a token or an instant"
    HOLDING = "has a batch, and the processor not yet"
    INSIDE = "is inside the processor"
    ANSWERED = "has answers, and the futures not yet"
    GONE = "has ended"


class Asleep(BaseException):
    def __init__(self, until: float) -> None:
        self.until = until


class SimulatedWorker(Worker):
    def _sleep(self, wait: Wait) -> None:
        raise Asleep(wait.until)


class Thread:
    """A worker's or the supervisor's, with the place where it stands."""

    def __init__(self, core: Core, kind: str) -> None:
        self.state = State.STARTING
        self.kind = kind
        self.watch = DeathWatch(core)
        self.until = NEVER
        self.collected: Collected | None = None
        self.answers: Answers | None = None

    @property
    def worker(self) -> Worker:
        held: Worker = self.watch.holder
        return held


class Simulated(MicroBatcher[Payload, Any]):
    def __init__(self, simulation: Simulation, processor: Any, **options: Any) -> None:
        self._simulation = simulation
        super().__init__(processor, when_full="raise", **options)

    def _drive(self) -> tuple[Callable[[], float], Callable[[Core], None]]:
        return self._simulation.clock, self._simulation.start_threads


class Table:
    """The processor: it knows which rows there are, and is as honest as the contract asks."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.rows: list[tuple[int, int]] = []
        self.written: dict[str, list[Any]] = {}
        self.undecided: dict[str, tuple[Payload, ...]] = {}
        self.opened = self.closed = 0

    def open(self) -> None:
        self.opened += 1
        if self.simulation.chance() < 0.02:
            raise NotOpened

    def close(self) -> None:
        self.closed += 1

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, (Lost, Undecided))

    def abandon(self, batch: Any) -> None:
        self.simulation.tell("abandon", batch.id)

    def process(self, batch: Batch[Payload]) -> Any:
        self.simulation.handed_over(batch)
        if self.simulation.chance() < 0.2:
            self.simulation.meanwhile()
        try:
            answer = self.answer(batch)
        except BaseException as error:
            self.simulation.hear(batch, [error] * len(batch))
            raise
        if len(answer) == len(batch):
            self.simulation.hear(batch, answer)
        return answer

    def answer(self, batch: Batch[Payload]) -> list[Any]:
        chance = self.simulation.chance()
        if batch.id not in self.written:
            if chance < 0.06:
                raise Lost
            if chance < 0.08:
                raise Refused
            if chance < 0.09:
                raise SystemExit
        self.undecided.setdefault(batch.id, batch[:])
        if chance > 0.94:
            if chance > 0.97:
                self.write(batch)
            raise Undecided
        self.undecided.pop(batch.id)
        if chance > 0.92:
            if chance > 0.93:
                self.write(batch)
            raise Hopeless
        return self.write(batch)[chance > 0.91 :]  # one answer too little breaks the contract

    def write(self, batch: Batch[Payload]) -> list[Any]:
        if batch.id not in self.written:
            self.written[batch.id] = [Bad(payload.n) if payload.bad else self.row(payload) for payload in batch]
        return self.written[batch.id]

    def row(self, payload: Payload) -> dict[str, int]:
        self.rows.append((len(self.rows), payload.n))
        return {"id": self.rows[-1][0], "key": payload.n}


@dataclass(frozen=True)
class Steady(RetryPolicy):
    """Its jitter belongs to the seed."""

    draw: Callable[[], float] = random.random

    def delay(self, attempts: int, draw: object = None) -> float:
        return super().delay(attempts, self.draw)


class Simulation:
    """One history. `run()` returns its verdict, or raises a `Violation`."""

    def __init__(self, seed: int, steps: int = 200, story: list[str] | None = None) -> None:
        self.dice = random.Random(seed)
        self.chance = self.dice.random
        self.seed, self.steps, self.story = seed, steps, story
        self.clock = ManualClock()
        self.table = Table(self)
        self.jobs: dict[int, Accepted] = {}
        self.by_future: dict[JobFuture[Any], int] = {}
        self.threads: list[Thread] = []
        self.supervisor: Thread | None = None
        self.collecting: Thread | None = None
        self.heard = Counter[int]()
        self.numbers = iter(range(10**9))
        self.last = self.flushed = -1
        self.depth = 0
        self.faults = self.rejected = 0
        self.closed = self.killed_late = False
        self.abandon_at = NEVER
        self.options = self.draw_options()
        self.batcher = Simulated(self, self.table, **self.options)
        self.core = self.batcher._core
        self.core.inline = True
        cores.discard(self.core)
        if self.chance() < 0.5:
            for kind in (JobCompleted, JobFailed, JobCancelled):
                self.batcher.on(kind, lambda event: self.heard.update((event.job.n,)))
        self.listening = bool(self.core.listeners.by_type)
        self.actions = self.draw_actions()

    def draw_options(self) -> dict[str, Any]:
        choice = self.dice.choice
        policies = [
            None,
            Steady(backoff=0.5, backoff_max=8.0, draw=self.chance),
            Steady(max_attempts=2, backoff=1.0, backoff_max=8.0, draw=self.chance),
            Steady(max_attempts=3, backoff=0.0, draw=self.chance),
        ]
        return {
            "max_batch_size": choice((1, 2, 3, 7, 100)),
            "max_outstanding": choice((1, 3, 10, 10_000)),
            "max_concurrent_batches": choice((1, 1, 2, 3)),
            "linger": choice((0.0, 0.0, 0.0, 1.0)),
            "delivery_timeout": choice((20.0, 20.0, 3.0)),
            "retry": choice(policies),
        }

    def draw_actions(self) -> list[tuple[float, Callable[[], None]]]:
        """What may happen in a step, with a part of the chances each; every history has its own mixture."""
        weights: list[tuple[float, Callable[[], None]]] = [
            (30, self.submit),
            (3, self.submit_many),
            (8, self.cancel),
            (40, self.run_somebody),
            (15, self.let_time_pass),
            (2, self.flush),
            (0.1, self.shut_down),
            (self.dice.choice((0, 0, 1, 3)), self.interrupt),
            (self.dice.choice((0, 0, 1, 2)), self.kill),
        ]
        total, share = sum(weight for weight, _ in weights), 0.0
        actions = []
        for weight, action in weights:
            share += weight / total
            actions.append((share, action))
        return actions

    def run(self) -> Verdict:
        for _ in range(self.steps):
            self.act()
        if not self.closed or self.chance() < 0.5:
            self.shut_down()
        self.run_to_the_end()
        return self.judge()

    def act(self) -> None:
        chance = self.chance()
        for share, action in self.actions:
            if chance < share:
                action()
                return

    def tell(self, *what: object) -> None:
        if self.story is not None:
            self.story.append(f"{self.clock.now:10.3f} {'  ' * self.depth}{' '.join(map(str, what))}")

    def require(self, true: object, *what: object) -> None:
        if not true:
            raise Violation(" ".join(map(str, what)))

    # What callers do.

    def submit(self) -> None:
        payload = Payload(next(self.numbers), self.chance() < 0.1)
        priority = self.dice.choice((0, 0, 0, 1, -1))
        lifetime = self.options["delivery_timeout"] if self.chance() < 0.8 else self.dice.choice((0.5, 5.0, 60.0))
        job_id = self.dice.choice("abc") if self.chance() < 0.1 else None
        room = len(self.core.outstanding) < self.options["max_outstanding"]
        try:
            future = self.batcher.submit(payload, priority=priority, delivery_timeout=lifetime, job_id=job_id)
        except BatcherClosed:
            self.require(self.closed, "refused as closed, and it is open")
        except QueueFull:
            self.rejected += 1
            self.require(not room, "refused as full, and it has room")
        else:
            self.tell("submit", payload, f"priority={priority} delivery_timeout={lifetime} job_id={job_id}")
            if future in self.by_future:
                self.require(job_id is not None, payload, "got the future of", self.by_future[future])
                return
            self.require(not self.closed, "accepted", payload, "after the shutdown")
            self.accept(payload, future, priority, lifetime)

    def submit_many(self) -> None:
        payloads = [Payload(next(self.numbers), self.chance() < 0.1) for _ in range(self.dice.randrange(1, 6))]
        try:
            futures = self.batcher.submit_many(payloads)
        except BatcherClosed:
            self.require(self.closed, "refused as closed, and it is open")
        except (QueueFull, ValueError):
            self.rejected += len(payloads)
        else:
            self.tell("submit", payloads)
            for payload, future in zip(payloads, futures, strict=True):
                self.accept(payload, future, 0, self.options["delivery_timeout"])

    def accept(self, payload: Payload, future: JobFuture[Any], priority: int, lifetime: float) -> None:
        n, now = payload.n, self.clock.now
        lingers_until = now + min(self.options["linger"], lifetime / 2)
        job = self.jobs[n] = Accepted(n, future, (-priority, n), lingers_until, now + lifetime)
        self.by_future[future] = n
        self.last = n
        self.require(len(self.core.outstanding) <= self.options["max_outstanding"], "above the bound")
        chance = self.chance()

        def call_back(_: object) -> None:
            job.called += 1
            if chance < 0.02:
                raise SystemExit
            if chance < 0.05 and self.depth < DEPTH:
                self.submit()
            elif chance < 0.055:
                self.shut_down()

        future.add_done_callback(call_back)

    def cancel(self) -> None:
        if not self.jobs:
            return
        job = self.jobs.get(self.last - int(self.chance() ** 2 * 30))
        if job is None:
            return
        before = job.future.status
        cancelled = job.future.cancel()
        self.tell("cancel", job.n, before, cancelled)
        self.require(cancelled is (before in (PENDING, CANCELLED)), "cancel of", job.n, before, "says", cancelled)
        self.require(not cancelled or job.future.status is CANCELLED, job.n, "is", job.future.status)

    def flush(self) -> None:
        before = [job for job in self.jobs.values() if not job.future.done()]
        self.flushed = self.last
        done = self.batcher.flush(0)
        self.tell("flush", done)
        self.require(not done or all(job.future.done() for job in before), "flush is done, and the jobs are not")

    def shut_down(self) -> None:
        timeout = self.dice.choice((None, None, 0.0, 2.0, 30.0))
        cancels = self.chance() < 0.3
        self.closed = True
        if timeout is not None:
            self.abandon_at = min(self.abandon_at, self.clock.now + timeout)
        self.tell("shutdown", timeout, cancels)
        self.batcher.shutdown(False, timeout=timeout, cancel_futures=cancels)

    # Time and threads.

    def let_time_pass(self) -> None:
        if self.depth == 0 and self.chance() < 0.5:
            self.rest()
        if self.chance() < 0.3:
            self.clock.now += self.chance() ** 3 * 5
        else:
            self.jump()

    def jump(self) -> bool:
        """To the next instant at which somebody wakes; False if there is none."""
        now = self.clock.now
        nearest = min((thread.until for thread in self.threads if now < thread.until), default=NEVER)
        if self.supervisor is not None and now < self.core.next_check < nearest:
            nearest = self.core.next_check
        if nearest == NEVER:
            return False
        self.clock.now = nearest
        return True

    def start_threads(self, core: Core) -> None:
        for _ in range(core.options.max_concurrent_batches - len(core.workers)):
            self.threads.append(Thread(core, "worker"))
        if not core.supervised():
            self.threads.append(Thread(core, "supervisor"))

    def runnable(self) -> list[Thread]:
        return [thread for thread in self.threads if self.may_run(thread)]

    def may_run(self, thread: Thread) -> bool:
        state = thread.state
        if state is State.ASLEEP:
            token = self.core.alarm if thread.kind == "supervisor" else self.core.bell
            until = self.core.next_check if thread.kind == "supervisor" else thread.until
            return until <= self.clock.now or token.is_put()
        if state is State.AWAKE:
            return thread.kind == "supervisor" or self.collecting in (None, thread)
        if state in (State.HOLDING, State.ANSWERED):
            return thread.until <= self.clock.now
        return state is State.STARTING

    def run_somebody(self) -> None:
        runnable = self.runnable()
        if runnable:
            self.go_on(self.dice.choice(runnable))

    def go_on(self, thread: Thread) -> None:
        _STEPS[thread.kind, thread.state](self, thread)
        if thread.state is State.GONE and thread in self.threads:
            self.threads.remove(thread)

    def claim(self, thread: Thread) -> None:
        is_worker = thread.kind == "worker"
        holder = thread.watch.holder = SimulatedWorker(self.core) if is_worker else Supervisor(self.core)
        if holder.claim():
            thread.state = State.AWAKE
            self.supervisor = self.supervisor if is_worker else thread
        else:
            thread.state = State.GONE
            thread.watch.left = True
        # The one thread of this process is everybody's, and must not be taken for the batcher's own.
        self.core.own.clear()

    def wake(self, thread: Thread) -> None:
        token = self.core.bell if thread.kind == "worker" else self.core.alarm
        token.take(0)
        thread.state, thread.until = State.AWAKE, NEVER
        if thread.kind == "worker" and self.core.short:
            self.core.replace_dead()

    def look(self, thread: Thread) -> None:
        guard: Supervisor = thread.watch.holder
        if guard.check():
            thread.state = State.ASLEEP
            return
        self.core.ready = False
        thread.watch.left = True
        thread.watch.report()
        thread.state, self.supervisor = State.GONE, None

    def collect(self, thread: Thread) -> None:
        self.collecting = thread
        try:
            collected = thread.worker._collect(True)
        except Asleep as asleep:
            thread.state, thread.until = State.ASLEEP, asleep.until
            return
        self.collecting = None
        if collected is None:
            leave(thread.worker)
            thread.watch.left = True
            thread.watch.report()
            thread.state = State.GONE
            return
        self.take([self.jobs[self.by_future[job.future]] for job in collected.jobs], collected)
        thread.collected, thread.state = collected, State.HOLDING
        self.take_time(thread)

    def process(self, thread: Thread) -> None:
        assert thread.collected is not None
        thread.state = State.INSIDE
        thread.answers = thread.worker._process(thread.collected)
        thread.state = State.ANSWERED
        self.take_time(thread)

    def settle(self, thread: Thread) -> None:
        assert thread.answers is not None
        if thread.worker in self.core.workers:
            thread.worker.settle(thread.answers)
        thread.state, thread.until = State.AWAKE, NEVER

    def take_time(self, thread: Thread) -> None:
        thread.until = self.clock.now + (0.0 if self.chance() < 0.6 else self.chance() ** 4 * 30)

    def meanwhile(self) -> None:
        """The others go on while one is inside the processor."""
        if self.depth >= DEPTH:
            return
        self.depth += 1
        for _ in range(self.dice.randrange(1, 6)):
            self.act()
        self.depth -= 1

    def victims(self) -> list[Thread]:
        """A thread inside the processor is hit by what the processor raises; the others are hit here."""
        spared = (State.STARTING, State.GONE, State.INSIDE)
        return [thread for thread in self.threads if thread.state not in spared]

    def interrupt(self) -> None:
        """An exception from outside, where the thread stands."""
        victims = self.victims()
        if not victims:
            return
        thread = self.dice.choice(victims)
        self.tell("interrupt the", thread.kind, "that", thread.state.value)
        self.faults += 1
        if thread.kind == "supervisor":
            thread.watch.holder._recover()
        else:
            self.let_go(thread)
            thread.worker.recover()
        thread.state, thread.until = State.AWAKE, NEVER

    def kill(self) -> None:
        victims = self.victims()
        if not victims:
            return
        thread = self.dice.choice(victims)
        self.tell("kill the", thread.kind, "that", thread.state.value)
        self.faults += 1
        self.let_go(thread)
        self.threads.remove(thread)
        thread.state = State.GONE
        self.killed_late |= self.core.finished
        thread.watch.report()
        if thread.kind == "supervisor":
            self.supervisor = None
            if self.core.short and (self.core.outstanding or self.core.owed):
                self.core.replace_dead()

    def let_go(self, thread: Thread) -> None:
        if self.collecting is thread:
            self.collecting = None

    def rest(self) -> None:
        """Let everybody run until nobody can, and look whether somebody should be awake."""
        for _ in range(ROUNDS):
            runnable = self.runnable()
            if not runnable:
                return self.check_rest()
            self.go_on(self.dice.choice(runnable))
        raise Violation(f"it does not come to rest: {self.standing()}")

    def run_to_the_end(self) -> None:
        for _ in range(ROUNDS):
            if self.core.short:
                self.core.replace_dead()  # as whoever waits in `shutdown` does
            self.rest()
            if self.core.finished and not self.threads:
                return
            if not self.jump() and not self.core.short:
                break
        self.require(self.core.finished, "the shutdown never finishes:", self.standing())
        self.require(not self.threads, "threads stay:", self.standing())

    def standing(self) -> str:
        threads = ", ".join(f"a {thread.kind} {thread.state.value} ({thread.until})" for thread in self.threads)
        return f"{threads}; outstanding {list(self.core.outstanding)}, next check {self.core.next_check}"

    # What must be so.

    def handed_over(self, batch: Batch[Payload]) -> None:
        numbers = [payload.n for payload in batch]
        self.tell("process", batch.id, f"attempt={batch.attempt} trigger={batch.trigger}", numbers)
        size, retry = self.options["max_batch_size"], self.options["retry"]
        self.require(1 <= len(batch) <= size, "a batch of", len(batch))
        self.require(len(set(numbers)) == len(numbers), "a job twice in a batch", numbers)
        known = self.table.undecided.get(batch.id)
        self.require(known in (None, batch[:]), "an undecided batch comes back changed")
        most = 1 if retry is None else retry.max_attempts or NEVER
        for n in numbers:
            job = self.jobs[n]
            job.handed += 1
            self.require(not job.future.cancelled() or known, n, "is cancelled and handed over")
            self.require(job.handed <= most, n, "is handed over", job.handed, "times")

    def hear(self, batch: Batch[Payload], answer: Iterable[Any]) -> None:
        """Remember the processor's word on each job, as long as it counts."""
        for payload, value in zip(batch, answer, strict=True):
            job = self.jobs[payload.n]
            if not job.future.done():
                job.said = code_of(value) if isinstance(value, BaseException) else None
        self.tell("  answers", [self.jobs[payload.n].said for payload in batch])

    def take(self, batch: list[Accepted], collected: Collected) -> None:
        """Without linger the most urgent and oldest go first."""
        fresh = [job.rank for job in batch if not job.taken]
        for job in batch:
            job.taken = True
        self.tell("collect", collected.trigger, [job.n for job in batch])
        if self.options["linger"] or not fresh:
            return
        self.require(fresh == sorted(fresh), "a batch out of order", fresh)
        now = self.clock.now
        for job in self.jobs.values():
            waits = job.rank < fresh[-1] and job.deadline > now and not job.taken
            self.require(not waits or job.future.status is not PENDING, job.n, "waits for less urgent", fresh)

    def check_rest(self) -> None:
        """Everybody has done what there is to do at this instant."""
        core, now = self.core, self.clock.now
        sleepers = [thread for thread in self.threads if thread.kind == "worker" and thread.state is State.ASLEEP]
        late = [job.sequence for job in core.outstanding.values() if job.deadline <= now]
        self.require(not late, "P5: past their deadline:", late)
        self.require(not core.outstanding or now < self.abandon_at, "P6: past the shutdown's:", *core.outstanding)
        if not sleepers:
            return
        due = [due for due, _, _ in heapq.nsmallest(1, core.intake.heap) if due <= now]
        self.require(not due, "a retry is due, and a worker sleeps")
        held = core.returning.jobs and all(now < thread.until <= core.returning.until for thread in sleepers)
        for sequence, job in core.outstanding.items():
            known = self.jobs[job.payload.n]
            ripe = (known.lingers_until <= now and not held) or known.n <= self.flushed or self.closed
            asleep = ripe and known.future.status is PENDING
            self.require(not asleep, "P8: job", known.n, "with the number", sequence, "waits, and a worker sleeps")

    def judge(self) -> Verdict:
        jobs = self.jobs.values()
        outcomes = {job.n: outcome_of(job.future, id_and_key) for job in jobs}
        excuses = EXPIRED | {NotOpened.__name__}
        verdict = judge({job.n: job.said for job in jobs}, self.table.rows, outcomes, excuses)
        self.require(not verdict.violations(), verdict.violations())
        for job in jobs:
            self.require(job.called == 1, "the callback of", job.n, "ran", job.called, "times")
            self.require(not self.listening or self.heard[job.n] == 1, "ends of", job.n, "told:", self.heard[job.n])
        for n in verdict.unknown:
            self.require(self.jobs[n].taken, n, "is unknown, and no worker ever had it")
        self.check_counts(verdict)
        return verdict

    def check_counts(self, verdict: Verdict) -> None:
        stats = self.batcher.stats()
        status = Counter(job.future.status for job in self.jobs.values())
        counted = (stats.completed, stats.failed, stats.cancelled, stats.unknown)
        told = tuple(status[kind] for kind in list(JobStatus)[2:])
        self.require(counted == told, "the counters say", counted, "and the futures", told)
        self.require(stats.submitted == len(self.jobs) and not stats.outstanding, stats)
        self.require(stats.rejected == self.rejected, "rejected", stats.rejected, "and it was", self.rejected)
        # After the shutdown nobody is left to close in the place of one that dies.
        expected = (0, 1) if self.killed_late else (bool(self.table.opened),)
        self.require(self.table.closed in expected, "closed", self.table.closed, "times")


_STEPS: dict[tuple[str, State], Callable[[Simulation, Thread], None]] = {
    ("worker", State.STARTING): Simulation.claim,
    ("worker", State.ASLEEP): Simulation.wake,
    ("worker", State.AWAKE): Simulation.collect,
    ("worker", State.HOLDING): Simulation.process,
    ("worker", State.ANSWERED): Simulation.settle,
    ("supervisor", State.STARTING): Simulation.claim,
    ("supervisor", State.ASLEEP): Simulation.wake,
    ("supervisor", State.AWAKE): Simulation.look,
}


@contextlib.contextmanager
def virtual_time() -> Iterator[None]:
    """Without the one thing that depends on the machine, and without the log of what is planted here."""
    before, supervisor.thread_time = supervisor.thread_time, lambda: 0.0  # type: ignore[attr-defined]
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        supervisor.thread_time = before  # type: ignore[attr-defined]


def simulate(seed: int, steps: int = 200, story: list[str] | None = None) -> tuple[Verdict, int]:
    """The verdict of one seed and its number of faults; a violation names the seed."""
    simulation = Simulation(seed, steps, story)
    try:
        verdict = simulation.run()
    except Exception as error:
        raise Violation(f"--level simulator --seed {seed}: {error}") from error
    return verdict, simulation.faults
