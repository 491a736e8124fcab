"""Jobs as rows of text: what PostgreSQL would read from literals of unknown type.

The same bytes feed an array with an item per job and the single row of a job that is tried alone, so that a value
means the same in both. Whatever cannot be sent is found here, before anything is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Any, TypeAlias

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format
from psycopg.types.range import Range

from .columns import at
from .conversions import context_of, named, zone_of
from .documents import Documents
from .parameters import Job, parameters_of

Row: TypeAlias = Sequence[Buffer | None]
Arrays: TypeAlias = list[tuple[bytes, Format]]

_LARGEST = 1 << 28  # bytes in the arrays of one command
_FEW = 16  # rows, which are looked at before they are put together
_TEXT = 25  # the type's number
_HEADER = struct.Struct("!iiIii")  # dimensions, whether NULL may come, type of the items, their number, the first index
_LENGTH = struct.Struct("!i")
_NULL = _LENGTH.pack(-1)
_LENGTHS = tuple(map(_LENGTH.pack, range(1024)))


class RowDumper:
    """Turns jobs into rows for *columns*.

    Those of *json* are JSON, or an array of it; those of *local* have no time zone.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        columns: Sequence[str],
        json: Mapping[str, bool],
        local: frozenset[str] = frozenset(),
    ) -> None:
        self._connection = connection
        self._transformer = Transformer.from_context(context_of(connection))
        self._columns = tuple(columns)
        self._formats = [PyFormat.TEXT] * len(columns)
        self._local = [i for i, column in enumerate(columns) if column in local]
        self._zone = zone_of(connection)
        self._json = [(i, json[column]) for i, column in enumerate(columns) if column in json]
        self._documents = Documents(connection.adapters)

    def row(self, job: Job) -> Row:
        """One text per column, None for NULL.

        Raises:
            Exception: the job lacks a column, or a value cannot be sent; whatever psycopg raises for it.
        """
        values = self._values(job)
        try:
            for i, is_array in self._json:
                values[i] = self._documents.value(values[i], is_array)
            for i in self._local:
                values[i] = _local(values[i], self._zone)
        except Exception as error:
            at(error, self._columns[i])
            raise
        try:
            return self._transformer.dump_sequence(values, self._formats)
        except UnicodeEncodeError as error:
            raise at(named(error, self._connection), self._culprit(values)) from None
        except Exception as error:
            at(error, self._culprit(values))
            raise

    def _culprit(self, values: Sequence[Any]) -> str | None:
        for column, value in zip(self._columns, values, strict=True):
            try:
                self._transformer.dump_sequence([value], self._formats[:1])
            except Exception:
                return column
        return None

    def _values(self, job: Job) -> list[Any]:
        parameters = job if type(job) is dict else parameters_of(job)
        if isinstance(parameters, (dict, Mapping)):  # a dict is known sooner so
            try:
                return [parameters[column] for column in self._columns]
            except KeyError as error:
                lacking = psycopg.ProgrammingError(
                    f"the job lacks column {error.args[0]!r}; a job gives every column of insert_into, None for NULL"
                )
                raise at(lacking, str(error.args[0])) from None
        if len(parameters) != len(self._columns):
            raise psycopg.ProgrammingError(
                f"the job has {len(parameters)} values for {len(self._columns)} columns: {', '.join(self._columns)}"
            )
        return list(parameters)


def arrays(columns: Iterable[Sequence[Buffer | None]]) -> Arrays | None:
    """An array for each of *columns*; None if together they are more than a command should carry.

    The server takes a message, and a value, of up to 1 GB.
    """
    made: Arrays = []
    size = 0
    for column in columns:
        if len(column) <= _FEW and is_too_large(size + sum(map(len, filter(None, column)))):
            return None  # seen without a copy
        made.append(array(column))
        size += len(made[-1][0])
        if is_too_large(size):
            return None
    return made


def is_too_large(size: int) -> bool:
    """Whether one command should not carry so many bytes of values."""
    return size > _LARGEST


def _local(value: Any, zone: tzinfo | None) -> Any:
    """*value* without a time zone, which the column's type would pass over, and the instant be another one."""
    if isinstance(value, list):
        return [_local(item, zone) for item in value]
    if isinstance(value, Range) and any(map(_is_instant, (value.lower, value.upper))):
        raise psycopg.DataError("a range of times with a time zone does not go into a range without; give naive ones")
    if not _is_instant(value):
        return value
    if zone is None:
        raise psycopg.DataError("Python does not know the session's time zone: give the time without one, or as text")
    return value.astimezone(zone).replace(tzinfo=None)


def _is_instant(value: Any) -> bool:
    return isinstance(value, datetime) and value.utcoffset() is not None


def array(texts: Sequence[Buffer | None]) -> tuple[bytes, Format]:
    """A value of type text[].

    As text where it reads the same everywhere. Else in binary: a NULL as text is a word, which array_nulls may take for
    text, and a byte of a character looks like a backslash in some encodings.
    """
    try:
        body = b'","'.join(texts)  # type: ignore[arg-type]
        if b"\\" not in body and body.count(b'"') == 2 * (len(texts) - 1):
            return b'{"%s"}' % body, Format.TEXT
    except TypeError:
        pass
    return _HEADER.pack(1, 1, _TEXT, len(texts), 1) + _items(texts), Format.BINARY


def _items(texts: Sequence[Buffer | None]) -> bytes:
    try:
        return b"".join([_NULL if text is None else _LENGTHS[len(text)] + text for text in texts])
    except IndexError:
        return b"".join([_NULL if text is None else _LENGTH.pack(len(text)) + text for text in texts])
