"""A web application of one module-level batcher, as users write it. `GET /<job>`: 202 once it is accepted."""

from __future__ import annotations

import os
import uuid
from typing import Any

from ledger import Writer, note, submit_one, wait_until_threads_sleep

from microbatch import MicroBatcher

batcher: MicroBatcher[Any, Any] = MicroBatcher(Writer(0.01), max_batch_size=50)
note("batcher")

if "USE_BEFORE_FORK" in os.environ:
    # Threads run and jobs are queued while the server forks.
    run = uuid.uuid4().hex  # uWSGI imports it again in the same process
    for number in range(60):
        submit_one(batcher, f"early-{run}-{number}")
    if os.environ["USE_BEFORE_FORK"] == "at rest":
        batcher.flush()
        wait_until_threads_sleep()


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    job = environ["PATH_INFO"].lstrip("/")
    if job.startswith("wait"):
        assert batcher.execute(job) == job
        note("accepted", job)
        note("outcome", job, "completed")
    else:
        submit_one(batcher, job)
    start_response("202 Accepted", [("Content-Type", "text/plain"), ("Content-Length", "0")])
    return [b""]
