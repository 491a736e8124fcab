"""Run the statement once per job and read one result per job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.abc import Query
from psycopg.rows import dict_row

from .parameters import Parameters


def run_for_each(connection: psycopg.Connection[Any], statement: Query, parameters: Sequence[Parameters]) -> list[Any]:
    """One result per job, by position: the statement's row, None without one, a list where there are several.

    Call it inside a transaction: an error in the middle leaves the statements before it executed.
    """
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.executemany(statement, parameters, returning=True)
        results = _read_sets(cursor)
    if len(results) != len(parameters):
        # No ProcessorContractError: that one says that nobody knows, and this is rolled back.
        raise psycopg.ProgrammingError(
            f"{len(results)} results for {len(parameters)} jobs: the statement must be a single command"
        )
    return results


def _read_sets(cursor: psycopg.Cursor[dict[str, Any]]) -> list[Any]:
    # Never flattened: a job whose set is empty (ON CONFLICT DO NOTHING) would give its place to the next one.
    results = [_result_of(cursor)]
    while cursor.nextset():
        results.append(_result_of(cursor))
    return results


def _result_of(cursor: psycopg.Cursor[dict[str, Any]]) -> Any:
    if cursor.rownumber is None:  # the statement returns no rows at all
        return None
    rows = cursor.fetchall()
    if len(rows) > 1:
        return rows
    return rows[0] if rows else None
