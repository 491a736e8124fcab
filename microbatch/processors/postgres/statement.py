"""Any statement, once per job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.abc import Query
from psycopg.pq.abc import PGresult

from .columns import at, said
from .flight import Flight
from .parameters import Job, Parameters
from .translate import Bound, Reader, as_result, bind_jobs, count_of, placeholders


class StatementWay:
    """The jobs of one batch, bound to their statement; a job's result is by position, so it is exact."""

    in_order = True  # an UPDATE may leave to the next one what a CHECK then refuses

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        statement: Query,
        jobs: Sequence[Job],
        applied: Callable[[Parameters], Parameters],
    ) -> None:
        self._connection = connection
        self._statement = statement
        bound = bind_jobs(connection, statement, jobs, applied)
        self.refused: dict[int, Any] = {i: job for i, job in enumerate(bound) if isinstance(job, BaseException)}
        self._bound: list[Any] = bound  # a Bound where nothing was refused
        self._reader = Reader(connection)
        self.is_kept = True  # whether its commands may be prepared for the batches to come

    def example(self) -> Bound | None:
        """Any of its jobs that can be sent."""
        return next((bound for i, bound in enumerate(self._bound) if i not in self.refused), None)

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        for i in positions:
            bound: Bound = self._bound[i]
            flight.run(bound.command, bound.parameters, bound.types, bound.formats, once=not self.is_kept)
        return len(positions)

    def size(self, position: int) -> int:
        return sum(len(value) for value in self._bound[position].parameters or () if value is not None)

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        return positions[command]

    def note(self, position: int, error: psycopg.Error) -> psycopg.Error:
        _, names = placeholders(self._connection, self._statement)
        return at(error, said(error, names))

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        results: dict[int, Any] = {}
        types: tuple[int, ...] | None = None
        for i, answer in zip(positions, answers, strict=True):
            results[i] = self._result(answer, self._bound[i].types == types)
            types = self._bound[i].types
        return results

    def _result(self, answer: PGresult, as_before: bool) -> Any:
        try:
            rows = self._reader.rows(answer, as_before)
            return count_of(answer.command_status) if rows is None else as_result(rows)
        except Exception as error:
            return error
