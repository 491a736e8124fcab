"""What every way to write jobs has in common: commands for some of them, and results out of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import psycopg
from psycopg.pq.abc import PGresult

from .flight import Flight


class Way(Protocol):
    """One batch, made ready for the server.

    Attributes:
        refused: the jobs that cannot be sent at all, by position, with the error that says why; a lazy value may
            raise anything, so it need not be an `Exception`.
        in_order: whether a job may depend on what the ones before it have written, so that no job may be tried
            before an earlier one.
    """

    refused: dict[int, Any]
    in_order: bool

    def send(self, flight: Flight, positions: Sequence[int], *, each: bool = False) -> int:
        """Queue the commands that write the jobs at *positions*, one command per job if *each*; returns how many."""

    def size(self, position: int) -> int:
        """How many bytes the values of this job are on their way."""

    def culprit(self, positions: Sequence[int], command: int) -> int | None:
        """Whose command the one with this number is; None if it is several jobs'."""

    def note(self, position: int, error: psycopg.Error) -> psycopg.Error:
        """*error*, which the server gave for this job alone, with the column that it is about."""

    def read(self, positions: Sequence[int], answers: Sequence[PGresult]) -> dict[int, Any]:
        """The result of each job; an exception where the row cannot be read."""
