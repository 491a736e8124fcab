"""The promises against an independent model: hypothesis drives a batcher through everything at once.

`InlineModel` drives an `InlineBatcher` on a clock that stands still: one thread, every step exact. `ThreadedModel`
drives the real thing and checks what holds whenever the threads run.

The model never looks at how the library decides. It keeps three ledgers of its own: what was submitted, what the
processor saw and wrote into its table, what callbacks and listeners heard. The promises are relations between them.

`MICROBATCH_MODEL_EXAMPLES=20000` for a long night; `MICROBATCH_MODEL_SHRINK=no` where it is enough that one fails.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from microbatch import (
    BatchCompleted,
    BatcherClosed,
    BatcherShutDown,
    BatchFailed,
    BatchStarted,
    DeliveryTimeout,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobNotFound,
    JobRetrying,
    JobStatus,
    JobSubmitted,
    MicroBatcher,
    OutcomeUnknown,
    ProcessorContractError,
    QueueFull,
    RetryPolicy,
    WorkerDied,
)
from microbatch.testing import InlineBatcher, ManualClock

EXAMPLES = int(os.environ.get("MICROBATCH_MODEL_EXAMPLES", "300"))
SHRINK = os.environ.get("MICROBATCH_MODEL_SHRINK") != "no"
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[phase for phase in Phase if phase is not Phase.shrink or SHRINK],
)


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    """What listeners and callbacks raise is logged with its traceback, thousands of times here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


NEVER = float("inf")
PATIENCE = 20.0
PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED, UNKNOWN = JobStatus
ENDS = (JobCompleted, JobFailed, JobCancelled)


@dataclass(frozen=True)
class Payload:
    n: int


@dataclass(frozen=True)
class Row:
    n: int


class Bad(Exception):
    """A job's own fault."""


class Lost(Exception):
    """Left no trace and is worth another attempt."""


class Undecided(OutcomeUnknown):
    """Try me again with the same batch."""


class Hopeless(OutcomeUnknown):
    """Nobody will ever know."""


class Steady(RetryPolicy):
    """Without jitter."""

    def delay(self, attempts: int, draw: object = None) -> float:
        return float(min(self.backoff_max, self.backoff * 2 ** (attempts - 1)))


@dataclass
class Accepted:
    """What the model knows of an accepted job."""

    n: int
    future: JobFuture[Any]
    submitted: float
    deadline: float
    priority: int
    job_id: str | None
    from_inside: bool = False
    handed: int = 0  # how often the processor saw it while it had no outcome
    errors: list[BaseException] = field(default_factory=list)  # what the processor said of it
    ended: list[float] = field(default_factory=list)  # when its callback ran
    final: tuple[JobStatus, Any] | None = None

    @property
    def rank(self) -> tuple[int, int]:
        return -self.priority, self.n

    def outcome(self) -> tuple[JobStatus, Any]:
        status = self.future.status
        if status is CANCELLED:
            return status, None
        return status, self.future.exception(0) or self.future.result(0)


class Table:
    """A processor that follows a script and knows the truth: which rows are in the table.

    It is as honest as the contract asks: a plain error left no trace, and a batch that comes back with its id is
    written once.
    """

    def __init__(self, model: Ledgers) -> None:
        self.model = model
        self.script: deque[str] = deque()
        self.openings: deque[bool] = deque()
        self.rows: Counter[int] = Counter()
        self.seen: dict[str, tuple[Payload, ...]] = {}
        self.may_return: set[str] = set()  # ids of undecided batches
        self.written: set[str] = set()
        self.calls = self.opened = self.closed = self.failed_openings = self.isolated = self.late = 0
        self.lock = threading.Lock()

    def open(self) -> None:
        self.opened += 1
        if self.openings and self.openings.popleft():
            self.failed_openings += 1
            raise Lost("cannot be opened")

    def close(self) -> None:
        self.closed += 1

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, (Lost, Undecided))

    def process(self, batch: Any) -> Any:
        with self.lock:
            self.calls += 1
            word = self.script.popleft() if self.script else "work"
            try:
                if batch.id in self.seen:
                    assert batch.id in self.may_return, "only an undecided batch comes back with its id"
                    assert self.seen[batch.id] == batch[:], "an undecided batch comes back unchanged"
                self.seen[batch.id] = batch[:]
                self.model.handed_over(batch)
            except AssertionError as violation:
                # Raised here it would be just another failure of a processor.
                self.model.violations.append(violation)
            if batch.id in self.written and word not in MAY_FOLLOW_A_COMMIT:
                word = "work"
        self.model.say(f"  the processor is to {word}: {batch!r} {[payload.n for payload in batch]}")
        try:
            answer = SCRIPT[word](self, batch)
        except BaseException as error:
            for payload in batch:
                self.model.jobs[payload.n].errors.append(error)
            raise
        finally:
            self.late += sum(self.model.jobs[payload.n].future.done() for payload in batch)
        return answer

    def write(self, batch: Any, payloads: Any = None) -> list[Row]:
        with self.lock:
            if batch.id not in self.written:
                self.rows.update(payload.n for payload in (batch if payloads is None else payloads))
            self.written.add(batch.id)
        return [Row(payload.n) for payload in batch]


def work(table: Table, batch: Any) -> Any:
    return table.write(batch)


def work_silently(table: Table, batch: Any) -> Any:
    table.write(batch)


def work_late(table: Table, batch: Any) -> Any:
    table.model.time_passes(batch)
    return table.write(batch)


def lose_late(table: Table, batch: Any) -> Any:
    table.model.time_passes(batch)
    raise Lost("late")


def be_undecided_late(table: Table, batch: Any) -> Any:
    table.model.time_passes(batch)
    return be_undecided_but_written(table, batch)


def work_and_meddle(table: Table, batch: Any) -> Any:
    table.model.meddle()
    return table.write(batch)


def raising(error: type[BaseException]) -> Callable[[Table, Any], Any]:
    def fail(table: Table, batch: Any) -> Any:
        raise error(batch.id)

    return fail


def be_undecided(table: Table, batch: Any) -> Any:
    table.may_return.add(batch.id)
    raise Undecided("lost before or after COMMIT")


def be_undecided_but_written(table: Table, batch: Any) -> Any:
    table.write(batch)
    return be_undecided(table, batch)


def be_hopeless(table: Table, batch: Any) -> Any:
    table.write(batch, [payload for payload in batch if payload.n % 2])
    raise Hopeless("lost for good")


def answer_too_little(table: Table, batch: Any) -> Any:
    return table.write(batch)[1:]


def answer_too_much(table: Table, batch: Any) -> Any:
    return [*table.write(batch), Row(-1)]


def answer_in_a_generator(table: Table, batch: Any) -> Any:
    return iter(table.write(batch))


def isolate(table: Table, batch: Any) -> Any:
    """Quarters: a row, a job's own fault, a failure to be tried again, and one of which nobody knows."""
    kinds: list[type[Exception] | None] = [None, Bad, Lost, Hopeless]
    chosen = [kinds[(payload.n + table.calls) % 4] for payload in batch]
    answers = [Row(payload.n) if kind is None else kind(payload.n) for payload, kind in zip(batch, chosen, strict=True)]
    for payload, answer in zip(batch, answers, strict=True):
        if isinstance(answer, Exception):
            table.model.jobs[payload.n].errors.append(answer)
            table.isolated += 1
    table.write(batch, [payload for payload, kind in zip(batch, chosen, strict=True) if kind in (None, Hopeless)])
    return answers


def share_an_error(table: Table, batch: Any) -> Any:
    error = Bad("shared")
    for payload in batch:
        table.model.jobs[payload.n].errors.append(error)
        table.isolated += 1
    return [error] * len(batch)


SCRIPT: dict[str, Callable[[Table, Any], Any]] = {
    "work": work,
    "work silently": work_silently,
    "work late": work_late,
    "lose late": lose_late,
    "be undecided late": be_undecided_late,
    "work and meddle": work_and_meddle,
    "fail": raising(Bad),
    "lose": raising(Lost),
    "exit": raising(SystemExit),
    "interrupt": raising(KeyboardInterrupt),
    "stop": raising(StopIteration),
    "be undecided": be_undecided,
    "be undecided but written": be_undecided_but_written,
    "be hopeless": be_hopeless,
    "answer too little": answer_too_little,
    "answer too much": answer_too_much,
    "answer in a generator": answer_in_a_generator,
    "isolate": isolate,
    "share an error": share_an_error,
}
MAY_FOLLOW_A_COMMIT = {
    *("work", "work late", "work and meddle", "be undecided", "be undecided but written", "be undecided late"),
    *("be hopeless", "answer too little", "answer too much", "answer in a generator"),
}
RETRIES: list[RetryPolicy | None] = [
    None,
    Steady(backoff=1.0, backoff_max=8.0),
    Steady(max_attempts=2, backoff=0.5, backoff_max=8.0),
    Steady(max_attempts=3, backoff=0.0),
    Steady(max_attempts=3, backoff=1.0, retry_on=Exception),
]
MISCHIEF = ["raise", "exit", "submit", "cancel", "submit many", "shut down"]


class Ledgers:
    """What both machines share: the ledgers, and the promises as relations between them."""

    batcher: MicroBatcher[Payload, Any]
    closed: bool

    def start(self) -> None:
        self.table = Table(self)
        self.jobs: dict[int, Accepted] = {}
        self.numbers = iter(range(10**9))
        self.heard: list[Any] = []
        self.violations: list[AssertionError] = []
        self.rejected = self.lost_batches = 0
        self.closed = False
        self.book = threading.RLock()

    def now(self) -> float:
        raise NotImplementedError

    def say(self, text: str) -> None:
        """For the story of a history that fails."""

    def time_passes(self, batch: Any) -> None:
        """The processor takes its time."""

    def handed_over(self, batch: Any) -> None:
        assert len({payload.n for payload in batch}) == len(batch), "no job twice in a batch"
        with self.book:
            for payload in batch:
                job = self.jobs[payload.n]
                if batch.id not in self.table.may_return:
                    assert not job.future.cancelled(), "a cancelled job is never handed over"
                job.handed += not job.future.done()

    def accept(
        self,
        payload: Payload,
        future: JobFuture[Any],
        submitted: float,
        lifetime: float | None,
        priority: int,
        job_id: str | None,
        mischief: str | None,
    ) -> None:
        deadline = NEVER if lifetime is None else submitted + lifetime
        job = Accepted(payload.n, future, submitted, deadline, priority, job_id)
        with self.book:
            self.jobs[payload.n] = job
        if mischief is not None:
            future.add_done_callback(lambda _: self.make_mischief(mischief))
        future.add_done_callback(lambda _: job.ended.append(self.now()))

    def make_mischief(self, kind: str) -> None:
        self.say(f"  mischief: {kind}")
        if kind == "raise":
            raise Bad("a callback")
        if kind == "exit":
            raise SystemExit("a callback")
        if kind == "shut down":
            self.closed = True
            MicroBatcher.shutdown(self.batcher, wait=False)
        else:
            self.meddle(kind)

    def meddle(self, kind: str = "submit") -> None:
        """From inside a callback, a listener or the processor."""
        with self.book:
            pending = [job for job in list(self.jobs.values()) if not job.future.done()]
        if kind == "cancel":
            for job in pending[-1:]:
                job.future.cancel()
            return
        payloads = [Payload(next(self.numbers)) for _ in range(1 if kind == "submit" else 2)]
        submitted, lifetime = self.now(), self.lifetime
        with self.book:
            try:
                futures = (
                    [self.batcher.submit(payloads[0], submit_timeout=0)]
                    if len(payloads) == 1
                    else self.batcher.submit_many(payloads, submit_timeout=0)
                )
            except QueueFull:
                self.rejected += len(payloads)
                return
            except ValueError:
                assert len(payloads) > self.options["max_outstanding"]
                self.rejected += len(payloads)
                return
            except BatcherClosed:
                assert self.closed
                return
            for payload, future in zip(payloads, futures, strict=True):
                self.accept(payload, future, submitted, lifetime, 0, None, None)
                self.jobs[payload.n].from_inside = True

    lifetime: float | None = 20.0

    # The promises.

    def check_one_outcome(self) -> None:
        """P1, P4: the outcome of a job that has one never changes, and is true."""
        for violation in self.violations:
            raise violation
        with self.book:
            jobs = list(self.jobs.values())
        for job in jobs:
            told = bool(job.ended)  # before the question, for the outcome may come in between
            if not job.future.done():
                assert not told
                continue
            outcome = job.outcome()
            if job.final is None:
                job.final = outcome
                self.check_truth(job, *outcome)
            assert job.final[0] is outcome[0]
            assert job.final[1] is outcome[1]

    def check_truth(self, job: Accepted, status: JobStatus, answer: Any) -> None:
        rows = self.table.rows[job.n]
        if status is COMPLETED:
            assert rows == 1, "completed means committed exactly once"
            assert answer in (None, Row(job.n)), "the job's own row"
        elif status is UNKNOWN:
            assert rows <= 1, "never twice"
        else:
            assert rows == 0, "no trace"
        if status is CANCELLED:
            assert job.handed == 0
        if status is FAILED and not isinstance(answer, (DeliveryTimeout, BatcherClosed)):
            said = {(type(error), error.args) for error in job.errors[-1:]}
            if self.table.failed_openings:
                said.add((Lost, ("cannot be opened",)))
            if any(kind is StopIteration for kind, _ in said):
                said.add((RuntimeError, ("the processor raised StopIteration",)))
            assert (type(answer), answer.args) in said, "the job's own error"
        if isinstance(answer, Lost):
            retry = self.batcher._core.options.retry
            assert retry is None or retry.max_attempts is not None, "what can be retried is retried"
        if isinstance(answer, DeliveryTimeout):
            assert answer.__cause__ is None or not isinstance(answer.__cause__, OutcomeUnknown)

    def check_rows_to_the_end(self) -> None:
        """P4 also of what came after the outcome."""
        for job in self.jobs.values():
            assert job.future.done(), "no future hangs"
            assert len(job.ended) == 1, "one outcome, one call of each callback"
            assert job.final is not None
            self.check_truth(job, *job.final)
            if job.final[0] is UNKNOWN and not isinstance(job.final[1], WorkerDied):
                held = self.table.seen.get(job.final[1].batch_id, ())
                assert Payload(job.n) in held, "unknown only where the processor had it"
        errors = [id(job.final[1]) for job in self.jobs.values() if job.final and job.final[0] in (FAILED, UNKNOWN)]
        assert len(set(errors)) == len(errors), "no exception instance is shared between futures"

    def check_conservation(self, *, settled: bool = False) -> None:
        stats = self.batcher.stats()
        ended = stats.completed + stats.failed + stats.cancelled + stats.unknown
        assert stats.submitted == ended + stats.outstanding
        assert stats.queued <= stats.outstanding
        assert sum(stats.triggers.values()) == stats.batches
        if settled:
            counts = Counter(job.future.status for job in self.jobs.values())
            assert stats.submitted == len(self.jobs)
            assert (stats.completed, stats.failed) == (counts[COMPLETED], counts[FAILED])
            assert (stats.cancelled, stats.unknown) == (counts[CANCELLED], counts[UNKNOWN])
            assert stats.rejected == self.rejected == sum(stats.rejections.values()) - stats.rejections["closed"]
            assert stats.batches == self.table.calls + self.table.failed_openings + self.lost_batches
            assert stats.isolated == self.table.isolated

    def check_events(self) -> None:
        """Each job is told once as submitted and once as ended; the last event is the last."""
        submitted = Counter(event.job.n for event in self.heard if isinstance(event, JobSubmitted))
        ended = {event.job.n: event for event in self.heard if isinstance(event, ENDS)}
        assert submitted == Counter(self.jobs.keys())
        assert sum(isinstance(event, ENDS) for event in self.heard) == len(self.jobs)
        for n, job in self.jobs.items():
            kind = {COMPLETED: JobCompleted, CANCELLED: JobCancelled}.get(job.future.status, JobFailed)
            event = ended[n]
            assert type(event) is kind
            if isinstance(event, JobFailed):
                assert event.error is job.future.exception(0)
            if isinstance(event, JobCompleted):
                assert event.result is job.future.result(0)
        stats = self.batcher.stats()
        assert sum(isinstance(event, JobRetrying) for event in self.heard) == stats.retries
        told = sum(isinstance(event, (BatchCompleted, BatchFailed)) for event in self.heard)
        stopped = stats.late_results + self.lost_batches  # not waited for by the shutdown, or by a worker that died
        assert told <= stats.batches <= told + stopped, "every batch is told"
        assert sum(isinstance(event, BatcherShutDown) for event in self.heard) == 1
        assert isinstance([event for event in self.heard if not isinstance(event, JobSubmitted)][-1], BatcherShutDown)

    def listen(self, mischief: str | None) -> None:
        for event_type in (
            JobSubmitted,
            JobRetrying,
            BatchStarted,
            BatchCompleted,
            BatchFailed,
            BatcherShutDown,
            *ENDS,
        ):
            self.batcher.on(event_type, self.heard.append)
        if mischief is not None:
            left = iter(range(3))

            def meddle(event: Any) -> None:
                if next(left, None) is not None:
                    self.make_mischief(mischief)

            for event_type in (JobRetrying, BatchStarted, JobCompleted, JobFailed, JobCancelled):
                self.batcher.on(event_type, meddle)


class InlineModel(Ledgers, RuleBasedStateMachine):
    batcher: InlineBatcher[Payload, Any]

    @initialize(
        max_batch_size=st.sampled_from([1, 2, 3, 100]),
        max_outstanding=st.sampled_from([1, 3, 6, 10_000]),
        linger=st.sampled_from([0.0, 0.0, 2.0]),
        retry=st.sampled_from(RETRIES),
        history=st.sampled_from([10_000, 10_000, 0]),
        listening=st.booleans(),
        mischief=st.sampled_from([None, None, None, *MISCHIEF]),
    )
    def begin(self, listening: bool, mischief: str | None, **options: Any) -> None:
        self.start()
        self.options = options
        self.batcher = InlineBatcher(self.table, clock=ManualClock(), **options)
        self.batcher._held = 1
        self.listening = listening
        self.abandon_at = NEVER
        self.flushed = False
        self.by_id: dict[str, Accepted] = {}
        if listening:
            self.listen(mischief)

    def now(self) -> float:
        return self.batcher.clock.now

    def say(self, text: str) -> None:
        note(text)

    # What the model expects.

    def outstanding(self) -> list[Accepted]:
        return [job for job in self.jobs.values() if not job.future.done()]

    def shared(self, job_id: str | None) -> Accepted | None:
        """The job whose future a submit with *job_id* must give."""
        job = self.by_id.get(job_id) if job_id is not None else None
        if job is None or job.future.status in (FAILED, CANCELLED):
            return None
        return job if self.known(job) else None

    def known(self, job: Accepted) -> bool:
        if not job.future.done():
            return True
        return self.options["history"] > 0 and self.now() < job.ended[0] + 300.0

    def handed_over(self, batch: Any) -> None:
        """Order, size, trigger and deadline of a batch, as the processor sees them."""
        super().handed_over(batch)
        jobs = [self.jobs[payload.n] for payload in batch]
        living = [job for job in jobs if not job.future.done()]
        comes_back = batch.id in self.table.may_return
        now, linger = self.now(), self.options["linger"]
        assert 1 <= len(batch) <= self.options["max_batch_size"]
        assert living, "a batch of the dead is not handed over"
        assert comes_back or living == jobs
        assert all(job.future.status is PROCESSING for job in living)
        assert batch.deadline == (None if (nearest := min(job.deadline for job in living)) == NEVER else nearest)
        retry = self.options["retry"]
        allowed = 1 if retry is None else retry.max_attempts or NEVER
        assert batch.attempt <= allowed
        assert all(job.handed <= allowed for job in jobs)
        if batch.trigger == "size":
            assert len(batch) == self.options["max_batch_size"]
        elif batch.trigger == "idle":
            assert linger == 0
        elif batch.trigger == "linger":
            assert linger > 0
            assert any(now >= job.submitted + min(linger, (job.deadline - job.submitted) / 2) for job in jobs)
        elif batch.trigger == "retry":
            assert comes_back or self.table.failed_openings or all(job.handed > 1 for job in jobs)
        else:
            assert {"flush": self.flushed, "shutdown": self.closed}[batch.trigger]
        if not comes_back and not self.table.failed_openings:
            fresh = [job for job in jobs if job.handed == 1]
            assert [job.rank for job in fresh] == sorted(job.rank for job in fresh) or linger
            if fresh and not linger:
                # A listener of `BatchStarted` may have submitted when the batch was closed already.
                waiting = [job for job in self.outstanding() if job.future.status is PENDING and not job.from_inside]
                urgent = [job for job in waiting if job.deadline > now and job.rank < fresh[-1].rank]
                assert urgent == [], "the most urgent and oldest go first"

    def time_passes(self, batch: Any) -> None:
        """Past the nearest deadline of the batch, and the supervisor looks."""
        self.batcher.clock.now = max(self.now(), min(batch.deadline or 0.0, self.now() + 50.0))
        self.look()

    def look(self) -> None:
        self.batcher._supervisor.check()
        for job in self.outstanding():
            assert job.deadline > self.now(), "P5: nothing outlives its deadline"
            assert self.now() < self.abandon_at, "P6: nothing outlives the timeout of the shutdown"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        core, ident = self.batcher._core, threading.get_ident()
        self.batcher._running = True
        core.own.add(ident)
        try:
            yield
        finally:
            core.own.discard(ident)
            self.batcher._running = False
        if core.closed and not core.outstanding and core.ready:
            self.batcher._leave()

    # The rules.

    @rule(words=st.lists(st.sampled_from(sorted(SCRIPT)), min_size=1, max_size=3))
    def script(self, words: list[str]) -> None:
        self.table.script.extend(words)

    @rule(fails=st.booleans())
    def script_an_opening(self, fails: bool) -> None:
        self.table.openings.append(fails)
        if self.jobs:
            self.batcher._worker.opened = False

    @rule(
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        job_id=st.sampled_from([None, None, "a", "b"]),
        lifetime=st.sampled_from([20.0, 20.0, 1.0, 3.0, None]),
        mischief=st.sampled_from([None, None, None, *MISCHIEF]),
    )
    def submit(self, priority: int, job_id: str | None, lifetime: float | None, mischief: str | None) -> None:
        retry = self.options["retry"]
        if lifetime is None and retry is not None and retry.max_attempts is None:
            lifetime = 20.0
        shared, places = self.shared(job_id), self.options["max_outstanding"] - len(self.outstanding())
        payload, submitted = Payload(next(self.numbers)), self.now()
        try:
            future = self.batcher.submit(payload, job_id=job_id, priority=priority, delivery_timeout=lifetime)
        except BatcherClosed:
            assert self.closed
        except QueueFull:
            assert places == 0
            assert shared is None
            self.rejected += 1
        else:
            assert not self.closed
            if shared is not None:
                assert future is shared.future
                return
            assert places > 0
            self.accept(payload, future, submitted, lifetime, priority, job_id, mischief)
            if job_id is not None:
                assert future.job_id == job_id
                self.by_id[job_id] = self.jobs[payload.n]

    @rule(count=st.integers(0, 7), priority=st.sampled_from([0, 0, 2]), lifetime=st.sampled_from([20.0, 2.0]))
    def submit_many(self, count: int, priority: int, lifetime: float) -> None:
        places = self.options["max_outstanding"] - len(self.outstanding())
        payloads, submitted = [Payload(next(self.numbers)) for _ in range(count)], self.now()
        try:
            futures = self.batcher.submit_many(payloads, priority=priority, delivery_timeout=lifetime)
        except BatcherClosed:
            assert self.closed
        except QueueFull:
            assert places < count
            self.rejected += count
        except ValueError:
            assert self.options["max_outstanding"] < count
            self.rejected += count
        else:
            assert len(futures) == count <= places
            assert not self.closed or not count
            for payload, future in zip(payloads, futures, strict=True):
                self.accept(payload, future, submitted, lifetime, priority, None, None)

    @rule(
        lifetimes=st.lists(st.sampled_from([1.0, 3.0, 20.0]), min_size=2, max_size=5),
        first=st.sampled_from(sorted(SCRIPT)),
    )
    def submit_a_few_and_step(self, lifetimes: list[float], first: str) -> None:
        """Jobs of different patience in one batch, and what becomes of it."""
        for lifetime in lifetimes:
            self.submit(priority=0, job_id=None, lifetime=lifetime, mischief=None)
        self.table.script.appendleft(first)
        if self.jobs:
            self.step()

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        job = list(self.jobs.values())[-1 - pick % len(self.jobs)]
        before = job.future.status
        assert job.future.cancel() is (before in (PENDING, CANCELLED))
        assert job.future.status is (CANCELLED if before is PENDING else before)

    @precondition(lambda self: self.jobs)
    @rule()
    def step(self) -> None:
        """One look of the supervisor, one batch of the worker."""
        with self.at_work():
            self.look()
            seen = self.table.calls + self.table.failed_openings
            ready = [job for job in self.outstanding() if job.future.status is PENDING and job.deadline > self.now()]
            linger = self.options["linger"]
            until = min(
                (job.submitted + min(linger, (job.deadline - job.submitted) / 2) for job in ready), default=NEVER
            )
            self.batcher._worker.turn(wait=False)
            if until <= self.now():
                assert self.table.calls + self.table.failed_openings > seen, "P8: nothing waits longer than it lingers"

    @precondition(lambda self: self.jobs)
    @rule(holding=st.booleans())
    def worker_dies(self, holding: bool) -> None:
        """Between two batches, or with the next one in its hands; the supervisor looks."""
        batches = self.batcher.stats().batches
        with self.at_work():
            worker: Any = self.batcher._worker
            if holding:
                worker._collect(wait=False)
            worker.gone = True
            self.look()
        self.lost_batches += self.batcher.stats().batches - batches

    @rule()
    def run_to_the_end(self) -> None:
        self.batcher.run()
        assert self.outstanding() == []

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 19.0, 20.0, 400.0]))
    def advance(self, seconds: float) -> None:
        self.batcher.clock.advance(seconds)

    @rule()
    def flush(self) -> None:
        self.flushed = True
        assert self.batcher.flush() is True
        assert self.outstanding() == []

    @precondition(lambda self: len(self.jobs) > 4)
    @rule(timeout=st.sampled_from([None, None, 0.0, 0.5, 5.0]), cancel_futures=st.booleans(), at_once=st.booleans())
    def shutdown(self, timeout: float | None, cancel_futures: bool, at_once: bool) -> None:
        before = {job.n: job.future.status for job in self.outstanding()}
        handed = {n: self.jobs[n].handed for n in before}
        self.closed = True
        if timeout is not None:
            self.abandon_at = min(self.abandon_at, self.now() + timeout)
        begin = self.batcher.shutdown if at_once else lambda **how: MicroBatcher.shutdown(self.batcher, False, **how)
        report = begin(timeout=timeout, cancel_futures=cancel_futures)
        if self.jobs:
            with self.at_work():
                self.look()  # the supervisor was rung
        if cancel_futures:
            for n, status in before.items():
                job = self.jobs[n]
                assert job.handed == handed[n], "nothing is begun any more"
                if status is PENDING:
                    assert job.future.status is CANCELLED
        if at_once:
            self.check_report(report)

    def check_report(self, report: Any) -> None:
        assert report.finished
        assert self.outstanding() == []
        counts = Counter(job.future.status for job in self.jobs.values())
        assert (report.completed, report.failed) == (counts[COMPLETED], counts[FAILED])
        assert (report.cancelled, report.unknown) == (counts[CANCELLED], counts[UNKNOWN])
        cut_off = {
            job.n
            for job in self.jobs.values()
            if job.future.status in (FAILED, UNKNOWN) and "shutdown timed out" in str(job.future.exception(0))
        }
        assert {payload.n for payload in report.undelivered} == cut_off
        assert len(report.undelivered) == len(cut_off)
        if self.abandon_at == NEVER:
            assert cut_off == set()

    @rule(job_id=st.sampled_from(["a", "b", "never used"]))
    def ask(self, job_id: str) -> None:
        job = self.by_id.get(job_id)
        if job is not None and self.known(job):
            assert self.batcher.future(job_id) is job.future
            assert self.batcher.status(job_id) is job.future.status
        else:
            with pytest.raises(JobNotFound):
                self.batcher.status(job_id)

    # What always holds.

    @invariant()
    def one_outcome(self) -> None:
        self.check_one_outcome()

    @invariant()
    def statuses_follow_the_processor(self) -> None:
        for job in self.outstanding():
            if not self.table.failed_openings:
                assert job.future.status is (PROCESSING if job.handed else PENDING)

    @invariant()
    def nothing_expires_early(self) -> None:
        for job in self.jobs.values():
            if job.final is not None and isinstance(job.final[1], DeliveryTimeout):
                assert job.ended[0] >= job.deadline

    @invariant()
    def conservation(self) -> None:
        self.check_conservation(settled=not self.outstanding())
        stats, waiting = self.batcher.stats(), self.outstanding()
        assert stats.outstanding == len(waiting)
        assert stats.oldest_age == max((self.now() - job.submitted for job in waiting), default=0.0)
        if not self.table.failed_openings:
            assert stats.late_results == self.table.late

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        self.closed = True
        self.check_report(self.batcher.shutdown())
        self.check_one_outcome()
        self.check_rows_to_the_end()
        self.check_conservation(settled=True)
        assert self.table.closed == bool(self.table.opened), "closed once if it was opened"
        with pytest.raises(BatcherClosed):
            self.batcher.submit(Payload(-1))
        if self.listening:
            self.check_events()


class ThreadedModel(Ledgers, RuleBasedStateMachine):
    """The same ledgers over real threads: what cannot be predicted is only compared, every wait is bounded."""

    lifetime = 3.0

    @initialize(
        max_batch_size=st.sampled_from([1, 3, 100]),
        max_outstanding=st.sampled_from([2, 10, 10_000]),
        max_concurrent_batches=st.sampled_from([1, 1, 2]),
        linger=st.sampled_from([0.0, 0.01]),
        retry=st.sampled_from(
            [None, RetryPolicy(backoff=0.001, backoff_max=0.01), Steady(max_attempts=2, backoff=0.0)]
        ),
        mischief=st.sampled_from([None, None, *MISCHIEF]),
    )
    def begin(self, mischief: str | None, **options: Any) -> None:
        self.start()
        self.options = options
        self.batcher = MicroBatcher(self.table, delivery_timeout=self.lifetime, **options)
        self.listen(mischief)

    def now(self) -> float:
        return self.batcher._core.clock()

    def time_passes(self, batch: Any) -> None:
        threading.Event().wait(0.015)

    @rule(words=st.lists(st.sampled_from(sorted(SCRIPT)), min_size=1, max_size=3))
    def script(self, words: list[str]) -> None:
        self.table.script.extend(words)

    @rule(
        count=st.integers(1, 8),
        priority=st.sampled_from([0, 0, 1]),
        lifetime=st.sampled_from([3.0, 3.0, 0.01]),
        together=st.booleans(),
        mischief=st.sampled_from([None, None, *MISCHIEF]),
    )
    def submit(self, count: int, priority: int, lifetime: float, together: bool, mischief: str | None) -> None:
        payloads = [Payload(next(self.numbers)) for _ in range(count)]
        arguments: dict[str, Any] = {"priority": priority, "delivery_timeout": lifetime, "submit_timeout": 0.05}
        # The processor waits for the book: a job is in it before it is handed over.
        for part in [payloads] if together else [[payload] for payload in payloads]:
            with self.book:
                submitted = self.now()
                try:
                    futures = (
                        self.batcher.submit_many(part, **arguments)
                        if together
                        else [self.batcher.submit(part[0], **arguments)]
                    )
                except QueueFull:
                    self.rejected += len(part)
                    continue
                except ValueError:
                    assert len(part) > self.options["max_outstanding"]
                    self.rejected += len(part)
                    continue
                except BatcherClosed:
                    assert self.closed
                    continue
                accepted = zip(part, futures, strict=True)
                for payload, future in accepted:
                    self.accept(payload, future, submitted, lifetime, priority, None, mischief)

    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        jobs = list(self.jobs.values())
        if not jobs:
            return
        job = jobs[-1 - pick % len(jobs)]
        if job.future.cancel():
            with pytest.raises(CancelledError):
                job.future.result(0)

    @rule(timeout=st.sampled_from([0.0, 0.01, PATIENCE]))
    def flush(self, timeout: float) -> None:
        before = list(self.jobs.values())
        if self.batcher.flush(timeout):
            assert all(job.future.done() for job in before)
        else:
            assert timeout < PATIENCE, "P5: a flush ends"

    @rule(timeout=st.sampled_from([None, 0.0, 0.02]), cancel_futures=st.booleans())
    def begin_shutdown(self, timeout: float | None, cancel_futures: bool) -> None:
        self.closed = True
        self.batcher.shutdown(False, timeout=timeout, cancel_futures=cancel_futures)

    @invariant()
    def one_outcome(self) -> None:
        self.check_one_outcome()
        self.check_conservation()

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        self.closed = True
        report = self.batcher.shutdown(timeout=PATIENCE)
        assert report.finished
        futures = [job.future for job in self.jobs.values()]
        assert not wait(futures, PATIENCE).not_done, "no future hangs"
        self.wait_for_workers()
        self.check_one_outcome()
        self.check_rows_to_the_end()
        self.check_conservation(settled=True)
        self.check_events()
        assert self.table.closed == bool(self.table.opened)

    def wait_for_workers(self) -> None:
        """A shutdown does not wait for a processor whose jobs all have their outcome; the ledgers do."""
        for _ in range(4000):
            if not self.batcher._core.workers:
                return
            threading.Event().wait(0.005)
        raise AssertionError("a worker never left")


InlineModel.TestCase.settings = SETTINGS
# Real time passes in it. A history of threads seldom fails twice: hypothesis then says "flaky", and names what failed.
ThreadedModel.TestCase.settings = settings(SETTINGS, max_examples=max(1, EXAMPLES // 15), stateful_step_count=15)
TestInlineModel = InlineModel.TestCase
TestThreadedModel = ThreadedModel.TestCase


def test_the_model_knows_every_kind_of_unknown() -> None:
    assert issubclass(ProcessorContractError, OutcomeUnknown)
    assert len(SCRIPT) == 19
