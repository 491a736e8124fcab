"""What users bring: a processor, and, if they like, a queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

J_co = TypeVar("J_co", covariant=True)
J_contra = TypeVar("J_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Batch(Sequence[J_co]):
    """The jobs handed to the processor together: a read-only sequence of the submitted payloads.

    Attributes:
        id: identifies the batch in logs, events and `OutcomeUnknown`; kept when the batch is retried unchanged.
        attempt: 1 for the first try; the highest attempt of its jobs.
        trigger: why the batch closed: `size`, `idle`, `linger`, `flush`, `retry` or `shutdown`.
        deadline: the earliest `time.monotonic()` instant at which one of its jobs gives up, or None.
    """

    __slots__ = ("_attempt", "_deadline", "_id", "_jobs", "_trigger")

    def __init__(
        self,
        jobs: Sequence[J_co],
        *,
        id: str,
        attempt: int = 1,
        trigger: str = "idle",
        deadline: float | None = None,
    ) -> None:
        self._jobs = tuple(jobs)
        self._id = id
        self._attempt = attempt
        self._trigger = trigger
        self._deadline = deadline

    @property
    def id(self) -> str:
        return self._id

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def trigger(self) -> str:
        return self._trigger

    @property
    def deadline(self) -> float | None:
        return self._deadline

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[J_co]:
        return iter(self._jobs)

    @overload
    def __getitem__(self, index: int) -> J_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[J_co, ...]: ...
    def __getitem__(self, index: int | slice) -> J_co | tuple[J_co, ...]:
        return self._jobs[index]

    def __repr__(self) -> str:
        # The payloads stay out: they may be secrets, and this text reaches logs.
        return f"<Batch {self._id} of {len(self._jobs)} jobs, attempt {self._attempt}, {self._trigger}>"


@runtime_checkable
class BatchProcessor(Protocol[J_contra, R_co]):
    """Does the work for a batch. With `max_concurrent_batches > 1` it is called from several threads at once.

    The whole contract: return one result per job, in the order of the jobs. A plain function that takes the
    batch is a processor too.

    * One result may be an exception *instance*: it fails that job alone.
    * None instead of a sequence means that all jobs are done and have no result.
    * Raising means that nothing was done for any job of the batch ("no trace").
    * Raising `OutcomeUnknown` means that nobody knows; see there.
    * Any other answer (too few, too many, a generator, a dict, a string) makes every job of the batch
      unknown with a `ProcessorContractError`.

    These methods are optional and looked up once, at construction:

    * `open()` runs on each worker before its first batch. If it raises, that batch fails with its
      error and the next batch tries again.
    * `close()` runs once, on the last worker, after the last batch.
    * `is_retryable(exc) -> bool` says which failures are worth another attempt. Without it, and without
      `RetryPolicy(retry_on=…)`, nothing is retried.
    * `is_unavailable(exc) -> bool` says whether a failure that is tried again was no answer at all (a link lost, a
      server away): an outage gets one line in the log when it begins and one when it is over. Without it every such
      failure of a whole batch counts.
    * `describe(exc) -> str` is what the log may say of a failure: without values of jobs, and without secrets.
      Without it the log names the exception's type.
    * `abandon(batch)` is called on the supervisor's thread when every job of a batch has passed its deadline
      while `process` still runs. It should make `process` return (close a socket, set a flag) and must not block.
    """

    def process(self, batch: Batch[J_contra], /) -> Sequence[R_co | Exception] | None:
        """Do the jobs of *batch*; see the class for the contract."""


@runtime_checkable
class JobQueue(Protocol):
    """Holds the jobs that wait. Never blocks; called under the batcher's lock only, so it needs none of its own.

    Items are opaque and order as (-priority, sequence). Give the queue `ordered = True` if it keeps that
    order; without it `submit(priority=…)` is refused. Waiting, closing, retries and deadlines are the batcher's
    business. Nobody else may put or take.

    Optional: `get_many(n) -> list` takes up to *n* items at once.
    """

    def put_nowait(self, item: Any, /) -> None:
        """Add an item; raise `queue.Full` when there is no room."""

    def get_nowait(self) -> Any:
        """Take the next item; raise `queue.Empty` when there is none."""

    def qsize(self) -> int:
        """How many items wait."""
