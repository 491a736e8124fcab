"""Jobs as rows of one table: the three ways of `insert_into`, and results out of their answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from microbatch.errors import ProcessorContractError

from .columns import at, found_in, said
from .commands import KeyedCommands, Target, insert_row, merge
from .conversions import recoded
from .errors import is_jobs_own
from .flight import Flight
from .parameters import Job
from .translate import Reader, as_result
from .values import Arrays, Row, RowDumper, array, arrays, is_too_large

Key = tuple[bytes, ...]

_OVERRIDE = "pass overriding='system' to insert_into, so that the jobs may give it"


class Form:
    """What all batches of a table have in common on one connection; used by one batch at a time."""

    def __init__(self, connection: psycopg.Connection[Any], target: Target, drawn: tuple[str, ...] = ()) -> None:
        self.target = target
        self.drawn = drawn
        self.dumper = RowDumper(connection, target.columns, target.json(), target.local())
        self.reader = Reader(connection)
        self.insert = recoded(insert_row(target), connection)
        self.merge = recoded(merge(target), connection)
        self.keyed = KeyedCommands(target, drawn).recoded(connection) if drawn else None


class RowWay:
    """One INSERT per job: what a table takes when nothing else is safe; each answer is its job's by position."""

    def __init__(self, form: Form, jobs: Sequence[Job]) -> None:
        self._form = form
        self.reader = form.reader
        self.in_order = bool(form.target.on_conflict)
        self.refused: dict[int, Any] = {}
        self._rows: list[Row] = []
        for i, job in enumerate(jobs):
            try:
                self._rows.append(form.dumper.row(job))
            except BaseException as error:
                if not is_jobs_own(error):
                    raise
                self.refused[i] = error
                self._rows.append(())

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        for i in positions:
            flight.run(self._form.insert, self._rows[i])
        return len(positions)

    def size(self, position: int) -> int:
        return sum(len(value) for value in self._rows[position] if value is not None)

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[command]

    def note(self, position: int, error: psycopg.Error) -> psycopg.Error:
        names, row = self._whole(position)
        column = said(error, names) or found_in(self._form.target.table, names, row, error)
        remedy = _OVERRIDE if error.sqlstate == "428C9" else ""
        return at(error, column, remedy)

    def _whole(self, position: int) -> tuple[Sequence[str], Row]:
        """The columns that one job alone sends, and their texts."""
        return self._form.target.columns, self._rows[position]

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        return {
            i: as_result(self.reader.rows(answer, number > 0))
            for number, (i, answer) in enumerate(zip(positions, answers, strict=True))
        }


class MergeWay(RowWay):
    """One MERGE for all jobs, which tells each row's number beside it; a job that is tried alone is an INSERT."""

    def __init__(self, form: Form, jobs: Sequence[Job]) -> None:
        super().__init__(form, jobs)
        self._parts: dict[int, list[Sequence[int]]] = {}  # of groups that were sent in several, by the first position

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        if each or len(positions) == 1:
            return super().send(flight, positions)
        parts: list[Sequence[int]] = []
        for part, values in by_size(self._arrays, positions):
            if parts:
                flight.push()
            if values is None:
                super().send(flight, part)
            else:
                _run(flight, self._form.merge, values)
            parts.append(part)
        if len(parts) > 1:
            self._parts[positions[0]] = parts
        return len(parts)

    def _arrays(self, positions: Sequence[int]) -> Arrays | None:
        return arrays(zip(*[self._rows[i] for i in positions], strict=True))

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[0] if len(positions) == 1 else None

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        if len(answers) == len(positions):
            return super().read(positions, answers)
        if len(answers) == 1:
            return self._by_number(positions, answers[0])
        results: dict[int, Any] = {}
        for part, answer in zip(self._parts[positions[0]], answers, strict=True):
            results |= self.read(part, [answer])
        return results

    def _by_number(self, positions: Sequence[int], answer: PGresult) -> dict[int, Any]:
        """A row that a trigger swallowed is absent, and its job has no row."""
        results: dict[int, Any] = dict.fromkeys(positions)
        if answer.status == ExecStatus.TUPLES_OK:
            numbers = [int(answer.get_value(row, 0) or 0) - 1 for row in range(answer.ntuples)]
            if len(set(numbers)) != len(numbers):
                raise ProcessorContractError("a row came back twice")
            rows = self.reader.without(1, answer)
            for number, row in zip(numbers, rows, strict=True):
                results[positions[number]] = row
        return results


class KeyedWay(RowWay):
    """One INSERT for all jobs, each row with a key drawn beforehand; a row finds its job by its key.

    `keys` are given before anything is sent and stay the jobs' own in every attempt. With *careful* a key that is
    there already is left alone, which is what a retry needs.
    """

    def __init__(self, form: Form, jobs: Sequence[Job]) -> None:
        super().__init__(form, jobs)
        self.keys: dict[int, Key] = {}
        self.careful = False
        self.drawn = form.drawn
        self._take(form)

    def _take(self, form: Form) -> None:
        assert form.keyed is not None
        self._form, self._commands, self.reader = form, form.keyed, form.reader
        table = form.target.table
        self.has_deferred = table.deferred
        self.may_change = table.notice.after_insert  # a row of its own, before anybody sees it
        self.is_logged = all(table.column(name).is_logged for name in form.drawn)
        self.beginning = form.keyed.beginning
        self._ready: tuple[Sequence[int], Arrays] | None = None

    def fits(self, positions: Sequence[int]) -> bool:
        """Whether one command carries them. `send`, which is to follow, takes what was put together for that."""
        if len(positions) == 1:
            return not is_too_large(self.size(positions[0]))
        values = self._arrays(positions)
        self._ready = None if values is None else (positions, values)
        return values is not None

    def with_reader(self, reader: Reader) -> KeyedWay:
        """The same, for another connection: the form's own reader may be at work for another batch."""
        other = copy.copy(self)
        other.reader = reader
        return other

    def with_form(self, form: Form) -> KeyedWay:
        """The same jobs with the same keys, on the connection and for the table of *form*."""
        other = copy.copy(self)
        other._take(form)
        return other

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        commands = self._commands
        if each or len(positions) == 1:
            for i in positions:
                flight.run(commands.careful_one if self.careful else commands.one, self._whole_row(i))
            return len(positions)
        count, ready, self._ready = 0, self._ready, None
        is_ready = ready is not None and ready[0] is positions
        for part, values in [ready] if ready and is_ready else by_size(self._arrays, positions):
            if count:
                flight.push()
            if values is None:
                self.send(flight, part, each=True)
            else:
                _run(flight, commands.careful_all if self.careful else commands.all, values)
            count += 1
        return count

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[0] if len(positions) == 1 else None

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        """By key. Jobs whose key was there already are missing, if that is allowed."""
        results: dict[int, Any] = {}
        for answer in answers:
            results |= self.found(positions, answer)
        if len(results) != len(positions) and not self.careful:
            raise ProcessorContractError(f"{len(results)} rows came back for {len(positions)} keys")
        return results

    def _whole(self, position: int) -> tuple[Sequence[str], Row]:
        return (*self._form.drawn, *self._form.target.columns), self._whole_row(position)

    def look_up(self, flight: Flight, positions: Sequence[int]) -> None:
        """Queue the question which of the keys are in the table."""
        columns = list(zip(*[self._whole_row(i) for i in positions], strict=True))
        _run(flight, self._commands.look_up, [array(columns[i]) for i in self._commands.key])

    def compare(self, flight: Flight, positions: Sequence[int]) -> None:
        """Queue the count of rows that hold exactly what the jobs gave; it may take several commands."""
        for part, values in by_size(self._arrays, positions):
            if values is None:
                values = [array((text,)) for text in self._whole_row(part[0])]
            _run(flight, self._commands.compare, values)

    def found(self, positions: Sequence[int], answer: PGresult) -> dict[int, Any]:
        """The rows of *answer*, by job."""
        owners = {self.keys[i]: i for i in positions}
        columns = range(len(self._form.drawn))
        get = answer.get_value
        keys = [tuple([get(row, column) or b"" for column in columns]) for row in range(answer.ntuples)]
        if strangers := set(keys) - owners.keys():
            raise ProcessorContractError(f"{len(strangers)} rows came back with keys that are no job's")
        if self._form.target.returning is None:
            return {owners[key]: None for key in keys}
        rows = self.reader.without(len(columns), answer)
        return {owners[key]: row for key, row in zip(keys, rows, strict=True)}

    def _whole_row(self, i: int) -> Row:
        return [*self.keys[i], *self._rows[i]]

    def _arrays(self, positions: Sequence[int]) -> Arrays | None:
        keys = zip(*[self.keys[i] for i in positions], strict=True)
        return arrays(chain(keys, zip(*[self._rows[i] for i in positions], strict=True)))


def by_size(
    arrays_of: Callable[[Sequence[int]], Arrays | None], positions: Sequence[int]
) -> Iterator[tuple[Sequence[int], Arrays | None]]:
    """*positions* in as few halves as one command can carry each, with its arrays; a single one has none."""
    values = arrays_of(positions) if len(positions) > 1 else None
    if values is not None or len(positions) == 1:
        yield positions, values
        return
    middle = len(positions) // 2
    yield from by_size(arrays_of, positions[:middle])
    yield from by_size(arrays_of, positions[middle:])


def _run(flight: Flight, command: bytes, values: Arrays) -> None:
    flight.run(command, [data for data, _ in values], formats=[form for _, form in values])
