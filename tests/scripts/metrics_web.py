"""The application of `web`, with its numbers at `GET /metrics`."""

from __future__ import annotations

from typing import Any

import web

from microbatch.instrumentation.prometheus import instrument, scrape

instrument(web.batcher)


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    if environ["PATH_INFO"] != "/metrics":
        return web.application(environ, start_response)
    body, content_type = scrape(environ.get("HTTP_ACCEPT", ""))
    start_response("200 OK", [("Content-Type", content_type), ("Content-Length", str(len(body)))])
    return [body]
