"""The settings for signals, and what the page on metrics adds to them."""

from __future__ import annotations

from typing import Any

from gunicorn_settings import post_worker_init
from prometheus_client import multiprocess

__all__ = ["child_exit", "post_worker_init"]


def child_exit(server: Any, worker: Any) -> None:
    multiprocess.mark_process_dead(worker.pid)
