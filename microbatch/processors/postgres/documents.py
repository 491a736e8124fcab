"""JSON: what a value means for a column of type json or jsonb, in every form.

A str is JSON text as it stands, and None is NULL. Everything else becomes JSON, a bool and a date too, unless the user
has said how it is dumped: by `Json` or `Jsonb`, or by a dumper of their own. A column of type json[] or jsonb[] takes a
list of such values.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.adapt import AdaptersMap, PyFormat
from psycopg.types.json import Json, Jsonb, JsonbBinaryDumper, JsonbDumper, JsonBinaryDumper, JsonDumper

_TEXT = (str, bytes, bytearray, memoryview)
_WRAPPERS = (Json, Jsonb)
_PSYCOPG = ("psycopg", "psycopg_binary", "psycopg_c")
_JSON_DUMPERS = (JsonDumper, JsonbDumper, JsonBinaryDumper, JsonbBinaryDumper)


class Documents:
    """Makes JSON texts of values, unless *adapters* have an own way for them."""

    def __init__(self, adapters: AdaptersMap) -> None:
        self._adapters = adapters
        # psycopg's own setting, see psycopg.types.json.set_json_dumps.
        set_by_user = getattr(adapters.get_dumper(Jsonb, PyFormat.TEXT), "_dumps", json.dumps)
        self._dumps: Callable[[Any], str | bytes] = dumps if set_by_user is json.dumps else set_by_user
        self._users: dict[type, bool] = {}

    def value(self, value: Any, is_array: bool) -> Any:
        """*value* for a column of JSON, or of an array of it, as psycopg is to get it.

        Raises:
            TypeError: something in it has no form in JSON.
        """
        if value is None or isinstance(value, _TEXT) or self.is_settled(value):
            return value
        if not is_array:
            return self._text(value)
        if not isinstance(value, (list, tuple)) or any(self.is_users(type(item)) for item in value):
            return value
        return [self._item(item) for item in value]

    def is_settled(self, value: Any) -> bool:
        """Whether the user has said how *value* is dumped."""
        return isinstance(value, _WRAPPERS) or self.is_users(type(value))

    def is_users(self, kind: type) -> bool:
        """Whether the user has registered a dumper for *kind*; that of hstore, which is psycopg's, does not count."""
        known = self._users.get(kind)
        if known is None:
            known = self._users[kind] = self._has_own_dumper(kind)
        return known

    def _has_own_dumper(self, kind: type) -> bool:
        try:
            dumper = self._adapters.get_dumper(kind, PyFormat.TEXT)
        except psycopg.ProgrammingError:
            return False
        is_psycopgs = dumper.__module__.partition(".")[0] in _PSYCOPG
        return kind not in _WRAPPERS and (not is_psycopgs or issubclass(dumper, _JSON_DUMPERS))

    def _item(self, item: Any) -> Any:
        if isinstance(item, list) and _holds_wrapper(item):
            return [self._item(each) for each in item]  # a further dimension: the user says where its items are
        return item if item is None or isinstance(item, str) else self._text(item)

    def _text(self, value: Any) -> str:
        own = value.dumps if isinstance(value, _WRAPPERS) else None
        text = (own or self._dumps)(value.obj if isinstance(value, _WRAPPERS) else value)
        return text if isinstance(text, str) else bytes(text).decode()


def dumps(value: Any) -> str:
    """JSON as `json.dumps` makes it, and besides dates and times in ISO 8601, uuids, and the digits of a Decimal.

    Raises:
        TypeError: something in it has no form in JSON.
    """
    numbers: list[str] = []
    mark = ""

    def default(part: Any) -> Any:
        nonlocal mark
        if isinstance(part, Decimal):
            # As a float it might be another number. It stands behind a mark that nobody can guess until the end.
            mark = mark or uuid.uuid4().hex
            numbers.append(str(part))
            return f"{mark}{len(numbers) - 1}"
        return _form_of(part)

    text = json.dumps(value, default=default)
    return re.sub(f'"{mark}([0-9]+)"', lambda found: numbers[int(found[1])], text) if numbers else text


def _form_of(part: Any) -> Any:
    if isinstance(part, (dt.date, dt.time)):
        return part.isoformat()
    if isinstance(part, uuid.UUID):
        return str(part)
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, _WRAPPERS):
        return part.obj
    raise TypeError(
        f"{type(part).__qualname__} has no form in JSON: make it a str, a number, a list or a dict,"
        " or wrap the value in psycopg's Jsonb with dumps= of your own"
    )


def _holds_wrapper(items: list[Any]) -> bool:
    return any(_holds_wrapper(item) if isinstance(item, list) else isinstance(item, _WRAPPERS) for item in items)
