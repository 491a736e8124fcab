"""From a job to what libpq sends, and from its answer to rows: psycopg's conversions without its cursor.

The one file that touches private pieces of psycopg: `_queries.PostgresQuery`, which reads `%(name)s`, and
methods of `adapt.Transformer` that its documentation leaves out. Where a psycopg has moved them, `is_supported`
is False and the portable way with `executemany` takes over; tests/test_translate.py notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
from psycopg import pq
from psycopg.abc import Buffer, Query
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from .columns import at
from .conversions import context_of, encoding_of, named, sendable, text_of
from .errors import is_jobs_own
from .parameters import Job, Parameters, parameters_of

try:
    from psycopg._queries import PostgresQuery
except ImportError:  # pragma: no cover
    PostgresQuery = None  # type: ignore[assignment, misc]

_QUERY_NEEDS = ("convert", "dump", "query", "params", "types", "formats")
_TRANSFORMER_NEEDS = ("from_context", "set_pgresult", "load_rows", "dump_sequence", "get_loader")

# What may write several rows, or none; an INSERT writes what it is given.
_COUNTED = (b"UPDATE", b"DELETE", b"MERGE")
_BYTEA_ARRAY = 1001  # the type's number

Row: TypeAlias = dict[str, Any]


def is_supported(connection: psycopg.Connection[Any]) -> bool:
    """Whether jobs can be sent past psycopg's cursor; not where the user asked for one that binds otherwise."""
    if not issubclass(connection.cursor_factory, psycopg.Cursor) or issubclass(
        connection.cursor_factory, (psycopg.ClientCursor, psycopg.RawCursor)
    ):
        return False
    return all(hasattr(PostgresQuery, name) for name in _QUERY_NEEDS) and all(
        hasattr(Transformer, name) for name in _TRANSFORMER_NEEDS
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """One job, ready to be sent."""

    command: bytes
    parameters: Sequence[Buffer | None]
    types: tuple[int, ...]
    formats: Sequence[pq.Format]


def bind_jobs(
    connection: psycopg.Connection[Any],
    statement: Query,
    jobs: Iterable[Job],
    applied: Callable[[Parameters], Parameters] | None = None,
) -> list[Bound | BaseException]:
    """Each job as *statement* with its values, or the error that says why it cannot be sent.

    *applied* gets the parameters of each job beforehand, and may change them.
    """
    transformer = Transformer.from_context(context_of(connection))
    query = PostgresQuery(transformer)
    statement = sendable(statement, connection)
    bind: Callable[[Query, Any], None] = query.convert

    def next_ones(statement: Query, values: Any) -> None:
        query.dump(values)

    bound: list[Bound | BaseException] = []
    for job in jobs:
        try:
            parameters = parameters_of(job)
            if applied is not None:
                parameters = applied(parameters)
            try:
                bind(statement, parameters)
            except TypeError as error:
                raise _by_position(error, parameters) from None
            bound.append(Bound(query.query, query.params or (), query.types, query.formats or ()))
            bind = next_ones
        except BaseException as error:
            if not is_jobs_own(error):
                raise
            column = _culprit(connection, statement, transformer.dump_sequence, job)
            bound.append(at(named(error, connection), column))
    return bound


def _culprit(
    connection: psycopg.Connection[Any], statement: Query, dump: Callable[..., object], job: Job
) -> str | None:
    """The first placeholder for which *job* has no value, or one that cannot be sent."""
    name = None
    try:
        _, names = placeholders(connection, statement)
        parameters = parameters_of(job)
        if isinstance(parameters, Mapping):
            for name in names:
                dump([parameters[name]], [PyFormat.AUTO])
    except BaseException as error:
        if not is_jobs_own(error):
            raise
        return name
    return None


class _Names(Mapping[str, None]):
    """Takes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> None:
        self.asked.append(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1


def placeholders(connection: psycopg.Connection[Any], statement: Query) -> tuple[bytes, tuple[str, ...]]:
    """*statement* as it is sent, and the names of its parameters in their order; no names where they are `%s`."""
    query, names = PostgresQuery(Transformer.from_context(connection)), _Names()
    try:
        query.convert(sendable(statement, connection), names)
    except TypeError:  # positional ones take no mapping
        return query.query, ()
    return query.query, tuple(names.asked)


def columns_of(answer: PGresult, encoding: str) -> list[str]:
    """The names of the columns of *answer*. Raises `ValueError` if two are the same: a dict would lose one of them."""
    return once([(answer.fname(i) or b"").decode(encoding, "replace") for i in range(answer.nfields)])


def once(names: Sequence[str]) -> list[str]:
    """*names* as a list. Raises `ValueError` if two are the same."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(
            f"two result columns are named {twice!r}, and a result, a dict, holds one of them: name what comes back"
            " one by one, and apart (RETURNING a.id, b.id AS b_id)"
        )
    return list(names)


def _by_position(error: TypeError, parameters: Any) -> TypeError:
    """What to say of a job with names and a statement without; *error* where it is about something else."""
    if not isinstance(parameters, Mapping) or "positional placeholders" not in str(error):
        return error
    return TypeError(
        "a job that has names is read by name, and the placeholders %s have none: write %(name)s in the statement,"
        " or submit a plain tuple in the order of the placeholders"
    )


class Reader:
    """Reads answers as dicts, with the loaders of *connection*.

    A value that cannot be loaded, such as a date beyond the year 9999, is handed out as the server's text: the row may
    be committed already, and whether a job is valid is for the server to say.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._transformer = Transformer.from_context(context_of(connection))
        self._encoding = encoding_of(connection)
        self._columns: list[tuple[bytes | None, int]] | None = None
        self._names: list[str] = []
        self._skipped = 0

    def rows(self, answer: PGresult, as_before: bool = False) -> list[Row] | None:
        """The rows of *answer*, None where its command returns none at all.

        *as_before*: the answer before this one was to the same command in the same flight, and has the same columns.

        Raises:
            ValueError: two columns have one name.
        """
        if answer.status != ExecStatus.TUPLES_OK:
            return None
        if as_before and self._columns is not None and len(self._columns) == answer.nfields:
            self._transformer.set_pgresult(answer, set_loaders=False)
        else:
            self._look_at(answer, 0)
        return self._rows(answer)

    def without(self, skipped: int, answer: PGresult) -> list[Row]:
        """The rows of *answer* without the first *skipped* columns."""
        self._look_at(answer, skipped)
        return self._rows(answer)

    def _rows(self, answer: PGresult) -> list[Row]:
        try:
            return self._transformer.load_rows(0, answer.ntuples, self._row)
        except Exception:
            return [self._one(answer, number) for number in range(answer.ntuples)]

    def _look_at(self, answer: PGresult, skipped: int) -> None:
        # Compared and not assumed: a table may change between two answers to the same command.
        columns = [(answer.fname(i), answer.ftype(i)) for i in range(answer.nfields)]
        if columns == self._columns and skipped == self._skipped:
            self._transformer.set_pgresult(answer, set_loaders=False)
            return
        self._columns = None  # until everything fits: an interruption in between leaves nothing half-known
        if any(number == _BYTEA_ARRAY for _, number in columns):
            self._transformer = Transformer.from_context(context_of(self._connection, loads_bytes=True))
        self._transformer.set_pgresult(answer)
        self._skipped = skipped
        self._names = once([(name or b"").decode(self._encoding, "surrogateescape") for name, _ in columns[skipped:]])
        self._columns = columns

    def _one(self, answer: PGresult, number: int) -> Row:
        try:
            return self._transformer.load_rows(number, number + 1, self._row)[0]
        except Exception:
            return self._row([self._value(answer, number, i) for i in range(answer.nfields)])

    def _value(self, answer: PGresult, row: int, column: int) -> Any:
        data = answer.get_value(row, column)
        if data is None:
            return None
        try:
            return self._transformer.get_loader(answer.ftype(column), pq.Format(answer.fformat(column))).load(data)
        except Exception:
            return text_of(data, self._encoding)

    def _row(self, values: Sequence[Any]) -> Row:
        return dict(zip(self._names, values[self._skipped :] if self._skipped else values, strict=True))


def count_of(tag: bytes | None) -> int | None:
    """How many rows a command without RETURNING wrote, from its *tag*; None for others than the three."""
    verb, _, count = (tag or b"").partition(b" ")
    return int(count) if verb in _COUNTED else None


def as_result(rows: list[Row] | None) -> Any:
    """A job's result: None without a row, the row, or the list where there are several."""
    if not rows:
        return None
    return rows[0] if len(rows) == 1 else rows
