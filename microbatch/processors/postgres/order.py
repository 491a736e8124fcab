"""The order of jobs inside a batch, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from microbatch.protocols import Batch

from .errors import is_jobs_own


class Ordered:
    """A batch in the order in which it is written; *positions* are those of the jobs as they came."""

    def __init__(self, batch: Batch[Any], positions: Sequence[int] | None) -> None:
        self._positions = positions
        self.batch = batch
        if positions is not None:
            jobs = [batch[i] for i in positions]
            self.batch = Batch(jobs, id=batch.id, attempt=batch.attempt, trigger=batch.trigger, deadline=batch.deadline)

    def restored(self, results: list[Any]) -> list[Any]:
        """*results* in the order of the jobs as they came."""
        if self._positions is None:
            return results
        restored: list[Any] = [None] * len(results)
        for i, result in zip(self._positions, results, strict=True):
            restored[i] = result
        return restored


class Order:
    """Sorts by the user's key, stably: two jobs of one key keep their order."""

    def __init__(self, sort_key: Callable[[Any], Any] | None) -> None:
        if sort_key is not None and not callable(sort_key):
            raise TypeError(f"sort_key must be callable or None, not {type(sort_key).__qualname__}")
        self._sort_key = sort_key

    def of(self, batch: Batch[Any]) -> Ordered:
        """*batch* in order. A job without a key comes last, and fails or not by what the server says of it."""
        if self._sort_key is None:
            return Ordered(batch, None)
        keys: dict[int, Any] = {}
        for i, job in enumerate(batch):
            try:
                keys[i] = self._sort_key(job)
            except BaseException as error:
                if not is_jobs_own(error):
                    raise
        last = [i for i in range(len(batch)) if i not in keys]
        return Ordered(batch, _sorted(keys) + last)


def _sorted(keys: dict[int, Any]) -> list[int]:
    try:
        return sorted(keys, key=keys.__getitem__)
    except BaseException as error:
        if not is_jobs_own(error):
            raise
    # One key that does not compare must not fail its neighbours; any order that all processes share will do.
    return sorted(keys, key=lambda i: _text(keys[i]))


def _text(key: Any) -> tuple[str, str]:
    try:
        return type(key).__qualname__, repr(key)
    except BaseException as error:
        if not is_jobs_own(error):
            raise
    return type(key).__qualname__, ""
