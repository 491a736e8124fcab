"""The columns that clients may write: what JSON they take, as a schema and as a check that says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .bodies import MAX_DIGITS

_INTEGERS = {"int2": 2**15, "int4": 2**31, "int8": 10**MAX_DIGITS}
_FLOATS = ("float4", "float8")
_TEXTS = ("varchar", "bpchar")
_JSONS = ("json", "jsonb")

_NO_NUL = "^[^\\u0000]*$"  # of half a surrogate pair, which no JSON text should contain, a pattern cannot speak

Schema = dict[str, Any]


class BadJob(ValueError):
    """A job does not fit the table; the message names the client's own keys and quotes no value."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        type: as in SQL, without its modifier: a value that does not fit is an error then and not cut off.
        base: the name of the type in `pg_type`, of a domain the one below it.
        precision, scale: of a numeric that has them.
        length: of a varchar or char that has one.
    """

    name: str
    type: str
    base: str
    is_nullable: bool = True
    has_default: bool = False
    is_generated: bool = False
    may_insert: bool = True
    precision: int | None = None
    scale: int | None = None
    length: int | None = None

    def schema(self) -> Schema:
        """The JSON Schema of its values, as a request has them."""
        schema = self._schema()
        if self.is_nullable and "type" in schema:
            given = schema["type"]
            schema["type"] = [*(given if isinstance(given, list) else [given]), "null"]
        return schema

    def _schema(self) -> Schema:
        if self.base in _INTEGERS:
            bound = _INTEGERS[self.base]
            return {"type": "integer", "minimum": 1 - bound if self.base == "int8" else -bound, "maximum": bound - 1}
        if self.base == "numeric":
            return {"type": ["number", "string"], "pattern": f"^{self._digits()}$", **self._bounds()}
        if self.base in _FLOATS:
            return {"type": "number"}
        if self.base == "bool":
            return {"type": "boolean"}
        if self.base in _JSONS:
            return {}
        if self.length is not None:
            return {"type": "string", "maxLength": self.length, "pattern": _NO_NUL}
        return {"type": "string", "pattern": _NO_NUL}

    def row_schema(self) -> Schema:
        """The JSON Schema of its values, as a result has them."""
        if self.base in _INTEGERS:
            kind: Any = "integer"
        elif self.base == "numeric" or self.base in _FLOATS:
            kind = ["number", "string"]  # NaN and Infinity are strings
        elif self.base == "bool":
            kind = "boolean"
        elif self.base in ("timestamptz", "timestamp"):
            return {"type": ["string", "null"], "format": "date-time"}
        elif self.base in ("varchar", "bpchar", "text", "uuid", "date"):
            kind = "string"
        else:
            return {}
        return {"type": [*(kind if isinstance(kind, list) else [kind]), "null"]}

    def text(self, value: Any) -> str | None:
        """*value* as the server reads it.

        Raises:
            BadJob: it is none of `schema`.
        """
        if value is None:
            if not self.is_nullable:
                raise BadJob(f"{_shown(self.name)} must not be null.")
            return None
        if self.base in _INTEGERS:
            return self._integer(value)
        if self.base == "numeric":
            return self._numeric(value)
        if self.base in _FLOATS:
            return str(_number(self.name, value, "a number"))
        if self.base == "bool":
            return str(_of(bool, self.name, value, "true or false")).lower()
        if self.base in _JSONS:
            return json.dumps(value, default=_plain, ensure_ascii=False)
        text: str = _of(str, self.name, value, "a string")
        if self.length is not None and len(text) > self.length:
            raise BadJob(f"{_shown(self.name)} must have at most {self.length} characters.")
        return text

    def _integer(self, value: Any) -> str:
        number = _number(self.name, value, "an integer")
        schema = self._schema()
        if number != int(number) or not schema["minimum"] <= number <= schema["maximum"]:
            raise BadJob(f"{_shown(self.name)} must be an integer from {schema['minimum']} to {schema['maximum']}.")
        return str(int(number))

    def _numeric(self, value: Any) -> str:
        if isinstance(value, str):
            if not re.fullmatch(self._digits(), value, re.ASCII):
                raise BadJob(f"{_shown(self.name)} as a string must be a decimal number, and fit {self._named()}.")
            return value
        number = _number(self.name, value, "a number")
        bounds = self._bounds()
        if bounds and not bounds["minimum"] <= number <= bounds["maximum"]:
            raise BadJob(f"{_shown(self.name)} must fit {self._named()}.")
        return str(number)

    def _digits(self) -> str:
        if self.precision is None or self.scale is None or not 0 <= self.scale <= self.precision:
            return "-?[0-9]{1,18}(\\.[0-9]{1,18})?"
        whole = max(1, self.precision - self.scale)
        return f"-?[0-9]{{1,{whole}}}" + (f"(\\.[0-9]{{1,{self.scale}}})?" if self.scale else "")

    def _bounds(self) -> dict[str, int]:
        if self.precision is None or self.scale is None or self.precision - self.scale > MAX_DIGITS:
            return {}
        # The next integer might be rounded up to one digit too many.
        bound = max(0, 10 ** max(0, self.precision - self.scale) - 1)
        return {"minimum": -bound, "maximum": bound}

    def _named(self) -> str:
        return "numeric" if self.precision is None else f"numeric({self.precision},{self.scale})"


def texts_of(job: Any, columns: Mapping[str, Column]) -> tuple[str | None, ...]:
    """The values of one job, in the order of *columns*.

    Raises:
        BadJob: it is no object, lacks a column, has another one, or a value does not fit.
    """
    if not isinstance(job, dict):
        raise BadJob("A job must be a JSON object.")
    if unknown := sorted(job.keys() - columns.keys()):
        raise BadJob(f"Unknown: {_listed(unknown)}.")
    if missing := [name for name in columns if name not in job]:
        raise BadJob(f"Missing: {_listed(missing)}.")
    return tuple(column.text(job[name]) for name, column in columns.items())


def _number(name: str, value: Any, what: str) -> int | Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise BadJob(f"{_shown(name)} must be {what}.")
    return value


def _of(kind: type, name: str, value: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise BadJob(f"{_shown(name)} must be {what}.")
    return value


def _plain(value: Decimal) -> int | float:
    return float(value)


def _listed(names: Any) -> str:
    shown = [_shown(name) for name in list(names)[:20]]
    return ", ".join(shown) + (", …" if len(names) > 20 else "")


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= 64 else name[:64] + "…")
