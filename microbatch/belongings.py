"""What the user brought: it may lead back to the batcher's owner, and so to the batcher.

A batcher holds its own. The core holds them too while there is something to do with them, and lets go of them when it
comes to rest: its threads hold the core, and what they held for ever could never be collected. Forgotten batchers are
noticed here, by the finaliser, which gives the core back what it needs to end in good order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .calling import Processor
from .events import Listeners
from .registry import Registry
from .retry import RetryPolicy


class Owner(Protocol):
    """The core."""

    def forgotten(self, belongings: Belongings) -> None:
        """Nobody else holds *belongings* any more; called by a finaliser."""


class Belongings:
    """Of one batcher. *owner* is set once a batcher holds them."""

    def __init__(
        self,
        processor: Processor,
        listeners: Listeners,
        registry: Registry,
        retry: RetryPolicy | None,
        new_store: Callable[[], Any],
    ) -> None:
        self.processor = processor
        self.listeners = listeners
        self.registry = registry  # its futures hold results, and errors with their frames
        self.retry = retry
        self.new_store = new_store
        self.owner: Owner | None = None

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner.forgotten(self)
