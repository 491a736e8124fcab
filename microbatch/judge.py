"""From the processor's answer to one verdict per job: decisions only, outside every lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .errors import ProcessorContractError, parts_of
from .foreign import copied, is_error, is_ordinary, is_unknown, name_batch, type_name
from .job import COMPLETED, Job, Verdict, status_of
from .logs import Log
from .protocols import Batch
from .retry import RetryPolicy

_log = Log("microbatch.judge")


class Again:
    """Instead of a verdict: another attempt. *undecided*: of the whole batch, unchanged.

    Jobs with the same *batch_id* come back together and alone, as the batch of that id.
    """

    __slots__ = ("batch_id", "error", "undecided")

    def __init__(self, error: BaseException, undecided: bool = False, batch_id: str | None = None) -> None:
        self.error = error
        self.undecided = undecided
        self.batch_id = batch_id


Answer = Verdict | Again
Retried = tuple[Job, BaseException, float]


@dataclass(slots=True)
class Outcome:
    """What became of a batch: one answer per job, when it began, its error as a whole, how many failed alone, how many
    answers came too late, when the jobs ended, how many others were queued then.
    """

    answers: list[Answer]
    began: float
    error: BaseException | None = None
    alone: int = 0
    late: int = 0
    ended: float = 0.0
    backlog: int = 0
    away: bool = False  # its error was no answer at all
    back_after: float | None = None  # seconds of the outage that its answer ends
    waited: int = 0  # the jobs that were outstanding then


class Judge:
    """Knows what is worth another attempt."""

    def __init__(self, is_retryable: Callable[[BaseException], bool] | None, retry: RetryPolicy | None) -> None:
        self._is_retryable = is_retryable
        self._retry = retry

    def results(
        self, batch: Batch[Any], jobs: Sequence[Job], results: object
    ) -> tuple[list[Answer], int, BaseException | None]:
        """One answer per job; how many of them failed alone; the contract error if there is not one result per job."""
        if results is None:
            return [(COMPLETED, None, None)] * len(jobs), 0, None
        problem = None
        values: tuple[Any, ...] = ()
        try:
            if isinstance(results, (str, bytes, bytearray, memoryview)) or not isinstance(results, Sequence):
                problem = f"the processor returned {_kind(results)}"
            else:
                values = _values(results, len(jobs))
                if len(values) != len(jobs):
                    problem = f"the processor returned {_count(results, values)} results"
        except BaseException as exc:
            # A stranger's code: were it let through, a KeyboardInterrupt would look like one of this thread's own.
            problem = f"reading the processor's results raised {type_name(exc)}"
        if problem is not None:
            error = ProcessorContractError(
                f"{problem} for a batch of {len(jobs)}; return one result per job, in their order, or None",
                batch_id=batch.id,
            )
            return self.failure(batch, jobs, error), 0, error
        if not _any_error(values):
            return [(COMPLETED, value, None) for value in values], 0, None
        return (
            [
                self._single(batch, job, value) if is_error(value) else (COMPLETED, value, None)
                for job, value in zip(jobs, _unshared(values), strict=True)
            ],
            sum(map(is_error, values)),
            None,
        )

    def failure(self, batch: Batch[Any], jobs: Sequence[Job], error: BaseException) -> list[Answer]:
        """The answers when the processor raised: each job gets an error of its own."""
        name_batch(error, batch.id)
        if is_unknown(error) and self._undecided(error) and self._allows(batch.attempt):
            return [Again(error, undecided=True, batch_id=batch.id)] * len(jobs)
        again = self._decided_and_retryable(error)
        return [
            Again(own, batch_id=batch_id)
            if again and (self._allows(job.attempts) or batch_id not in (None, batch.id))
            else (status_of(own), None, own)
            for job, own, batch_id in zip(jobs, _own_errors(error), _batch_ids(error, len(jobs)), strict=False)
        ]

    def _single(self, batch: Batch[Any], job: Job, error: BaseException) -> Answer:
        name_batch(error, batch.id)
        if self._decided_and_retryable(error) and self._allows(job.attempts):
            return Again(error)
        return (status_of(error), None, error)

    def _allows(self, attempts: int) -> bool:
        return self._retry is not None and self._retry.allows(attempts)

    def _undecided(self, error: BaseException) -> bool:
        """Only the processor may say "try me again" of an unknown outcome: nobody else knows that it cannot double."""
        return self._ask(self._is_retryable, error) and not issubclass(type(error), ProcessorContractError)

    def _decided_and_retryable(self, error: BaseException) -> bool:
        if self._retry is None or is_unknown(error) or not is_ordinary(error):
            return False
        return self._ask(self._retry.matches, error) or self._ask(self._is_retryable, error)

    def _ask(self, question: Callable[[BaseException], bool] | None, error: BaseException) -> bool:
        if question is None:
            return False
        try:
            return bool(question(error))
        except BaseException:
            _log.exception("asking whether %s is retryable failed; it is not retried", type_name(error))
            return False


def _batch_ids(error: BaseException, count: int) -> list[str | None]:
    """The batch that each of *count* jobs comes back in; None where each is for itself.

    A batch that is split has another attempt in any case: without it the innocent would fail with the culprit.
    """
    batch_ids = [batch_id for batch_id, size in parts_of(error) for _ in range(size)]
    return list(batch_ids) if len(batch_ids) == count else [None] * count


def _own_errors(error: BaseException) -> Iterator[BaseException]:
    """*error*, then copies of it: an instance shared between threads grows a traceback at every raise."""
    yield error
    while True:
        yield copied(error)


# Sequences of which the interpreter alone says how long they are.
_WHOLE = (list, tuple)


def _values(results: Sequence[Any], expected: int) -> tuple[Any, ...]:
    """*results*; of a stranger's sequence, which may have no end, one more than *expected* at most."""
    return tuple(results if type(results) in _WHOLE else islice(results, expected + 1))


def _count(results: Sequence[Any], values: tuple[Any, ...]) -> str:
    return f"{'' if type(results) in _WHOLE else 'at least '}{len(values)}"


def _any_error(values: tuple[Any, ...]) -> bool:
    # By type, for `isinstance` would ask the value for its `__class__`, which a proxy may refuse; and types are told
    # apart by `is`, for a metaclass may refuse to be hashed.
    seen: type | None = None
    for value in values:
        if type(value) is not seen:
            seen = type(value)
            if issubclass(seen, BaseException):
                return True
    return False


def _unshared(values: Iterable[Any]) -> Iterator[Any]:
    """*values*, with copies where one exception stands for several jobs."""
    seen: set[int] = set()
    for value in values:
        if is_error(value):
            yield copied(value) if id(value) in seen else value
            seen.add(id(value))
        else:
            yield value


def _kind(results: object) -> str:
    name = type_name(results)
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
