"""Jobs as rows of text: what PostgreSQL would read from literals of unknown type.

The same bytes feed an array with a row per job and the single row of a job that is tried alone, so that a value means
the same in both. Whatever cannot be sent is found here, before anything is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.json import Jsonb

from .parameters import Job, parameters_of

Row: TypeAlias = Sequence[Buffer | None]


class RowDumper:
    """Turns jobs into rows for *columns*; those of *json* take dicts and lists as JSON."""

    def __init__(self, connection: psycopg.Connection[Any], columns: Sequence[str], json: frozenset[str]) -> None:
        self._transformer = Transformer.from_context(connection)
        self._columns = tuple(columns)
        self._formats = [PyFormat.TEXT] * len(columns)
        self._json = [i for i, column in enumerate(columns) if column in json]

    def row(self, job: Job) -> Row:
        """One text per column, None for NULL.

        Raises:
            Exception: the job lacks a column, or a value cannot be sent; whatever psycopg raises for it.
        """
        values = self._values(job)
        for i in self._json:
            if isinstance(values[i], (dict, list)):
                values[i] = Jsonb(values[i])
        return self._transformer.dump_sequence(values, self._formats)

    def _values(self, job: Job) -> list[Any]:
        parameters = job if type(job) is dict else parameters_of(job)
        if isinstance(parameters, Mapping):
            try:
                return [parameters[column] for column in self._columns]
            except KeyError as error:
                raise psycopg.ProgrammingError(
                    f"the job lacks column {error.args[0]!r}; a job gives every column of insert_into, None for NULL"
                ) from None
        if len(parameters) != len(self._columns):
            raise psycopg.ProgrammingError(
                f"the job has {len(parameters)} values for {len(self._columns)} columns: {', '.join(self._columns)}"
            )
        return list(parameters)


def array(texts: Sequence[Buffer | None]) -> bytes:
    """A literal of type text[]."""
    try:
        # Nearly always: no NULL, and nothing in the texts that has to be escaped.
        body = b'","'.join(texts)  # type: ignore[arg-type]
        if b"\\" not in body and body.count(b'"') == 2 * (len(texts) - 1):
            return b'{"%s"}' % body
    except TypeError:
        pass
    return b"{%s}" % b",".join([b"NULL" if text is None else _quoted(text) for text in texts])


def _quoted(text: Buffer) -> bytes:
    data = bytes(text)
    if b"\\" in data or b'"' in data:
        data = data.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return b'"%s"' % data
