"""What gunicorn needs so that each worker hears each signal: the tests are about the library and not about this.

Alone, with no batcher in it, a busy gunicorn 27 whose master gets a SIGINT kills a worker at the end of its graceful
timeout in every third trial or so, for one of two reasons.
"""

from __future__ import annotations

import os
import signal
from typing import Any

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _let_in() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


# Until a new worker has handlers of its own it has its master's, which put the signal where nobody looks.
os.register_at_fork(before=_hold, after_in_parent=_let_in)


def post_worker_init(worker: Any) -> None:
    if hasattr(worker, "method_queue"):
        # Its `handle_quit` calls the executor's `shutdown` and raises SystemExit, wherever the main thread is: inside
        # the executor's `submit`, which holds the same lock, or in the condition of a future that a thread waits for.
        signal.signal(signal.SIGQUIT, lambda *caught: worker.method_queue.defer(worker.handle_quit, *caught))
    _let_in()
