"""Which column an error is about. The server seldom says it, and counts parameters that the user has never seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, TypeVar

import psycopg
from psycopg.abc import Buffer

from .catalogue import Column, Table
from .errors import went_through_the_job

Error = TypeVar("Error", bound=BaseException)

_MARK = "_microbatch_column"

# The last line of the context where a parameter could not be read, in any language, the value perhaps behind it. Not
# the list of all parameters, which a colon introduces, and no SQL, which is quoted.
_PARAMETER = re.compile(r"(?:\A|\n)[^\n\"'«»„“”「」:\uff1a]*\$(\d+)(?: = '.*')?\Z", re.DOTALL)
# What the detail of a key begins with, in any language.
_KEY = re.compile(r"\A[^(]*\(([^(),]+)\) ?= ?\(")

_TOO_LONG = ("22001", "22026")
_OUT_OF_RANGE = "22003"
_ALWAYS_GENERATED = "428C9"
_KEYS = ("23503", "23505", "23P01")
_CHECK = "23514"


def column_of(error: BaseException) -> str | None:
    """The column, or the placeholder of a statement, that a job's *error* is about; None where that is not known."""
    try:
        column = getattr(error, _MARK, None)
    except Exception:  # of a stranger's class
        return None
    if column is None and isinstance(error, psycopg.Error):
        column = said(error, ())
    return column if isinstance(column, str) else None


def at(error: Error, column: str | None, remedy: str = "") -> Error:
    """*error*, which says from now on that it is about *column*: in its text, in a note and to `column_of`."""
    try:
        if column is None or getattr(error, _MARK, None) is not None:
            return error
        setattr(error, _MARK, column)
        # By hand, because Python 3.10 has no add_note().
        error.__notes__ = [*getattr(error, "__notes__", ()), f"column: {column}"]  # type: ignore[attr-defined]
        _say(error, column, remedy)
    except Exception:  # of a stranger's class, which may refuse all of it
        pass
    return error


def renamed(error: BaseException, column: str) -> None:
    """Let *error* name *column* instead: a placeholder may be called otherwise than its column."""
    old = column_of(error)
    setattr(error, _MARK, column)
    error.__notes__ = [f"column: {column}"]  # type: ignore[attr-defined]
    if old is not None and error.args and isinstance(error.args[0], str):
        text = error.args[0].replace(f"COLUMN NAME:  {old}", f"COLUMN NAME:  {column}")
        error.args = (text.replace(f"(column {old})", f"(column {column})"), *error.args[1:])


def _say(error: BaseException, column: str, remedy: str) -> None:
    if not isinstance(error, psycopg.Error) and went_through_the_job(error):
        return  # the job's own words
    if isinstance(error, UnicodeError):
        if isinstance(error, (UnicodeEncodeError, UnicodeDecodeError)):
            error.reason = f"{error.reason} (column {column})"
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        is_servers = isinstance(error, psycopg.Error) and error.sqlstate is not None
        # As libpq says it where it is asked for every detail.
        where = f"\nCOLUMN NAME:  {column}" if is_servers else f" (column {column})"
        error.args = (f"{error.args[0]}{where}" + (f"\nHINT:  {remedy}" if remedy else ""),)


def said(error: psycopg.Error, parameters: Sequence[str]) -> str | None:
    """The column that the server names: outright, by the number of one of the *parameters*, or as the key's."""
    diag = error.diag
    if diag.column_name:
        return diag.column_name
    if found := _PARAMETER.search(diag.context or ""):
        number = int(found[1]) - 1
        return parameters[number] if 0 <= number < len(parameters) else None
    # Of a check the detail is the whole row, which may look like anything.
    if error.sqlstate in _KEYS or (error.sqlstate == _CHECK and diag.constraint_name is None):
        found = _KEY.match(diag.message_detail or "")
        return found and _unquoted(found[1])
    return None


def _unquoted(identifier: str) -> str:
    if identifier.startswith('"') and identifier.endswith('"'):
        return identifier[1:-1].replace('""', '"')
    return identifier


def found_in(table: Table, names: Sequence[str], row: Sequence[Buffer | None], error: psycopg.Error) -> str | None:
    """The one of the columns *names*, with the texts *row*, that the server's *error* must be about."""
    columns = {column.name: column for column in table.columns}
    given = [(columns[name], text) for name, text in zip(names, row, strict=True) if name in columns]
    # The server takes them in the order of the table.
    given.sort(key=lambda each: table.columns.index(each[0]))
    constraint = error.diag.constraint_name
    if constraint is not None and error.diag.table_name == table.name:
        return dict(table.constraints).get(constraint)
    suspects = list(_suspects(given, error))
    if len(suspects) == 1:
        return suspects[0][0].name
    return next((column.name for column, text in suspects if _does_not_fit(column, text)), None)


def _suspects(
    given: Sequence[tuple[Column, Buffer | None]], error: psycopg.Error
) -> Iterator[tuple[Column, Buffer | None]]:
    """Those of a type that the error speaks of."""
    message = error.diag.message_primary or ""
    numbers = re.findall(r"-?\d+", error.diag.message_detail or "")
    numeric = f"numeric({','.join(numbers[:2])})"
    for column, text in given:
        kind = column.full_type.removesuffix("[]")
        if text is None:
            continue
        if error.sqlstate == _ALWAYS_GENERATED:
            is_suspect = column.identity == "a"
        elif error.sqlstate in _TOO_LONG:
            is_suspect = "(" in kind and re.search(rf"(?<!\w){re.escape(kind)}", message) is not None
        else:
            is_suspect = error.sqlstate == _OUT_OF_RANGE and kind == numeric
        if is_suspect:
            yield column, text


def _does_not_fit(column: Column, text: Buffer | None) -> bool:
    modifier = [int(number) for number in re.findall(r"-?\d+", column.full_type)]
    value = bytes(text or b"").decode(errors="replace")
    if column.full_type.startswith("numeric("):
        return _overflows(value, *modifier[:2])
    if column.full_type.startswith("bit("):
        return len(value) != modifier[0]
    return len(value.rstrip(" ")) > modifier[0]


def _overflows(value: str, precision: int, scale: int) -> bool:
    try:
        number = Decimal(value)
        rounded: Any = number.quantize(Decimal(1).scaleb(-scale), ROUND_HALF_UP)
    except InvalidOperation:  # not a number, or one with more digits than Python rounds
        return True
    return bool(abs(rounded) >= Decimal(10) ** (precision - scale))
