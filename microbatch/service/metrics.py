"""`/metrics`, for Prometheus."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, request
from prometheus_client import CollectorRegistry, ProcessCollector

from microbatch.batcher import MicroBatcher
from microbatch.instrumentation.prometheus import instrument, multiprocess, scrape

from .problems import unavailable

blueprint = Blueprint("metrics", __name__)


def registry_for(batcher: MicroBatcher[Any, Any]) -> CollectorRegistry:
    """The numbers of *batcher* and of this process, for one application."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    instrument(batcher, registry)
    return registry


@blueprint.get("/metrics")
def metrics() -> Response:
    if request.environ.get("wsgi.multiprocess") and not multiprocess():
        detail = (
            "This is one of several worker processes, and knows its own numbers only."
            " Set PROMETHEUS_MULTIPROC_DIR to an empty directory before they start."
        )
        raise unavailable("several-workers", detail, 60)
    registry: CollectorRegistry = current_app.extensions["microbatch.registry"]
    body, content_type = scrape(request.headers.get("Accept", ""), registry)
    return Response(body, content_type=content_type)
