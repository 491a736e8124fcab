"""What a stranger brings - exceptions, results, listeners, handlers of logs - harms its own job at most (P1, P3)."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from microbatch import (
    Batch,
    BatchFailed,
    JobCompleted,
    JobFailed,
    JobFuture,
    JobStatus,
    MicroBatcher,
    OutcomeUnknown,
    RetryPolicy,
    owed,
)
from microbatch.foreign import copied, type_name
from microbatch.worker import Worker

pytestmark = pytest.mark.timeout(60)

BOUND = 10.0


@pytest.fixture(autouse=True)
def deaths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No thread of the library dies of what a stranger brings."""
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    yield died
    assert died == []


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int = 0


class Unwritable(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("read only")


class OwnTraceback(Exception):
    def with_traceback(self, tb: object) -> Any:
        raise KeyError("with_traceback")


class NoTraceback(Exception):
    with_traceback = None  # type: ignore[assignment]


class Irreducible(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit("reduce")


class KeyReduced(Exception):
    def __reduce_ex__(self, protocol: object) -> Any:
        raise KeyboardInterrupt


class Uncopied(Exception):
    def __copy__(self) -> Any:
        raise GeneratorExit


class OwnInit(Exception):
    def __init__(self, a: object, b: object) -> None:
        super().__init__(f"{a} {b}")


class Answer(Exception):
    """Asks a dict for what it has not."""

    def __init__(self) -> None:
        super().__init__("answer")
        self.__dict__["answer"] = {}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["answer"][name]


class Closed(Exception):
    """Answers no question at all."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)


class Incomparable(Exception):
    def __eq__(self, other: object) -> bool:
        raise ValueError("eq")

    def __ne__(self, other: object) -> bool:
        raise ValueError("ne")

    def __hash__(self) -> int:
        raise ValueError("hash")

    def __bool__(self) -> bool:
        raise ValueError("bool")


class Wordless(Exception):
    def __str__(self) -> str:
        raise KeyError("str")

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __format__(self, spec: str) -> str:
        raise KeyError("format")


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        raise KeyError(name)

    def __eq__(cls, other: object) -> bool:
        raise KeyError("eq")

    def __hash__(cls) -> int:
        raise KeyError("hash")

    def __instancecheck__(cls, instance: object) -> bool:
        raise KeyError("isinstance")


def metallic() -> Exception:
    # Not in the module: what collects tests asks every class there.
    return type.__call__(Meta("Metallic", (Exception,), {}))  # type: ignore[no-any-return]


class Liar(Exception):
    @property
    def __class__(self) -> Any:
        return OutcomeUnknown

    @__class__.setter
    def __class__(self, value: object) -> None: ...


class ClassRefused(Exception):
    @property
    def __class__(self) -> Any:
        raise KeyError("class")

    @__class__.setter
    def __class__(self, value: object) -> None: ...


class NoArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise KeyError("args")


class NoCause(Exception):
    @property
    def __cause__(self) -> Any:  # type: ignore[override]
        raise SystemExit("cause")

    @property
    def __context__(self) -> Any:  # type: ignore[override]
        raise SystemExit("context")

    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise SystemExit("traceback")

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise SystemExit("dict")


def in_a_ring() -> Exception:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    first.__context__ = first.__cause__
    return first


class FrozenUnknown(OutcomeUnknown):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("read only")

    @property
    def batch_id(self) -> Any:  # type: ignore[override]
        raise KeyError("batch_id")

    def __init__(self) -> None: ...


STRANGERS: list[Callable[[], BaseException]] = [
    *(Frozen, Unwritable, OwnTraceback, NoTraceback, Irreducible, KeyReduced, Uncopied, Answer, Closed),
    *(Incomparable, Wordless, metallic, Liar, ClassRefused, NoArgs, NoCause, in_a_ring, FrozenUnknown),
    *(KeyboardInterrupt, SystemExit, GeneratorExit),
    lambda: OwnInit(1, 2),
]
IDS = [make.__name__ for make in STRANGERS]


def run_with(process: Callable[[Batch[Any]], Any], jobs: Sequence[str], **options: Any) -> list[JobFuture[Any]]:
    """The futures of *jobs* of one batch, done, and their batcher's bookkeeping looked after."""
    batcher = MicroBatcher[str, Any](process, linger=5.0, max_batch_size=len(jobs), delivery_timeout=BOUND, **options)
    told: list[Any] = []
    for event_type in (JobFailed, JobCompleted, BatchFailed):
        batcher.on(event_type, told.append)
    futures = batcher.submit_many(jobs)
    assert batcher.shutdown(timeout=BOUND).finished
    stats = batcher.stats()
    assert stats.completed + stats.failed + stats.unknown == len(jobs)
    assert (stats.outstanding, all(future.done() for future in futures)) == (0, True)
    ends = [event for event in told if type(event) is not BatchFailed]
    assert sorted(event.job for event in ends) == sorted(jobs), "one event for every end"
    assert all(repr(future) for future in futures)
    return futures


def is_raised(future: JobFuture[Any]) -> bool:
    try:
        future.result(0)
    except BaseException as error:
        return error is future.exception(0)
    return False


@pytest.mark.parametrize("make", STRANGERS, ids=IDS)
def test_P3_a_strangers_exception_that_is_returned_fails_its_own_jobs_alone(make: Callable[[], BaseException]) -> None:
    shared = make()

    def process(batch: Batch[str]) -> list[Any]:
        return [job if job == "good" else shared for job in batch]

    bad, good, bad_too = run_with(process, ["bad", "good", "bad too"])

    assert good.result(0) == "good"
    for future in (bad, bad_too):
        error = future.exception(0)
        assert type(error) is type(shared)
        assert future.status is (JobStatus.UNKNOWN if type(error) is FrozenUnknown else JobStatus.FAILED)
        assert is_raised(future)


@pytest.mark.parametrize("make", STRANGERS, ids=IDS)
@pytest.mark.parametrize("retry", [None, RetryPolicy(max_attempts=2, backoff=0, backoff_max=0, retry_on=LookupError)])
def test_P1_a_strangers_exception_that_is_raised_reaches_every_job_of_its_batch(
    make: Callable[[], BaseException], retry: RetryPolicy | None
) -> None:
    raised: list[BaseException] = []

    def process(batch: Batch[str]) -> list[Any]:
        raised.append(make())
        raise raised[-1]

    futures = run_with(process, ["one", "two", "three"], retry=retry)

    assert {id(type(future.exception(0))) for future in futures} == {id(type(raised[0]))}


def test_P1_a_metaclass_that_calls_everything_the_same_does_not_make_an_error_of_a_result() -> None:
    class Same(type):
        def __eq__(cls, other: object) -> bool:
            return True

        def __hash__(cls) -> int:
            return 1

    class Result(metaclass=Same):
        pass

    class Failure(Exception, metaclass=Same):
        pass

    answer = [Result(), Failure(), Result()]
    futures = run_with(lambda batch: answer, ["a", "b", "c"])

    assert [future.status.value for future in futures] == ["completed", "failed", "completed"]


class Endless(Sequence[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return index


class Breaks(Endless):
    def __iter__(self) -> Iterator[Any]:
        yield 1
        raise SystemExit("in the middle")


class NoLength(Endless):
    def __len__(self) -> int:
        raise KeyError("len")

    def __iter__(self) -> Iterator[Any]:
        return iter((1, 2, 3))


@pytest.mark.parametrize("answer", [Endless(), Breaks()])
def test_P2_an_answer_without_an_end_or_with_a_broken_one_makes_its_jobs_unknown(answer: Any) -> None:
    futures = run_with(lambda batch: answer, ["a", "b", "c"])

    assert {type_name(future.exception(0)) for future in futures} == {"ProcessorContractError"}


@pytest.mark.parametrize("answer", [deque([1, 2, 3]), NoLength()])
def test_P2_an_answer_that_is_read_to_its_end_counts(answer: Any) -> None:
    assert [future.result(0) for future in run_with(lambda batch: answer, ["a", "b", "c"])] == [1, 2, 3]


class Ambiguous:
    """As an array is: neither true nor false, nor equal to anything."""

    def __bool__(self) -> bool:
        raise ValueError("the truth value is ambiguous")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


def test_P1_payloads_and_results_are_not_compared() -> None:
    batcher = MicroBatcher[Any, Any](lambda batch: list(batch), linger=5.0, max_batch_size=2)
    payload = Ambiguous()
    told: list[Any] = []
    batcher.on(JobCompleted, told.append)

    futures = batcher.submit_many([payload, payload])

    assert [future.result(BOUND) is payload for future in futures] == [True, True]
    assert batcher.shutdown().finished
    assert [event.result is payload for event in told] == [True, True]


class Name(str):
    """A string that fails where it is used as a key."""

    def __hash__(self) -> int:
        raise KeyError("hash")

    def __eq__(self, other: object) -> bool:
        raise KeyError("eq")


def test_P1_a_job_id_of_a_class_of_its_own_is_a_plain_string_inside() -> None:
    with MicroBatcher[str, str](lambda batch: list(batch)) as batcher:
        future = batcher.submit("job", job_id=Name("mine"))

        assert (future.result(BOUND), future.job_id, type(future.job_id)) == ("job", "mine", str)
        assert batcher.submit("again", job_id="mine") is future
        assert batcher.future(Name("mine")) is future
        assert batcher.stats().submitted == 1


class RaisingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit("no place for a line")


def test_P1_a_handler_of_logs_that_raises_costs_its_line_and_nothing_else() -> None:
    batcher = MicroBatcher[str, str](lambda batch: list(batch))
    told: list[Any] = []

    def fail(thing: object) -> None:
        told.append(thing)
        raise ValueError("a listener")

    batcher.on(JobCompleted, fail)
    batcher.on(JobCompleted, told.append)
    handler = RaisingHandler()
    loggers = [logging.getLogger("microbatch"), logging.getLogger("concurrent.futures")]
    for log in loggers:
        log.addHandler(handler)
    try:
        future = batcher.submit("job")
        future.add_done_callback(fail)
        future.result(BOUND)
        assert batcher.shutdown(timeout=BOUND).finished
    finally:
        for log in loggers:
            log.removeHandler(handler)
    assert len(told) == 3


def test_P1_an_event_that_cannot_be_told_is_tried_and_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inside, go = threading.Event(), threading.Event()
    tries: list[str] = []

    def fails(*arguments: object) -> None:
        tries.append(threading.current_thread().name)
        raise SystemExit("every time")

    def process(batch: Batch[str]) -> list[str]:
        inside.set()
        assert go.wait(BOUND)
        return list(batch)

    monkeypatch.setattr(owed, "tell_failed", fails)
    batcher = MicroBatcher[str, str](process)
    batcher.on(JobFailed, tries.append)
    held = batcher.submit("held", delivery_timeout=0.1)
    assert inside.wait(BOUND)
    assert type_name(held.exception(BOUND)) == "OutcomeUnknown"
    go.set()

    assert batcher.shutdown(timeout=BOUND).finished

    assert len(tries) == 3
    assert "3 of 3 attempts" in caplog.text


def test_P1_what_hits_a_worker_every_time_does_not_keep_a_processor_busy() -> None:
    looks: list[None] = []

    class Queue:
        """Raises what nothing contains, whenever it is asked for a job."""

        def __init__(self) -> None:
            self.size = 0

        def put_nowait(self, item: object) -> None:
            self.size += 1

        def get_nowait(self) -> Any:
            looks.append(None)
            raise SystemExit("every time")

        def qsize(self) -> int:
            return self.size

    batcher = MicroBatcher[str, str](lambda batch: list(batch), queue=Queue)

    future = batcher.submit("job", delivery_timeout=1.5)

    assert type_name(future.exception(BOUND)) == "DeliveryTimeout"
    assert batcher.shutdown(timeout=BOUND).finished
    assert len(looks) < 100


def test_P1_what_kills_every_worker_at_once_does_not_keep_a_processor_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()
    fatal: list[str] = []

    def breaking(method: Callable[..., Any]) -> Callable[..., Any]:
        def broken_or_not(*arguments: Any) -> Any:
            if broken.is_set():
                fatal.append(threading.current_thread().name)
                raise SystemExit("every time")
            return method(*arguments)

        return broken_or_not

    monkeypatch.setattr(Worker, "turn", breaking(Worker.turn))
    monkeypatch.setattr(Worker, "recover", breaking(Worker.recover))
    batcher = MicroBatcher[str, str](lambda batch: list(batch))
    assert batcher.submit("first").result(BOUND) == "first"
    broken.set()
    batcher.submit("of the turn that is on").exception(BOUND)

    assert type_name(batcher.submit("second", delivery_timeout=1.0).exception(BOUND)) == "DeliveryTimeout"

    assert len(fatal) < 100
    broken.clear()
    assert batcher.submit("third").result(BOUND) == "third"
    assert batcher.shutdown(timeout=BOUND).finished


@pytest.mark.parametrize("name", ["open", "close", "abandon", "is_retryable"])
def test_a_processor_without_an_optional_method_may_say_so_in_its_own_way(name: str) -> None:
    class Processor:
        def __getattr__(self, name: str) -> Any:
            return {}[name]

        def process(self, batch: Batch[str]) -> list[str]:
            return list(batch)

    with MicroBatcher[str, str](Processor()) as batcher:
        assert batcher.submit("job").result(BOUND) == "job"

    broken = type("Broken", (Processor,), {name: property(lambda self: {}[0])})
    with pytest.raises(TypeError, match=f"{name} of the processor, a Broken, cannot be read: KeyError"):
        MicroBatcher(broken())


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class Forgetful(Exception):
    def __reduce__(self) -> Any:
        return type(self), self.args


def test_a_copy_has_the_slots_the_notes_and_what_a_reduce_forgets() -> None:
    slotted, forgetful = Slotted(5), Forgetful("x")
    forgetful.code, forgetful.__notes__ = 6, ["a note"]  # type: ignore[attr-defined]

    twin, other = copied(slotted), copied(forgetful)

    assert (twin is not slotted, twin.code) == (True, 5)  # type: ignore[attr-defined]
    assert (other is not forgetful, other.code) == (True, 6)  # type: ignore[attr-defined]
    assert other.__notes__ == ["a note"]  # type: ignore[attr-defined]
    assert other.__notes__ is not forgetful.__notes__  # type: ignore[attr-defined]
