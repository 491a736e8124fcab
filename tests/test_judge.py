"""From the processor's answer to one verdict per job."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from naming import named

from microbatch import Batch, JobStatus, OutcomeUnknown, ProcessorContractError, RetryPolicy, WorkerDied
from microbatch.errors import in_parts
from microbatch.foreign import copied
from microbatch.job import Job, JobFuture
from microbatch.judge import Again, Answer, Judge


def a_batch(n: int = 3, attempt: int = 1) -> tuple[Batch[Any], list[Job]]:
    jobs = []
    for number in range(n):
        job = Job(f"job {number}", JobFuture(), 0, 0.0, 1e9)
        job.attempts = attempt
        jobs.append(job)
    return Batch([job.payload for job in jobs], id="b-1", attempt=attempt), jobs


def judge(is_retryable: Callable[[BaseException], bool] | None = None, retry: RetryPolicy | None = None) -> Judge:
    return Judge(is_retryable, retry)


def words(answers: list[Answer]) -> list[str]:
    return ["again" if isinstance(answer, Again) else answer[0].value for answer in answers]


def errors(answers: list[Answer]) -> list[BaseException | None]:
    return [answer.error if isinstance(answer, Again) else answer[2] for answer in answers]


# Results.


@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_P2_results_belong_to_the_jobs_in_their_order(kind: Callable[[Any], Any]) -> None:
    answers, alone, error = judge().results(*a_batch(), kind(["x", "y", "z"]))
    assert answers == [(JobStatus.COMPLETED, row, None) for row in "xyz"]
    assert (alone, error) == (0, None)


def test_none_means_done_without_results() -> None:
    answers, alone, error = judge().results(*a_batch(), None)
    assert answers == [(JobStatus.COMPLETED, None, None)] * 3
    assert (alone, error) == (0, None)


def test_a_job_may_have_the_result_none() -> None:
    answers, _, _ = judge().results(*a_batch(), [None, 0, ""])
    assert [answer[1] for answer in answers if not isinstance(answer, Again)] == [None, 0, ""]


def test_P3_an_exception_among_the_results_fails_its_job_alone() -> None:
    bad = ValueError("bad")
    answers, alone, error = judge().results(*a_batch(), ["x", bad, "z"])
    assert words(answers) == ["completed", "failed", "completed"]
    assert errors(answers)[1] is bad
    assert (alone, error) == (1, None)


def test_an_exception_class_among_the_results_is_a_result() -> None:
    answers, alone, _ = judge().results(*a_batch(1), [ValueError])
    assert (words(answers), alone) == (["completed"], 0)


def test_one_exception_for_several_results_is_told_apart() -> None:
    bad = ValueError("bad")
    answers, alone, _ = judge().results(*a_batch(), [bad, bad, bad])
    told = errors(answers)
    assert len({id(error) for error in told}) == 3
    assert [(type(error), str(error)) for error in told] == [(ValueError, "bad")] * 3
    assert alone == 3


def test_an_unknown_among_the_results_is_unknown_and_names_the_batch() -> None:
    answers, _, _ = judge().results(*a_batch(1), [OutcomeUnknown("?")])
    assert words(answers) == ["unknown"]
    assert [getattr(error, "batch_id", None) for error in errors(answers)] == ["b-1"]


class Unreadable(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        raise ZeroDivisionError("cannot be read")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "the processor returned 0 results for a batch of 3"),
        (["x"], "the processor returned 1 results for a batch of 3"),
        (list("wxyz"), "the processor returned 4 results for a batch of 3"),
        ("xyz", "the processor returned a str for"),
        (b"xyz", "the processor returned a bytes for"),
        (bytearray(b"xyz"), "the processor returned a bytearray for"),
        ({"x": 1, "y": 2, "z": 3}, "the processor returned a dict for"),
        ({1, 2, 3}, "the processor returned a set for"),
        ((row for row in "xyz"), "the processor returned a generator for"),
        (3, "the processor returned an int for"),
        (True, "the processor returned a bool for"),
        (ValueError("returned, not raised"), "the processor returned a ValueError for"),
        (Unreadable("xyz"), "reading the processor's results raised ZeroDivisionError"),
    ],
    ids=named,
)
def test_P2_any_other_answer_makes_every_job_unknown(results: Any, message: str) -> None:
    always = judge(lambda exc: True, RetryPolicy(retry_on=lambda exc: True))
    answers, alone, error = always.results(*a_batch(), results)
    assert isinstance(error, ProcessorContractError)
    assert message in str(error)
    assert "return one result per job, in their order, or None" in str(error)
    assert (words(answers), alone) == (["unknown"] * 3, 0)
    told = errors(answers)
    assert [(type(each), getattr(each, "batch_id", None)) for each in told] == [(ProcessorContractError, "b-1")] * 3
    assert len({id(each) for each in told}) == 3


# Failures.


def test_a_batch_that_raised_fails_each_job_with_an_error_of_its_own() -> None:
    error = OSError(5, "gone", "file")
    answers = judge().failure(*a_batch(), error)
    assert words(answers) == ["failed"] * 3
    told = errors(answers)
    assert told[0] is error
    assert len({id(each) for each in told}) == 3
    assert [(each.errno, each.filename) for each in told if isinstance(each, OSError)] == [(5, "file")] * 3


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=named)
def test_what_is_no_ordinary_exception_fails_the_jobs_and_is_never_retried(error: BaseException) -> None:
    always = judge(lambda exc: True, RetryPolicy(retry_on=BaseException))
    assert words(always.failure(*a_batch(), error)) == ["failed"] * 3


def test_nothing_is_retried_where_nobody_says_so() -> None:
    assert words(judge(None, RetryPolicy()).failure(*a_batch(1), OSError())) == ["failed"]


@pytest.mark.parametrize(
    ("is_retryable", "retry"),
    [
        (lambda exc: True, RetryPolicy()),
        (None, RetryPolicy(retry_on=OSError)),
        (lambda exc: False, RetryPolicy(retry_on=OSError)),
    ],
    ids=["processor", "retry_on", "retry_on against the processor"],
)
def test_the_processor_or_the_policy_can_ask_for_another_attempt(is_retryable: Any, retry: RetryPolicy) -> None:
    answers = judge(is_retryable, retry).failure(*a_batch(), OSError("lost"))
    assert words(answers) == ["again"] * 3
    assert not any(isinstance(answer, Again) and answer.undecided for answer in answers)


def test_no_policy_means_no_retry_whatever_the_processor_says() -> None:
    always = judge(lambda exc: True, None)
    assert words(always.failure(*a_batch(1), OSError())) == ["failed"]
    assert words(always.failure(*a_batch(1), OutcomeUnknown())) == ["unknown"]
    assert words(always.results(*a_batch(1), [OSError()])[0]) == ["failed"]


def test_the_attempts_are_bounded_for_each_job_on_its_own() -> None:
    batch, jobs = a_batch(attempt=2)
    jobs[1].attempts = 1
    answers = judge(lambda exc: True, RetryPolicy(max_attempts=2)).failure(batch, jobs, OSError())
    assert words(answers) == ["failed", "again", "failed"]


def test_a_job_that_failed_alone_may_be_retried_alone() -> None:
    answers, _, _ = judge(lambda exc: isinstance(exc, OSError), RetryPolicy()).results(
        *a_batch(), ["x", OSError(), ValueError()]
    )
    assert words(answers) == ["completed", "again", "failed"]


def test_P4_an_undecided_batch_is_tried_again_as_a_whole_on_the_word_of_the_processor() -> None:
    answers = judge(lambda exc: True, RetryPolicy()).failure(*a_batch(), OutcomeUnknown("lost at commit"))
    assert [isinstance(answer, Again) and answer.undecided for answer in answers] == [True] * 3


def parts(answers: list[Answer]) -> list[str | None]:
    return [answer.batch_id if isinstance(answer, Again) else "over" for answer in answers]


def test_a_batch_comes_back_in_the_parts_that_its_error_names() -> None:
    split = ConnectionError("lost")
    assert parts(judge(lambda exc: True, RetryPolicy()).failure(*a_batch(), split)) == [None] * 3
    in_parts(split, [("b-1.1", 1), ("b-1.2", 2)])
    answers = judge(lambda exc: True, RetryPolicy()).failure(*a_batch(), split)
    assert parts(answers) == ["b-1.1", "b-1.2", "b-1.2"]
    assert not any(isinstance(answer, Again) and answer.undecided for answer in answers)


def test_a_batch_that_is_split_has_another_attempt_and_one_that_is_not_has_its_last() -> None:
    error = ConnectionError("lost")
    twice = RetryPolicy(max_attempts=2)
    for batches, expected in (
        ([("b-1.1", 1), ("b-1.2", 2)], ["b-1.1", "b-1.2", "b-1.2"]),
        ([("b-1", 3)], ["over"] * 3),
    ):
        in_parts(error, batches)
        assert parts(judge(lambda exc: True, twice).failure(*a_batch(attempt=2), error)) == expected
    assert parts(judge(lambda exc: True, None).failure(*a_batch(), error)) == ["over"] * 3


def test_parts_that_are_not_the_batch_are_not_followed() -> None:
    error = ConnectionError("lost")
    in_parts(error, [("b-1.1", 1), ("b-1.2", 3)])
    assert parts(judge(lambda exc: True, RetryPolicy()).failure(*a_batch(), error)) == [None] * 3


@pytest.mark.parametrize("retry_on", [OutcomeUnknown, Exception, lambda exc: True], ids=named)
def test_P4_retry_on_does_not_cover_an_unknown_outcome(retry_on: Any) -> None:
    by_policy = judge(None, RetryPolicy(retry_on=retry_on))
    assert words(by_policy.failure(*a_batch(), OutcomeUnknown())) == ["unknown"] * 3
    assert words(by_policy.results(*a_batch(1), [OutcomeUnknown()])[0]) == ["unknown"]


def test_an_undecided_batch_has_a_last_attempt_too() -> None:
    lost = OutcomeUnknown("lost at commit")
    answers = judge(lambda exc: True, RetryPolicy(max_attempts=2)).failure(*a_batch(attempt=2), lost)
    assert words(answers) == ["unknown"] * 3
    assert len({id(error) for error in errors(answers)}) == 3


def test_an_unknown_outcome_learns_its_batch_and_keeps_one_that_it_knows() -> None:
    assert errors(judge().failure(*a_batch(1), WorkerDied("?")))[0].batch_id == "b-1"  # type: ignore[union-attr]
    known = OutcomeUnknown("?", batch_id="other")
    assert errors(judge().failure(*a_batch(2), known))[1].batch_id == "other"  # type: ignore[union-attr]


def test_a_question_that_raises_is_logged_and_means_no(caplog: pytest.LogCaptureFixture) -> None:
    def broken(exc: BaseException) -> bool:
        raise ZeroDivisionError("broken predicate")

    with caplog.at_level(logging.ERROR, "microbatch.judge"):
        answers = judge(broken, RetryPolicy(retry_on=broken)).failure(*a_batch(), OSError())
    assert words(answers) == ["failed"] * 3
    assert "broken predicate" in caplog.text


# Copies.


class Odd(Exception):
    """Cannot be made from its arguments."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code)
        self.detail = detail


class Liar(Exception):
    """Is copied into something else."""

    def __reduce__(self) -> Any:
        return ValueError, ("not me",)


def test_a_copy_has_the_type_arguments_attributes_and_causes_of_its_original() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise OSError(5, "gone") from inner
    except OSError as exc:
        original = exc
    original.note = "mine"  # type: ignore[attr-defined]
    twin = copied(original)
    assert twin is not original
    assert (type(twin), twin.args, twin.note) == (OSError, (5, "gone"), "mine")  # type: ignore[attr-defined]
    assert twin.__cause__ is original.__cause__
    assert twin.__suppress_context__
    assert twin.__traceback__ is original.__traceback__


@pytest.mark.parametrize("original", [Odd(1, detail="x"), Liar("me")], ids=named)
def test_an_exception_that_resists_is_shared_with_its_traceback_trimmed(original: Exception) -> None:
    try:
        raise original
    except Exception:
        pass
    assert copied(original) is original
    assert original.__traceback__ is None
