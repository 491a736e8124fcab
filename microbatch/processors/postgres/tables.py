"""Jobs as rows of one table: the commands of the three ways of `insert_into`, and results out of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from microbatch.errors import ProcessorContractError

from .catalogue import Table, quoted
from .flight import Flight
from .parameters import Job
from .translate import Reader, as_result
from .values import Row, RowDumper, array

Key = tuple[str, ...]
_ALIAS = b"microbatch_t"


@dataclass(frozen=True, slots=True)
class Target:
    """What `insert_into` was called with, and the table it found; *on_conflict* is SQL or empty."""

    table: Table
    columns: tuple[str, ...]
    returning: Literal["*"] | tuple[str, ...] | None
    on_conflict: bytes = b""

    def back(self, alias: bytes = b"") -> list[bytes]:
        """What comes back of a row, as SQL."""
        if self.returning is None:
            return []
        prefix = alias and alias + b"."
        return [prefix + b"*"] if self.returning == "*" else [prefix + quoted(name) for name in self.returning]

    def json(self) -> frozenset[str]:
        return frozenset(column.name for column in self.table.columns if column.is_json)


class TableWay:
    """What the ways have in common: rows of text, refused jobs, and a reader."""

    def __init__(self, connection: psycopg.Connection[Any], target: Target, jobs: Sequence[Job]) -> None:
        self._target = target
        self._dumper = RowDumper(connection, target.columns, target.json())
        self._reader = Reader(connection)
        self.refused: dict[int, Exception] = {}
        self._rows: list[Row] = []
        for i, job in enumerate(jobs):
            try:
                self._rows.append(self._dumper.row(job))
            except Exception as error:
                self.refused[i] = error
                self._rows.append(())

    def _types(self, names: Sequence[str]) -> list[bytes]:
        return [self._target.table.column(name).type.encode() for name in names]

    def _sources(self, names: Sequence[str]) -> tuple[bytes, bytes, bytes]:
        """For a statement that takes an array per column: the casts, the parameters, the aliases."""
        aliases = [b"c%d" % i for i in range(len(names))]
        casts = [b"%s::%s" % pair for pair in zip(aliases, self._types(names), strict=True)]
        parameters = [b"$%d::text[]" % (i + 1) for i in range(len(names))]
        return b", ".join(casts), b", ".join(parameters), b", ".join(aliases)


class RowWay(TableWay):
    """One INSERT per job: what a table takes when nothing else is safe; each answer is its job's by position."""

    def __init__(self, connection: psycopg.Connection[Any], target: Target, jobs: Sequence[Job]) -> None:
        super().__init__(connection, target, jobs)
        self._insert = insert_values(target) + target.on_conflict
        if back := target.back():
            self._insert += b" RETURNING " + b", ".join(back)

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        for i in positions:
            flight.run(self._insert, self._rows[i])
        return len(positions)

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[command]

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        return {i: self._result(answer) for i, answer in zip(positions, answers, strict=True)}

    def _result(self, answer: PGresult) -> Any:
        try:
            return as_result(self._reader.rows(answer, self._insert))
        except Exception as error:
            return error


class MergeWay(RowWay):
    """One MERGE for all jobs, which tells each row's number beside it; a job that is tried alone is an INSERT."""

    def __init__(self, connection: psycopg.Connection[Any], target: Target, jobs: Sequence[Job]) -> None:
        super().__init__(connection, target, jobs)
        casts, parameters, aliases = self._sources(target.columns)
        columns = _listed(target.columns)
        self._merge = (
            b"MERGE INTO %s AS microbatch_t USING (SELECT %s, microbatch_n FROM unnest(%s)"
            b" WITH ORDINALITY microbatch_u(%s, microbatch_n)) AS microbatch_s(%s, microbatch_n)"
            b" ON false WHEN NOT MATCHED THEN INSERT (%s) VALUES (%s)"
        ) % (
            *(target.table.identifier(), casts, parameters, aliases, aliases, columns),
            b", ".join(b"microbatch_s.c%d" % i for i in range(len(target.columns))),
        )
        if back := target.back(_ALIAS):
            self._merge += b" RETURNING microbatch_s.microbatch_n, " + b", ".join(back)

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        if each or len(positions) == 1:
            return super().send(flight, positions)
        rows = [self._rows[i] for i in positions]
        flight.run(self._merge, [array(column) for column in zip(*rows, strict=True)])
        return 1

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[0] if len(positions) == 1 else None

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        if len(answers) == len(positions):
            return super().read(positions, answers)
        return self._by_number(positions, answers[0])

    def _by_number(self, positions: Sequence[int], answer: PGresult) -> dict[int, Any]:
        """A row that a trigger swallowed is absent, and its job has no row."""
        results: dict[int, Any] = dict.fromkeys(positions)
        if answer.status == ExecStatus.TUPLES_OK:
            numbers = [int(answer.get_value(row, 0) or 0) - 1 for row in range(answer.ntuples)]
            _check_distinct(numbers)
            rows = self._reader.each(answer, self._merge, skipped=1)
            for number, row in zip(numbers, rows, strict=True):
                results[positions[number]] = row
        return results


class KeyedWay(TableWay):
    """One INSERT for all jobs, each row with a key drawn beforehand; a row finds its job by its key.

    `keys` are given before anything is sent and stay the jobs' own in every attempt. With *careful* a key that is
    there already is left alone, which is what a retry needs.
    """

    def __init__(self, connection: psycopg.Connection[Any], target: Target, drawn: tuple[str, ...], jobs: Any) -> None:
        super().__init__(connection, target, jobs)
        self.keys: dict[int, Key] = {}
        self.careful = False
        self._drawn = drawn
        self._names = (*drawn, *target.columns)
        self._key = _listed(drawn)
        overriding = any(target.table.column(name).identity == "a" for name in drawn)
        casts, parameters, aliases = self._sources(self._names)
        into = b"INSERT INTO %s AS microbatch_t (%s)%s" % (
            *(target.table.identifier(), _listed(self._names)),
            b" OVERRIDING SYSTEM VALUE" if overriding else b"",
        )
        self._all = b"%s SELECT %s FROM unnest(%s) AS microbatch_s(%s)" % (into, casts, parameters, aliases)
        self._one = b"%s VALUES (%s)" % (into, b", ".join(b"$%d" % (i + 1) for i in range(len(self._names))))
        arbiter = _listed([column.name for column in target.table.key])
        self._unless_there = b" ON CONFLICT (%s) DO NOTHING" % arbiter
        texts = [b"%s.%s::text" % (_ALIAS, quoted(name)) for name in drawn]
        self._back = b", ".join([*texts, *target.back(_ALIAS)])
        self.has_deferred = target.table.deferred

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        rows = [self._row(i) for i in positions]
        tail = (self._unless_there if self.careful else b"") + b" RETURNING " + self._back
        if each or len(rows) == 1:
            for row in rows:
                flight.run(self._one + tail, row)
            return len(rows)
        flight.run(self._all + tail, [array(column) for column in zip(*rows, strict=True)])
        return 1

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[0] if len(positions) == 1 else None

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        """By key. Jobs whose key was there already are missing, if that is allowed."""
        results: dict[int, Any] = {}
        for answer in answers:
            results |= self._by_key(positions, answer)
        if len(results) != len(positions) and not self.careful:
            raise ProcessorContractError(f"{len(results)} rows came back for {len(positions)} keys")
        return results

    def look_up(self, flight: Flight, positions: Sequence[int]) -> None:
        """Queue the question which of the keys are in the table."""
        # A child of a plain table may hold a stranger's row with the same key.
        only = b"" if self._target.table.kind == "p" else b"ONLY "
        flight.run(
            b"SELECT %s FROM %s%s AS microbatch_t WHERE (%s) IN (SELECT %s FROM unnest(%s) AS microbatch_s(%s))"
            % (self._back, only, self._target.table.identifier(), self._key, *self._sources(self._drawn)),
            [array(text.encode() for text in texts) for texts in zip(*(self.keys[i] for i in positions), strict=True)],
        )

    def found(self, positions: Sequence[int], answer: PGresult) -> dict[int, Any]:
        """The rows that `look_up` found, by job."""
        return self._by_key(positions, answer)

    def compare(self, flight: Flight, positions: Sequence[int]) -> None:
        """Queue the count of rows that hold exactly what the jobs gave."""
        table = self._target.table
        only = b"" if table.kind == "p" else b"ONLY "
        _, parameters, aliases = self._sources(self._names)
        same = b" AND ".join(
            b"t.%s::text IS NOT DISTINCT FROM s.c%d::%s::text"
            % (quoted(name), i, table.column(name).full_type.encode())
            for i, name in enumerate(self._names)
        )
        rows = [self._row(i) for i in positions]
        flight.run(
            b"SELECT count(*) FROM %s%s AS t, unnest(%s) AS s(%s) WHERE %s"
            % (only, table.identifier(), parameters, aliases, same),
            [array(column) for column in zip(*rows, strict=True)],
        )

    def _row(self, i: int) -> Row:
        return [*(text.encode() for text in self.keys[i]), *self._rows[i]]

    def _by_key(self, positions: Sequence[int], answer: PGresult) -> dict[int, Any]:
        owners = {self.keys[i]: i for i in positions}
        width = len(self._drawn)
        keys = [
            tuple((answer.get_value(row, column) or b"").decode() for column in range(width))
            for row in range(answer.ntuples)
        ]
        if strangers := set(keys) - set(owners):
            raise ProcessorContractError(f"{len(strangers)} rows came back with keys that are no job's")
        if self._target.returning is None:
            return {owners[key]: None for key in keys}
        # It may be committed already, so what psycopg cannot load is handed out as text.
        rows = self._reader.each(answer, self._back, skipped=width, as_text=True)
        return {owners[key]: row for key, row in zip(keys, rows, strict=True)}


def insert_values(target: Target) -> bytes:
    """INSERT of one row; its parameters are of unknown type."""
    return b"INSERT INTO %s (%s) VALUES (%s)" % (
        *(target.table.identifier(), _listed(target.columns)),
        b", ".join(b"$%d" % (i + 1) for i in range(len(target.columns))),
    )


def _listed(names: Sequence[str]) -> bytes:
    return b", ".join(map(quoted, names))


def _check_distinct(numbers: list[int]) -> None:
    if len(set(numbers)) != len(numbers):
        raise ProcessorContractError("a row came back twice")
