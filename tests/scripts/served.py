"""The service as gunicorn loads it, with each answer saying which worker process it is from."""

from __future__ import annotations

import os

from flask import Response

from microbatch.service import create_app

app = create_app()


@app.after_request
def say_who(response: Response) -> Response:
    response.headers["X-Worker"] = str(os.getpid())
    return response
