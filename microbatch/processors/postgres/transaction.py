"""Commit a batch and say honestly what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from microbatch.errors import OutcomeUnknown, ProcessorContractError

from .sqlstate import is_refusal

Work = Callable[[], list[Any]]


def commit(connection: psycopg.Connection[Any], work: Work, batch_id: str) -> list[Any]:
    """Do *work* in a transaction of its own, or in a savepoint where the connection is inside one already.

    Raises:
        OutcomeUnknown: COMMIT was called and its answer is missing.
        Exception: any other error means that nothing was written.
    """
    _check_usable(connection)
    outside = _status(connection) == TransactionStatus.IDLE
    committing = False
    try:
        with connection.transaction():
            results = work()
            _check_open(connection, batch_id)
            # Set before the block ends, which is what sends COMMIT: from here on a failure proves nothing.
            # A savepoint is the outer transaction's to commit.
            committing = outside
        _check_answered(connection, outside)
    except BaseException as error:
        if committing and not (is_refusal(error) and _status(connection) == TransactionStatus.IDLE):
            raise OutcomeUnknown(
                f"no answer to the COMMIT of batch {batch_id} ({type(error).__name__}):"
                " its rows may be in the database or not",
                batch_id=batch_id,
            ) from error
        raise
    return results


def _check_usable(connection: psycopg.Connection[Any]) -> None:
    # In a pipeline the answer to COMMIT is read later, by somebody else.
    if connection.info.pipeline_status != PipelineStatus.OFF:
        raise psycopg.NotSupportedError("a batch cannot run on a connection in pipeline mode: leave it first")
    # The server would say the same to SAVEPOINT, but psycopg 3.2 then refuses the user's rollback().
    if _status(connection) == TransactionStatus.INERROR:
        raise psycopg.errors.InFailedSqlTransaction(
            "the transaction on this connection is aborted: roll it back before the batch"
        )


def _check_open(connection: psycopg.Connection[Any], batch_id: str) -> None:
    if connection.closed:
        raise psycopg.OperationalError("the connection was closed inside the batch")
    if _status(connection) != TransactionStatus.INTRANS:
        raise ProcessorContractError(
            f"the statement ended the transaction of batch {batch_id}: take COMMIT or ROLLBACK out of it",
            batch_id=batch_id,
        )


def _check_answered(connection: psycopg.Connection[Any], outside: bool) -> None:
    # psycopg's transaction() ends without a word, and without COMMIT, when the connection is closed by then.
    expected = TransactionStatus.IDLE if outside else TransactionStatus.INTRANS
    if _status(connection) != expected:
        raise psycopg.OperationalError("the connection was closed before the transaction ended")


def _status(connection: psycopg.Connection[Any]) -> TransactionStatus:
    return connection.info.transaction_status
