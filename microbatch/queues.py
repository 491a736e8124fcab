"""The queue that comes along, and the store that makes any queue safe to use."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from .interpreter import stdlib_queue
from .job import Job
from .logs import Log
from .protocols import JobQueue

if TYPE_CHECKING:
    import queue
else:
    queue = stdlib_queue()

_log = Log("microbatch.queues")

Dead = Callable[[Any], bool]


class MemoryQueue(queue.Queue[Any]):
    """A `queue.Queue` that hands out larger priorities first, FIFO within one, a whole batch at once.

    The priority is the item's attribute `priority`, 0 where there is none. Without ageing: a steady stream
    of urgent items starves the others.

    Args:
        maxsize: as in `queue.Queue`; 0 is no bound of its own.
    """

    ordered = True

    def _init(self, maxsize: int) -> None:
        self._levels: dict[int, deque[Any]] = {}
        # Negated priorities, ascending: the first one is the most urgent. May name a level that is gone.
        self._order: list[int] = []

    def _qsize(self) -> int:
        return sum(map(len, self._levels.values()))

    def _put(self, item: Any) -> None:
        priority = getattr(item, "priority", 0)
        level = self._levels.get(priority)
        if level is None:
            # Listed first: an interrupt in between leaves a name without a level, which is skipped;
            # the other way round it would leave a level that nobody empties.
            insort(self._order, -priority)
            level = self._levels.setdefault(priority, deque())
        level.append(item)

    def _get(self) -> Any:
        return self._take(1)[0]

    def _take(self, n: int) -> list[Any]:
        """Up to *n* items; the caller holds the lock."""
        taken: list[Any] = []
        while self._order and len(taken) < n:
            priority = -self._order[0]
            level = self._levels.get(priority)
            while level and len(taken) < n:
                taken.append(level.popleft())
            if not level:
                # No call between the look and the removal of the level: nothing can be put in between.
                if level is not None and not level:
                    del self._levels[priority]
                self._order.pop(0)
        return taken

    def get_many(self, n: int) -> list[Any]:
        """Take up to *n* items without blocking; an empty list when there are none."""
        with self.mutex:
            taken = self._take(n)
            self.not_full.notify(len(taken))
            return taken

    def _remove(self, dead: Dead) -> None:
        for level in list(self._levels.values()):
            _rotate(level, dead)


def _rotate(items: deque[Any], dead: Dead) -> None:
    """Drop dead items in place; what is put meanwhile stays."""
    for _ in range(len(items)):
        item = items.popleft()
        if not dead(item):
            items.append(item)


class Store:
    """A queue as the batcher uses it: under the batcher's lock, never blocking.

    The stdlib's queues are used through the hooks they offer for the purpose (`_put`, `_get`, `_qsize`), past
    their mutex: an exception raised by a signal handler inside `put` would lose that mutex for ever.
    """

    put: Callable[[Any], None]
    take: Callable[[int], list[Any]]
    size: Callable[[], int]

    def __init__(self, target: JobQueue | queue.Queue[Any] | queue.SimpleQueue[Any]) -> None:
        self.target = target
        self.trusted = type(target) in _STDLIB
        self.ordered = bool(getattr(target, "ordered", isinstance(target, queue.PriorityQueue)))
        if isinstance(target, queue.Queue) and _uses_stdlib_methods(target):
            self.size = target._qsize
            self.put = target._put if target.maxsize <= 0 else self._put_bounded
            self.take = target._take if isinstance(target, MemoryQueue) else self._take_hooked
        else:
            many = getattr(target, "get_many", None)
            self.size = target.qsize
            self.put = target.put if type(target) is queue.SimpleQueue else target.put_nowait
            self.take = self._take_one_by_one if many is None else lambda n: _listed(many(n), n)
        if not self.trusted:
            self.take = _contained(self.take)
            self.size = _sized(self.size)
        if self.size():
            raise ValueError(f"queue {target!r} holds {self.size()} items already; pass an empty one")

    def fits(self, n: int) -> bool:
        """Whether *n* items go in together, as far as it is known before they are put."""
        bound = self.target.maxsize if isinstance(self.target, queue.Queue) else 0
        return bound <= 0 or self.size() + n <= bound

    def _put_bounded(self, item: Any) -> None:
        target: Any = self.target
        if target._qsize() >= target.maxsize:
            raise queue.Full
        target._put(item)

    def _take_hooked(self, n: int) -> list[Any]:
        target: Any = self.target
        return [target._get() for _ in range(min(n, target._qsize()))]

    def _take_one_by_one(self, n: int) -> list[Any]:
        taken: list[Any] = []
        try:
            while len(taken) < n:
                taken.append(self.target.get_nowait())
        except queue.Empty:
            pass
        except BaseException:
            if not taken:
                raise
        return taken

    def remove(self, dead: Dead) -> None:
        """Drop dead items. A queue of unknown order keeps them until they are taken."""
        target: Any = self.target
        if isinstance(target, MemoryQueue):
            target._remove(dead)
        elif isinstance(target, queue.Queue) and isinstance(getattr(target, "queue", None), deque):
            _rotate(target.queue, dead)
        elif type(target) is queue.SimpleQueue:
            for _ in range(target.qsize()):
                item = target.get_nowait()
                if not dead(item):
                    target.put(item)
        elif isinstance(target, (queue.LifoQueue, queue.PriorityQueue)):
            # A filtered heap may be no heap: everything is put again, in the order it lies in the list.
            items = [target._get() for _ in range(target._qsize())]
            living = [item for item in items if not dead(item)]
            for item in living if isinstance(target, queue.PriorityQueue) else reversed(living):
                target._put(item)


def _listed(given: Iterable[Any], n: int) -> list[Any]:
    """All of it if it is a collection; an iterator, which may have no end, is not asked for more than *n*."""
    return list(given if isinstance(given, Sized) else islice(given, n))


def _contained(take: Callable[[int], list[Any]]) -> Callable[[int], list[Any]]:
    """*take* of a stranger's queue: one that is broken keeps its jobs, which then end at their deadlines."""

    def contained(n: int) -> list[Any]:
        try:
            return [item for item in take(n) if type(item) is Job]
        except BaseException:
            _log.exception("the queue failed; what it does not give ends at its deadline")
            return []

    return contained


def _sized(size: Callable[[], int]) -> Callable[[], int]:
    def contained() -> int:
        try:
            return int(size())
        except BaseException:
            _log.exception("the queue's qsize() failed; its jobs end at their deadlines")
            return 0

    return contained


_STDLIB = (queue.Queue, queue.LifoQueue, queue.PriorityQueue, queue.SimpleQueue, MemoryQueue)


def _uses_stdlib_methods(target: queue.Queue[Any]) -> bool:
    cls = type(target)
    return cls.put is queue.Queue.put and cls.put_nowait is queue.Queue.put_nowait and cls.get is queue.Queue.get


def store_factory(choice: object) -> Callable[[], Store]:
    """How to make the store for the option `queue`: at construction, and again in a forked child."""
    if isinstance(choice, _STDLIB) and type(choice) in _STDLIB:
        return _StdlibFactory(choice)
    if not callable(choice):
        raise TypeError(
            f"queue must be a factory such as queue=MyQueue, or one of the stdlib's queues, not {choice!r}: "
            "a forked child needs a new one"
        )
    return lambda: _checked_store(choice())


class _StdlibFactory:
    """The instance that was given, once; then others of its type and size."""

    def __init__(self, given: Any) -> None:
        self._given: Any = given
        self._type = type(given)
        self._arguments = () if isinstance(given, queue.SimpleQueue) else (given.maxsize,)

    def __call__(self) -> Store:
        given, self._given = self._given, None
        return Store(self._type(*self._arguments) if given is None else given)


def _checked_store(made: Any) -> Store:
    missing = [name for name in ("put_nowait", "get_nowait", "qsize") if not callable(getattr(made, name, None))]
    if missing:
        raise TypeError(f"queue factory made {made!r}, which has no {', '.join(missing)}; see JobQueue")
    return Store(made)
