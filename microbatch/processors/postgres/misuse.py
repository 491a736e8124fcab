"""What people pass in the place of a connection, and what to pass instead."""

from __future__ import annotations

import inspect
from typing import Any

import psycopg
import psycopg_pool

_PASS = (
    "pass a connection string, a callable that gives one or a context manager with a psycopg connection, an open"
    " psycopg_pool.ConnectionPool, or an Engine of SQLAlchemy's on psycopg"
)


def name_of(value: object) -> str:
    return type(value).__qualname__


def instead_of_source(value: Any) -> str:
    """What to do about *value*, given where connections are to come from."""
    if value is None:
        return "is the variable, or the setting, that should hold it missing?"
    if isinstance(value, psycopg.Connection):
        return "lend it with `lambda: contextlib.nullcontext(connection)`"
    if isinstance(value, (psycopg_pool.AsyncConnectionPool, psycopg.AsyncConnection)):
        return "batches run on threads: pass a psycopg_pool.ConnectionPool or a connection string"
    if isinstance(value, dict):
        return "make a string of it with psycopg.conninfo.make_conninfo(**…)"
    if isinstance(value, bytes):
        return "decode it"
    if inspect.iscoroutine(value) or inspect.iscoroutinefunction(value):
        return "batches run on threads: the callable must not be async"
    return instead_of_connection(value)


def instead_of_connection(value: Any) -> str:
    """What to do about *value*, given where a connection was to come."""
    module = type(value).__module__
    if value is None:
        return (
            "with Django call `connection.ensure_connection()` first: before it, `django.db.connection.connection` is"
            " None"
        )
    if module.startswith("django.") and hasattr(value, "ensure_connection"):
        return (
            "it is Django's wrapper: call its `ensure_connection()`, and lend what is inside,"
            " `contextlib.nullcontext(django.db.connection.connection)`"
        )
    if module.startswith("psycopg2"):
        return (
            "the application runs on psycopg2 and this processor on psycopg 3: pass a connection string, or have Django"
            " run on psycopg 3 (it takes it where psycopg2 is not installed)"
        )
    if isinstance(value, psycopg.AsyncConnection):
        return "batches run on threads: lend a psycopg.Connection"
    if isinstance(value, (psycopg_pool.ConnectionPool, psycopg_pool.AsyncConnectionPool)):
        return "pass an open psycopg_pool.ConnectionPool itself, or its method `connection`"
    if module.startswith("sqlalchemy."):
        return "pass the Engine itself, or lend the driver's own connection, `connection.connection.driver_connection`"
    if isinstance(value, str):
        return "a connection string is returned as it is, without a context manager"
    return _PASS
