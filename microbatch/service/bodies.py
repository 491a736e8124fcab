"""Read a body as JSON, strictly: what two parsers could understand differently is refused.

Numbers with a fraction become `Decimal`, so that money keeps its digits.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_KEYS = 1000
MAX_DIGITS = 18  # of an integer
MAX_NUMBER = 64  # characters of a number with a fraction or an exponent

# A string takes all that belongs to it, also one without an end, so that the scan is linear.
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class BadBody(ValueError):
    """The body is no JSON that is accepted here; the message is for the client and quotes nothing of it."""


def read_json(data: bytes) -> Any:
    """The value of *data*.

    Raises:
        BadBody: no UTF-8, no JSON, nested deeper than 32 levels, more than 1000 keys in an object or one twice, NaN
            or Infinity, an integer of more than 18 digits, a number too large for a double, U+0000 or half a
            surrogate pair.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadBody("The body is not valid UTF-8.") from None
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_decimal,
        )
    except json.JSONDecodeError as error:
        raise BadBody(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    _check_strings(value)
    return value


def _check_depth(text: str) -> None:
    # Before the parser, whose recursion would end in a RecursionError.
    depth = 0
    for token in _TOKENS.finditer(text):
        first = token[0][0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise BadBody(f"The body is nested deeper than {MAX_DEPTH} levels.")
        elif first in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise BadBody(f"An object has more than {MAX_KEYS} keys.")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BadBody("An object has the same key twice.")
    return value


def _refuse_constant(name: str) -> Any:
    raise BadBody("NaN and Infinity are no JSON.")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise BadBody(f"An integer has more than {MAX_DIGITS} digits.")
    return int(text)


def _decimal(text: str) -> Decimal:
    if len(text) > MAX_NUMBER or math.isinf(float(text)):
        raise BadBody(f"A number has more than {MAX_NUMBER} characters or is too large.")
    return Decimal(text)


def _check_strings(value: Any) -> None:
    # By hand and not by recursion: the depth is bounded, and so is the stack.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if _UNSTORABLE.search(value):
                raise BadBody("A string contains U+0000 or half a surrogate pair.")
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
