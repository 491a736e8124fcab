"""What users bring, and the read-only batch that they are handed."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

import pytest

from microbatch import Batch, BatchProcessor, JobQueue, MemoryQueue
from microbatch.testing import FaultyProcessor


def test_a_batch_is_a_sequence_of_the_payloads() -> None:
    batch = Batch(["a", "b", "c"], id="1")
    assert isinstance(batch, Sequence)
    assert (list(batch), len(batch), batch[0], batch[-1], batch[1:]) == (["a", "b", "c"], 3, "a", "c", ("b", "c"))
    assert "b" in batch
    assert list(reversed(batch)) == ["c", "b", "a"]
    assert batch.index("c") == 2


def test_a_batch_says_what_it_is() -> None:
    batch = Batch([1], id="4f-7", attempt=2, trigger="retry", deadline=12.5)
    assert (batch.id, batch.attempt, batch.trigger, batch.deadline) == ("4f-7", 2, "retry", 12.5)
    plain = Batch([1], id="x")
    assert (plain.attempt, plain.trigger, plain.deadline) == (1, "idle", None)


def test_a_batch_cannot_be_changed() -> None:
    jobs = [1, 2]
    batch: Any = Batch(jobs, id="x")
    jobs.append(3)
    assert list(batch) == [1, 2]
    for change in (lambda: setattr(batch, "id", "y"), lambda: setattr(batch, "note", 1)):
        with pytest.raises(AttributeError):
            change()
    with pytest.raises(TypeError):
        batch[0] = 9


def test_the_payloads_stay_out_of_the_text_of_a_batch() -> None:
    assert repr(Batch(["secret"], id="4f-7")) == "<Batch 4f-7 of 1 jobs, attempt 1, idle>"


def test_a_processor_is_known_by_its_method() -> None:
    assert isinstance(FaultyProcessor(), BatchProcessor)
    assert not isinstance(object(), BatchProcessor)


@pytest.mark.parametrize("made", [MemoryQueue(), queue.Queue(), queue.LifoQueue(), queue.SimpleQueue()])
def test_the_queues_of_the_standard_library_are_job_queues(made: Any) -> None:
    assert isinstance(made, JobQueue)
