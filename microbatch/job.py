"""A job's record inside the library, the future its caller holds, and the status both agree on."""

from __future__ import annotations

import enum
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from itertools import chain
from typing import Any, Protocol, TypeVar

from .foreign import is_unknown, type_name
from .interpreter import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
    Bell,
    FutureCondition,
    Waiters,
    free_in_child,
    future_is_known,
)
from .logs import Contained

R = TypeVar("R")

_log = Contained("concurrent.futures")


class JobStatus(str, enum.Enum):
    """What a job's future says, in one word."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


# Bound to names of their own: reading a member of an Enum runs Python code on some interpreters.
COMPLETED, FAILED, UNKNOWN = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.UNKNOWN

# Where an outstanding job is; moved under the batcher's lock only.
QUEUED = 0  # in the queue, or in the batch that is being collected
TAKEN = 1  # a worker has it, the processor has not seen it in this attempt
HANDED_OVER = 2  # the processor has it
WAITING = 3  # in the heap of due times

Verdict = tuple[JobStatus, Any, "BaseException | None"]


class Job:
    """One accepted payload. Orders as (-priority, sequence), never by payload."""

    __slots__ = (
        "attempts",
        "deadline",
        "due",
        "error",
        "future",
        "payload",
        "place",
        "priority",
        "sequence",
        "submitted",
        "undecided",
        "verdict",
    )

    def __init__(self, payload: Any, future: JobFuture[Any], priority: int, submitted: float, deadline: float) -> None:
        self.payload = payload
        self.future = future
        self.priority = priority
        self.submitted = submitted
        self.deadline = deadline
        self.sequence = 0
        self.place = QUEUED
        self.attempts = 0
        self.due = 0.0
        self.error: BaseException | None = None
        self.undecided: object | None = None
        # Written once, under the lock, by whoever ends the job first: this is the whole arbitration.
        self.verdict: Verdict | None = None

    def __lt__(self, other: Job) -> bool:
        return (-self.priority, self.sequence) < (-other.priority, other.sequence)


class Owner(Protocol):
    """What a future asks of the batcher it belongs to."""

    def cancel(self, future: JobFuture[Any], sequence: int) -> bool:
        """Cancel the job if it is still queued."""

    def remember(self, future: JobFuture[Any], sequence: int) -> None:
        """Let `status(job_id)` find the future."""

    def check_process(self) -> None:
        """Notice a fork."""

    def before_wait(self, timeout: float | None) -> None:
        """Notice a fork; refuse a wait that would wait for itself."""


_OVER = (FINISHED, CANCELLED, CANCELLED_AND_NOTIFIED)
_CONCLUDED = (FINISHED, CANCELLED_AND_NOTIFIED)

# Python 3.11 builds an object's dict when it is first asked for, and a collection in the middle of that may let another
# thread store an attribute, which is then lost or crashes the interpreter. So it is built while nobody else has it.
_DICT_FIRST = sys.version_info[:2] == (3, 11)

_CANCELLED_STATUS = JobStatus.CANCELLED

# Guards the birth of every future's condition, and the end of every future that has none. Never taken while the
# batcher's lock is held: a finaliser that runs under it may submit.
_births = threading.RLock()
_births_of = os.getpid()


class _LateCondition:
    """Builds `_condition` when somebody first waits; found in the instance from then on."""

    def __get__(self, future: JobFuture[Any] | None, owner: type | None = None) -> Any:
        if future is None:
            return self
        condition: Any = FutureCondition()
        waiters, state = future._new_waiters(), future.__dict__
        # Who notifies the condition wakes those in `result` too.
        condition._waiters = state.setdefault("_bell", Bell()).sleepers
        with _births:
            if future._waiters is None:
                state["_condition"] = condition
                state["_waiters"] = waiters
        return state["_condition"]


class JobFuture(Future[R]):
    """A `concurrent.futures.Future` with a `job_id` and a `status`.

    Everything that works with a `Future` works with it: `wait`, `as_completed`, `asyncio.wrap_future`,
    callbacks, `cancel()`. Safe to use from any thread. Callbacks run on the batcher's threads (or at once, where the
    future is done already): a slow one delays the next batch.
    """

    # What every future has lies in slots, and a garbage collection finds no dict to walk through. The defaults of the
    # rest stand on the class.
    __slots__ = ("_exception", "_owner", "_result", "_sequence", "_state")

    _condition = _LateCondition()
    _waiters: Any = None  # until the condition is built
    _done_callbacks: Any = None
    _untold: list[Any] | None = None
    _being_told: Any = None
    _bell: Bell | None = None  # until somebody waits in `result` or `exception`
    _job_id: str | None = None
    _origin: Any = None  # where the job was submitted, for tracing

    def __init__(self, owner: Owner | None = None) -> None:
        if _LATE:
            self._state = PENDING
            self._result = None
            self._exception = None
        else:
            super().__init__()
        if _DICT_FIRST:
            self.__dict__  # noqa: B018
        self._owner = owner
        self._sequence = 0

    def __reduce__(self) -> Any:
        raise TypeError(
            "a JobFuture cannot be pickled or copied: it is resolved in the process that submitted the job;"
            " send its result, or submit the job in the process that uses it"
        )

    @property
    def job_id(self) -> str:
        """The id given to `submit`, else an unguessable one that is made when first read."""
        if self._job_id is None:
            self.__dict__.setdefault("_job_id", os.urandom(16).hex())
            if self._owner is not None:
                self._owner.remember(self, self._sequence)
        assert self._job_id is not None
        return self._job_id

    @property
    def status(self) -> JobStatus:
        """The future's state in the library's words; a job that waits for a retry is still processing."""
        if not self.done() and self._owner is not None:
            self._owner.check_process()
        if not self.done():
            return JobStatus.PROCESSING if self.running() else JobStatus.PENDING
        if self.cancelled():
            return JobStatus.CANCELLED
        return status_of(self.exception(0))

    def cancel(self) -> bool:
        """Take the job back if no worker has it yet; True means that it is never handed to the processor."""
        if self._owner is None:
            try:
                return super().cancel()
            finally:
                self._ring()
        if self.done():
            return self.cancelled()
        return self._owner.cancel(self, self._sequence) or self.cancelled()

    # What follows, up to the marker, replaces methods of `Future` that would build the condition. Where the guard
    # does not know the interpreter's `Future` they are removed again and the inherited ones remain.

    def cancelled(self) -> bool:
        """Whether the job was cancelled."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def running(self) -> bool:
        """Whether a worker has the job, or it waits for a retry."""
        return self._state == RUNNING

    def done(self) -> bool:
        """Whether the job has its outcome."""
        return self._state in _OVER

    def result(self, timeout: float | None = None) -> R:
        """Wait for the outcome and return it, or raise it.

        The wait is bounded by the job's `delivery_timeout`. A *timeout* here, in seconds, gives up the wait
        and not the job: it goes on. Use `execute(job, delivery_timeout=…)` to bound the job itself.

        Raises:
            concurrent.futures.TimeoutError: *timeout* passed; the job goes on.
            concurrent.futures.CancelledError: the job was cancelled.
            RuntimeError: without *timeout* on a thread of the batcher, which would wait for itself; or in a signal
                handler or finaliser that interrupted the batcher's own code on this thread.
            Exception: whatever failed the job.
        """
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                # The traceback holds this frame; the frame must not hold the exception.
                del error, self
        return self._result  # type: ignore[return-value]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as `result` does and return the error, None if there is none."""
        if self._state not in _OVER and not self._wait(timeout):
            raise FutureTimeoutError()
        if self._state != FINISHED:
            raise CancelledError()
        return self._exception

    def _wait(self, timeout: float | None) -> bool:
        if self._owner is not None:
            self._owner.before_wait(timeout)
        # Hung up first, looked at second: whoever ends the future later finds it.
        bell = self.__dict__.setdefault("_bell", Bell())
        return self._state in _OVER or bell.wait(timeout) or self._state in _OVER

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        """Have *fn* called with the future when it is done, once; its exceptions are logged.

        Runs on a thread of the batcher; at once on this thread if the future is done already.
        """
        # Listed first, looked at second: whoever takes the callback out runs it, so it runs exactly once
        # without a lock.
        self.__dict__.setdefault("_done_callbacks", {})[object()] = fn
        if self._state in _OVER:
            self._run_callbacks()

    def set_result(self, result: R) -> None:
        """The batcher's to call. Who calls it on the future of an outstanding job has this one say *result* for good;
        the job goes on, and what becomes of it is dropped and counted.
        """
        self._set(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """See `set_result`."""
        self._set(None, exception)

    def _set(self, result: R | None, exception: BaseException | None) -> None:
        if self._state in _OVER or not self._conclude(FINISHED, result, exception, over=_OVER):
            raise InvalidStateError(f"{self._state}: {self!r}")
        self._run_callbacks()

    def __repr__(self) -> str:
        state, answer = self._state, ""
        if state == FINISHED and self._exception is not None:
            answer = f" raised {type_name(self._exception)}"
        elif state == FINISHED:
            answer = f" returned {type_name(self._result)}"
        return f"<{type(self).__name__} at {id(self):#x} state={_STATE_WORDS[state]}{answer}>"

    def _run_callbacks(self) -> None:
        callbacks = self._done_callbacks
        interrupt = None
        while callbacks:
            for key in list(callbacks):
                try:
                    _take_and_call(callbacks, key, self)
                except KeyboardInterrupt as exc:
                    # On a caller's thread this may be a real Ctrl-C; the other callbacks get their turn first.
                    interrupt = exc
                except BaseException:
                    _log.exception("exception calling callback for %r", self)
        if interrupt is not None:
            raise interrupt

    _invoke_callbacks = _run_callbacks

    def _new_waiters(self) -> Waiters:
        return Waiters(self._owner.before_wait if self._owner is not None else None)

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.set()

    # The library's own side. The first two are called under the batcher's lock, and nothing can happen between their
    # look and their store: the future's holder may have ended it.

    def _put_back(self) -> None:
        if self._state is RUNNING:
            self._state = PENDING

    def _mark_cancelled(self) -> None:
        if self._state not in _OVER:
            self._state = CANCELLED

    def _says(self, verdict: Verdict) -> bool:
        """Whether a future that is done got *verdict*, and not something else from its holder."""
        return self._exception is verdict[2] and self._result is verdict[1]

    def _conclude(
        self,
        state: str,
        result: Any,
        exception: BaseException | None,
        blocking: bool = True,
        over: tuple[str, ...] = _CONCLUDED,
    ) -> bool | None:
        """Move to the final *state* and wake who waits; False if it is final already (one of *over*), None if not
        *blocking* and somebody is inside `concurrent.futures.wait` with this future. Never called under the batcher's
        lock. Idempotent: after an interruption, calling it again wakes whoever was not woken.
        """
        with _births:
            late = self._waiters is None
            fresh = self._state not in over
            if late and fresh:
                self._result = result
                self._exception = exception
                self._state = state
        if late:
            self._ring()
            return fresh
        condition = self._condition
        if not condition.acquire(blocking):
            return None
        try:
            waiters = list(self._waiters)
            fresh = self._state not in over
            if fresh:
                # Only who waited before this moment is told; later comers see the state.
                self._untold = waiters
                self._result = result
                self._exception = exception
                self._state = state
        finally:
            condition.release()
        self._ring()
        self._tell()
        return fresh

    def _tell(self) -> None:
        untold = self._untold
        while untold:
            waiter = untold[-1]
            if self._being_told is not waiter:
                self._being_told = waiter
                self._tell_one(waiter)
            elif waiter in self._waiters:
                # An interruption came in the middle of it, and who waits has not been served. Too early is better
                # than never.
                if self not in waiter.finished_futures:
                    self._tell_one(waiter)
                waiter.event.set()
            untold.pop()
        self._being_told = None

    def _tell_one(self, waiter: Any) -> None:
        if self._state == CANCELLED_AND_NOTIFIED:
            waiter.add_cancelled(self)
        elif self._exception is not None:
            waiter.add_exception(self)
        else:
            waiter.add_result(self)

    def _orphan(self, error: BaseException) -> None:
        """In a forked child: end an inherited future. Its locks may be held by threads that do not exist here.

        This thread may be inside `wait` with it, where a signal handler has forked: it finds the same condition and the
        same list there, and is woken.
        """
        state = self.__dict__
        waiters = state.setdefault("_waiters", self._new_waiters())
        state.update(_condition=free_in_child(state.get("_condition")), _done_callbacks={})
        self._exception = error
        self._state = FINISHED
        self._ring()
        for waiter in waiters[:]:
            # Whoever is in there leaves the old one.
            waiter.lock = threading.Lock()
            if self not in waiter.finished_futures:
                waiter.finished_futures.append(self)
            waiter.event.set()


def _start(jobs: list[Job]) -> None:
    """Under the batcher's lock: the futures of *jobs* are running."""
    for job in jobs:
        future = job.future
        # Uninterrupted: its holder may have ended it.
        if future._state is PENDING:
            future._state = RUNNING


def _complete(jobs: list[Job]) -> list[Job]:
    """Conclude the futures of *jobs* that have a verdict, all at once where nobody waits; return the jobs that still
    need `_conclude`, or whose callbacks are to be run.
    """
    with _births:
        # The loop in a function of its own: see the rules in `core`.
        return _complete_unwaited(jobs)


def _complete_unwaited(jobs: list[Job]) -> list[Job]:
    left = []
    for job in jobs:
        future, verdict = job.future, job.verdict
        if verdict is None:
            continue
        if future._waiters is not None or verdict[0] is _CANCELLED_STATUS:
            left.append(job)
        else:
            if future._state not in _CONCLUDED:
                future._result = verdict[1]
                future._exception = verdict[2]
                future._state = FINISHED
            elif not future._says(verdict):
                left.append(job)
                continue
            # Looked at after the state is there: who comes later sees the state.
            if future._bell is not None or future._done_callbacks is not None:
                left.append(job)
    return left


start: Callable[[list[Job]], None] = _start
complete: Callable[[list[Job]], list[Job]] = _complete


def _start_one_by_one(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.future.running() and not job.future.done():
            job.future.set_running_or_notify_cancel()


def _complete_one_by_one(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.verdict is not None]


def births() -> Any:
    """The lock that every future's end needs."""
    return _births


def renew_lock() -> None:
    """In a forked child, once: another thread may have held it."""
    global _births, _births_of
    if _births_of != os.getpid():
        _births = usable(_births)
        _births_of = os.getpid()


def usable(lock: Any) -> Any:
    """In a forked child: *lock*, or a new one if it is held by a thread that does not exist here."""
    # The same one as long as that is possible: this thread may have it, or be about to enter it.
    if lock.acquire(False):
        lock.release()
        return lock
    return threading.RLock()


def _take_and_call(callbacks: dict[object, Any], key: object, future: JobFuture[Any]) -> None:
    """Call one of *callbacks* with *future*, unless another thread has taken it."""
    called: list[object] = []
    # Inside one call of C: an exception from outside cannot come between the taking and the call, where the
    # callback would be lost.
    called.extend(chain.from_iterable(map(map, map(callbacks.pop, (key,), (_nothing,)), ((future,),))))
    if not called:
        # `map` takes a StopIteration for its own end.
        raise RuntimeError("the callback raised StopIteration")


def _nothing(future: JobFuture[Any]) -> None:
    """In the place of a callback that somebody else runs."""


_STATE_WORDS = {
    PENDING: "pending",
    RUNNING: "running",
    CANCELLED: "cancelled",
    CANCELLED_AND_NOTIFIED: "cancelled",
    FINISHED: "finished",
}


def status_of(error: BaseException | None) -> JobStatus:
    """The status of a finished job that carries *error*."""
    if error is None:
        return COMPLETED
    return UNKNOWN if is_unknown(error) else FAILED


class _PlainFuture:
    """The library's own side of a `JobFuture` over a `Future` whose insides are not known: public methods only."""

    def _put_back(self: Any) -> None:
        # A public method that leads back from running does not exist: the job is queued, its future stays running.
        pass

    def _mark_cancelled(self: Any) -> None:
        # `_conclude` does it, outside the batcher's lock.
        pass

    def _conclude(self: Any, state: str, result: Any, exception: BaseException | None, blocking: bool = True) -> bool:
        if state == CANCELLED_AND_NOTIFIED:
            if "_notified" in self.__dict__:
                return False  # the second hand-shake would be an error
            if Future.cancel(self):
                self._notified = True
                self.set_running_or_notify_cancel()
                return True
            # It runs, by its holder's word: no public method cancels it.
            exception = CancelledError()
        if self.done():
            return False
        try:
            if exception is None:
                self.set_result(result)
            else:
                self.set_exception(exception)
        except InvalidStateError:
            return False  # ended by its holder a moment ago
        return True

    def _says(self: Any, verdict: Verdict) -> bool:
        if self.cancelled() or verdict[0] is _CANCELLED_STATUS:
            return bool(self.cancelled() and verdict[0] is _CANCELLED_STATUS)
        return self.exception(0) is verdict[2] and (verdict[2] is not None or self.result(0) is verdict[1])

    def _run_callbacks(self: Any) -> None:
        # The inherited methods have done it.
        pass

    def _orphan(self: Any, error: BaseException) -> None:
        Future.__init__(self)
        self.set_exception(error)


_KNOWS_FUTURE = (
    *(
        "_condition",
        "_state",
        "_result",
        "_exception",
        "_waiters",
        "_done_callbacks",
        "_untold",
        "_set",
        "_tell",
        "_tell_one",
        "_being_told",
        "_wait",
        "_invoke_callbacks",
        "__repr__",
    ),
    *("cancelled", "running", "done", "result", "exception", "set_result", "set_exception", "add_done_callback"),
)


def use_plain_future() -> None:
    """Take back everything in `JobFuture` that knows the insides of `Future`."""
    global start, complete, _LATE
    _LATE = False
    start = _start_one_by_one
    complete = _complete_one_by_one
    for name in _KNOWS_FUTURE:
        delattr(JobFuture, name)
    for name in ("_put_back", "_mark_cancelled", "_says", "_conclude", "_run_callbacks", "_orphan"):
        setattr(JobFuture, name, vars(_PlainFuture)[name])


_LATE = future_is_known()
if not _LATE:
    use_plain_future()
