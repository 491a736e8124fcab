"""Events are frozen records; telling them never raises but for a Ctrl-C, and never skips a listener."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

import microbatch
from microbatch import events
from microbatch.events import BatchStarted, Event, JobCancelled, JobSubmitted, Listeners

EVENTS = [
    value
    for value in vars(events).values()
    if isinstance(value, type) and issubclass(value, Event) and value is not Event
]
SUBMITTED = JobSubmitted("job", None, 0)


@pytest.mark.parametrize("event_type", EVENTS)
def test_an_event_is_a_frozen_slotted_record_and_public(event_type: type[Any]) -> None:
    event = event_type(*range(len(dataclasses.fields(event_type))))
    assert not hasattr(event, "__dict__")
    assert event == event_type(*range(len(dataclasses.fields(event_type))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(event_type)[0].name, 1)
    assert event_type.__name__ in microbatch.__all__


@pytest.mark.parametrize("event_type", [e for e in EVENTS if e.__name__.startswith("Job")])
def test_every_event_of_a_job_carries_the_job_and_its_id(event_type: type[Any]) -> None:
    assert {"job", "job_id"} <= {field.name for field in dataclasses.fields(event_type)}


def test_listeners_are_told_in_the_order_in_which_they_came() -> None:
    listeners, told = Listeners(), []
    for number in range(3):
        listeners.add(JobSubmitted, lambda event, number=number: told.append((number, event)))  # type: ignore[misc]
    listeners.tell(SUBMITTED)
    assert told == [(0, SUBMITTED), (1, SUBMITTED), (2, SUBMITTED)]


def test_a_listener_hears_only_what_it_asked_for() -> None:
    listeners, told = Listeners(), []
    listeners.add(JobSubmitted, told.append)
    listeners.tell(JobCancelled("job", None, 0.0))
    assert told == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, GeneratorExit])
def test_a_listener_that_raises_is_logged_and_changes_nothing(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    listeners, told = Listeners(), []

    def broken(event: JobSubmitted) -> None:
        raise error("broken")

    listeners.add(JobSubmitted, broken)
    listeners.add(JobSubmitted, told.append)
    with caplog.at_level(logging.ERROR, "microbatch.events"):
        listeners.tell(SUBMITTED)
    assert told == [SUBMITTED]
    assert "broken" in caplog.text
    assert "JobSubmitted" in caplog.text
    assert caplog.records[0].exc_info is not None


def test_a_ctrl_c_passes_after_the_other_listeners_had_their_turn() -> None:
    listeners, told = Listeners(), []

    def interrupted(event: JobSubmitted) -> None:
        raise KeyboardInterrupt

    listeners.add(JobSubmitted, interrupted)
    listeners.add(JobSubmitted, told.append)
    with pytest.raises(KeyboardInterrupt):
        listeners.tell(SUBMITTED)
    assert told == [SUBMITTED]


def test_a_listener_is_removed_by_equality_once_per_call() -> None:
    class Ear:
        def __init__(self) -> None:
            self.heard: list[JobSubmitted] = []

        def hear(self, event: JobSubmitted) -> None:
            self.heard.append(event)

    ear, listeners = Ear(), Listeners()
    listeners.add(JobSubmitted, ear.hear)
    listeners.add(JobSubmitted, ear.hear)
    listeners.remove(JobSubmitted, ear.hear)
    listeners.tell(SUBMITTED)
    assert len(ear.heard) == 1
    listeners.remove(JobSubmitted, ear.hear)
    with pytest.raises(ValueError, match="does not listen to JobSubmitted"):
        listeners.remove(JobSubmitted, ear.hear)


def test_a_listener_may_take_itself_out_while_it_is_told() -> None:
    listeners, told = Listeners(), []

    def once(event: JobSubmitted) -> None:
        told.append("once")
        listeners.remove(JobSubmitted, once)

    listeners.add(JobSubmitted, once)
    listeners.add(JobSubmitted, lambda event: told.append("always"))
    listeners.tell(SUBMITTED)
    listeners.tell(SUBMITTED)
    assert told == ["once", "always", "always"]


def test_nobody_wants_an_event_that_nobody_listens_to() -> None:
    listeners = Listeners()
    assert not listeners.by_type
    assert not listeners.want(JobSubmitted)
    listeners.add(JobSubmitted, print)
    assert listeners.by_type
    assert listeners.want(BatchStarted, JobSubmitted)
    assert not listeners.want(BatchStarted)
    listeners.remove(JobSubmitted, print)
    assert not listeners.want(JobSubmitted)


@pytest.mark.parametrize("not_an_event", [Event, "JobFailed", int, None, SUBMITTED])
def test_only_a_concrete_event_type_can_be_listened_to(not_an_event: Any) -> None:
    with pytest.raises(TypeError, match=r"not an event type: .*use JobCompleted"):
        Listeners().add(not_an_event, print)
    with pytest.raises(TypeError, match="not an event type"):
        Listeners().remove(not_an_event, print)


def test_a_listener_must_be_callable() -> None:
    with pytest.raises(TypeError, match="listener must be callable, not 'print'"):
        Listeners().add(JobSubmitted, "print")  # type: ignore[arg-type]
