"""Any number of jobs from an iterable, their results in its order, and never more under way than a window holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from .errors import QueueFull
from .job import JobFuture

J = TypeVar("J")


def results_of(
    submit: Callable[[J], JobFuture[Any]], jobs: Iterable[J], *, window: int, patient: bool, return_exceptions: bool
) -> Iterator[Any]:
    """The result of each of *jobs*; the first error is raised in its place, or yielded with *return_exceptions*.

    *patient*: where others take all places, and none of these jobs is under way, it tries again.
    """
    result = _outcome if return_exceptions else _result
    ahead: deque[JobFuture[Any]] = deque()
    end: BaseException | None = None
    waiting = iter(jobs)
    while end is None:
        try:
            job = next(waiting)
        except StopIteration:
            break
        except Exception as error:  # in its place: behind the results of the jobs before it
            end = error
            continue
        accepted = False
        while not accepted and end is None:
            try:
                ahead.append(submit(job))
                accepted = True
            except QueueFull as error:
                if ahead:
                    yield result(ahead.popleft())
                elif not patient:
                    end = error
            except Exception as error:
                end = error
        while ahead and (len(ahead) >= window or ahead[0].done()):
            yield result(ahead.popleft())
    while ahead:
        yield result(ahead.popleft())
    if end is not None:
        raise end


def _result(future: JobFuture[Any]) -> Any:
    return future.result()


def _outcome(future: JobFuture[Any]) -> Any:
    try:
        error = future.exception()
    except CancelledError as cancelled:
        return cancelled
    return future.result() if error is None else error
