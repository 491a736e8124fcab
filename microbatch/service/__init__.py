"""Micro-batching as an HTTP service: `microbatch serve`, or `gunicorn 'microbatch.service:create_app()'`."""

from __future__ import annotations

from microbatch.errors import MissingExtra

try:
    import flask  # noqa: F401
    import prometheus_client  # noqa: F401
except ImportError as error:
    raise MissingExtra('pip install "flask>=3.0" "waitress>=3.0" "prometheus-client>=0.20"') from error

from .app import create_app
from .settings import ServiceError

__all__ = ["ServiceError", "create_app"]
