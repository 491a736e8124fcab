"""The processor: a row and its entry in the status store, by one statement in the batch's own transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.columns import column_of, renamed
from microbatch.protocols import Batch

from .failures import KEY_REUSED, Failure, NotCompleted
from .table import Table

COMPLETED, FAILED = "completed", "failed"
STATUS_TABLE = "microbatch_status"

_REUSED = Failure(KEY_REUSED, "Another body was sent under this Idempotency-Key.")


@dataclass(frozen=True, slots=True)
class Submission:
    """What the batcher gets: *values* in the order of the table's given columns, as the server reads them."""

    id: str
    columns: tuple[str, ...]
    values: tuple[str | None, ...]
    key: bytes | None = None
    fingerprint: bytes | None = None

    def row(self) -> dict[str, str | None]:
        """The values by column."""
        return dict(zip(self.columns, self.values, strict=True))

    def parameters(self) -> dict[str, Any]:
        named = {f"v{number}": value for number, value in enumerate(self.values)}
        return {"id": self.id, "key": self.key, "fingerprint": self.fingerprint, **named}


class RowWriter(PostgresProcessor):
    """Takes submissions, and returns rows as JSON texts; safe to call from several threads at once."""

    def process(self, batch: Batch[Any], /) -> list[Any]:
        """Write the rows of *batch*; see `PostgresProcessor`."""
        parameters = [submission.parameters() for submission in batch]
        translated = Batch(
            parameters, id=batch.id, attempt=batch.attempt, trigger=batch.trigger, deadline=batch.deadline
        )
        answers = super().process(translated)
        return [_result(answer, submission) for answer, submission in zip(answers, batch, strict=True)]

    def is_retryable(self, error: BaseException) -> bool:
        """See `PostgresProcessor`; also where another transaction has written the same entry meanwhile."""
        if isinstance(error, psycopg.errors.UniqueViolation) and error.diag.table_name == STATUS_TABLE:
            return True  # the next attempt sees that entry
        return super().is_retryable(error)


def _result(answer: Any, submission: Submission) -> str | Exception:
    if isinstance(answer, Exception):
        columns = {f"v{number}": column for number, column in enumerate(submission.columns)}
        if (column := columns.get(column_of(answer) or "")) is not None:
            renamed(answer, column)
        return answer
    if answer["status"] == COMPLETED:
        return str(answer["result"])
    return NotCompleted(Failure(**json.loads(answer["result"])))


def plain_statement(table: Table) -> sql.Composable:
    """Writes a row and returns it, for a store in memory."""
    return sql.SQL(
        "WITH written AS (INSERT INTO {table} ({columns}) VALUES ({values}) RETURNING {row})"
        " SELECT {completed} AS status, row_to_json(written)::text AS result FROM written"
    ).format(**_parts(table))


def storing_statement(table: Table, store: sql.Composable, kept: float) -> sql.Composable:
    """Writes a row and its entry in *store*, unless the store knows the job or its key; *kept* in seconds.

    The unique index on the key, and that on the id, see to it that two transactions at once cannot both write: the
    second one fails with its whole statement, and finds the entry when it is tried again. Each job clears away two
    old entries, so that the store does not grow with time.
    """
    return sql.SQL(
        """
        WITH known AS (
            SELECT id, status, result, fingerprint FROM {store}
            WHERE id = %(id)s::text OR key = %(key)s::bytea ORDER BY id = %(id)s::text DESC LIMIT 1
        ), written AS (
            INSERT INTO {table} ({columns}) SELECT {values} WHERE NOT EXISTS (SELECT FROM known) RETURNING {row}
        ), entry AS (
            INSERT INTO {store} (id, key, fingerprint, status, result)
            SELECT %(id)s::text, %(key)s::bytea, %(fingerprint)s::bytea, {completed}, row_to_json(written) FROM written
            UNION ALL
            SELECT %(id)s::text, NULL, NULL,
                   CASE WHEN fingerprint = %(fingerprint)s::bytea THEN status ELSE {failed} END,
                   CASE WHEN fingerprint = %(fingerprint)s::bytea THEN result ELSE {reused}::json END
            FROM known WHERE id <> %(id)s::text
            RETURNING status, result
        ), cleared AS (
            DELETE FROM {store} WHERE id IN (
                SELECT id FROM {store} WHERE at < now() - make_interval(secs => {kept})
                ORDER BY at LIMIT 2 FOR UPDATE SKIP LOCKED
            )
        )
        SELECT status, result::text FROM entry
        UNION ALL SELECT status, result::text FROM known WHERE id = %(id)s::text"""
    ).format(
        **_parts(table),
        store=store,
        failed=sql.Literal(FAILED),
        reused=sql.Literal(json.dumps(_REUSED.as_json())),
        kept=sql.Literal(float(kept)),
    )


def _parts(table: Table) -> dict[str, sql.Composable]:
    return {
        "table": table.name,
        "columns": sql.SQL(", ").join(map(sql.Identifier, table.given)),
        "values": sql.SQL(", ").join(
            sql.SQL("{}::{}").format(sql.Placeholder(f"v{number}"), sql.SQL(column.type))
            for number, column in enumerate(table.given.values())
        ),
        "row": _row(table),
        "completed": sql.Literal(COMPLETED),
    }


def _row(table: Table) -> sql.Composable:
    if not any(column.base == "timestamp" for column in table.all):
        return sql.SQL("*")
    # A timestamp without a zone is what the server's clock shows in the session's zone; with it, it is an instant.
    with_zone = sql.SQL("{0} AT TIME ZONE current_setting('TimeZone') AS {0}")
    return sql.SQL(", ").join(
        with_zone.format(sql.Identifier(column.name)) if column.base == "timestamp" else sql.Identifier(column.name)
        for column in table.all
    )
