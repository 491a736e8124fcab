"""The application on a database of its own, for a whole module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from microbatch.service import create_app
from service.answers import ADMIN


@pytest.fixture(scope="module")
def make_app(shared_database: str) -> Iterator[Callable[..., Flask]]:
    """`create_app` on the module's database; what it made is shut down in the end."""
    made: list[Flask] = []

    def make(**settings: Any) -> Flask:
        made.append(create_app(shared_database, **{"admin_token": ADMIN, **settings}))
        return made[-1]

    yield make
    for app in made:
        app.extensions["microbatch.jobs"].shutdown()


@pytest.fixture(scope="module")
def app(make_app: Callable[..., Flask]) -> Flask:
    """One that its tests do not shut down."""
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()
