"""The error family: who is caught by which `except`, and which errors promise that a job left no trace."""

from __future__ import annotations

import copy
import pickle
import queue

import pytest

import microbatch
from microbatch import errors
from microbatch.errors import (
    BatcherClosed,
    DeliveryTimeout,
    ForkedError,
    JobNotFound,
    MicrobatchError,
    MissingExtra,
    OutcomeUnknown,
    ProcessorContractError,
    QueueFull,
    WorkerDied,
)

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, MicrobatchError)]
UNKNOWN = [OutcomeUnknown, ProcessorContractError, ForkedError, WorkerDied]


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (BatcherClosed, RuntimeError),
        (QueueFull, queue.Full),
        (JobNotFound, LookupError),
        (MissingExtra, ImportError),
        (ForkedError, RuntimeError),
    ],
)
def test_an_error_is_caught_by_the_builtin_that_people_know(
    error: type[MicrobatchError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)


def test_every_error_has_one_root_and_is_an_ordinary_exception() -> None:
    assert len(ALL) == 11
    assert all(issubclass(error, Exception) for error in ALL)


def test_every_error_is_public() -> None:
    assert {error.__name__ for error in ALL} <= set(microbatch.__all__)


def test_delivery_timeout_is_not_what_result_raises_while_the_job_goes_on() -> None:
    assert not issubclass(DeliveryTimeout, TimeoutError)


def test_the_kinds_of_unknown_are_known_by_one_class() -> None:
    assert [error for error in ALL if issubclass(error, OutcomeUnknown)] == UNKNOWN


@pytest.mark.parametrize("error", UNKNOWN)
def test_an_unknown_outcome_carries_the_batch_and_survives_copy_and_pickle(error: type[OutcomeUnknown]) -> None:
    made = error("who knows", batch_id="b-1")
    for twin in (made, copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is error
        assert (str(twin), twin.batch_id) == ("who knows", "b-1")
    assert error("no batch").batch_id is None
