"""The way for a psycopg whose inside is unknown, or a cursor of the user's kind: `executemany` in `transaction()`.

Slower, and with the same promises: jobs fail alone behind a savepoint each, COMMIT is as honest. There is no guard, so
a COMMIT without an answer is `CommitUnknown`, and no deadline reaches the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.abc import Query
from psycopg.pq import Format, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import tuple_row

from microbatch.errors import OutcomeUnknown, ProcessorContractError
from microbatch.protocols import Batch

from .columns import at, said
from .conversions import adapt, encoding_of, named, sendable, text_of
from .errors import is_jobs_own
from .guard import NoGuard, Token
from .parameters import Job, parameters_of
from .session import Session
from .sqlstate import is_refusal, kind_of
from .transaction import Frame, Pending, unknown
from .translate import as_result, columns_of, count_of, placeholders

_IMMEDIATE = "SET CONSTRAINTS ALL IMMEDIATE"
_DEFERRABLE = "SELECT EXISTS (SELECT FROM pg_constraint WHERE condeferrable)::int"


class Portable(Frame):
    """Writes one batch; as `Attempt`, on public parts of psycopg alone."""

    def __init__(self, session: Session, statement: Query, batch: Batch[Job], isolates: bool) -> None:
        super().__init__(session, batch, isolates)
        self._connection = session.connection
        self._statement = sendable(statement, session.connection)
        self._is_checked = not self._inside  # deferred constraints
        self._rehearses = self._inside and self._is_clean()

    def run(self) -> list[Any]:
        """One result per job; an exception in the place of a job that failed alone."""
        jobs = [_parameters(job) for job in self._batch]
        refused: dict[int, Any] = {i: job for i, job in enumerate(jobs) if isinstance(job, BaseException)}
        if refused:
            return self._each(jobs) if self._isolates else self._all_failed(refused)
        try:
            if self._rehearses:
                with self._rehearsal():
                    self._together(jobs)
            return self._commit(lambda: self._together(jobs))
        except OutcomeUnknown:
            raise
        except Exception as error:
            self._raise_if_retried(error, kind_of(error))
            if self._isolates:
                return self._each(jobs)
            return self._all_failed(self._culprit(jobs, error))

    def _is_clean(self) -> bool:
        """Whether there is something deferrable, and the owner of the transaction has no violation of its own."""
        try:
            with self._connection.transaction(force_rollback=True):
                with self._connection.cursor(row_factory=tuple_row) as cursor:
                    there = cursor.execute(_DEFERRABLE).fetchone()
                self._connection.execute(_IMMEDIATE)
        except psycopg.Error:
            return False
        # As text, for the owner may have an int of its own.
        return there is not None and str(there[0]) == "1"

    @contextmanager
    def _rehearsal(self, singly: bool = False) -> Iterator[None]:
        """Undone, for that alone gives the owner of the transaction back what is deferred and what is not."""
        self._is_checked = True
        try:
            with self._connection.transaction(force_rollback=True):
                if singly:
                    # The server forgets what it has to restore when an inner savepoint, which has set it, is released.
                    self._connection.execute(_IMMEDIATE)
                yield
        finally:
            self._is_checked = not self._inside

    def _each(self, jobs: Sequence[Any]) -> list[Any]:
        if not self._rehearses:
            return self._commit(lambda: self._singly(jobs))
        with self._rehearsal(singly=True):
            results = self._singly(jobs)
        good = [i for i, result in enumerate(results) if not isinstance(result, BaseException)]
        again = self._commit(lambda: self._together([jobs[i] for i in good])) if good else []
        for i, result in zip(good, again, strict=True):
            results[i] = result
        return results

    def _together(self, jobs: Sequence[Any]) -> list[Any]:
        with self._connection.cursor(row_factory=tuple_row) as cursor:
            adapt(cursor.adapters, self._connection)
            with self._unprepared():
                cursor.executemany(self._statement, jobs, returning=True)
            # Never flattened: a job whose set is empty (ON CONFLICT DO NOTHING) would give its place to the next one.
            results = [_result(cursor)]
            while cursor.nextset():
                results.append(_result(cursor))
        if len(results) != len(jobs):
            raise psycopg.ProgrammingError(
                f"{len(results)} results for {len(jobs)} jobs: the statement must be a single command"
            )
        self._check_open()
        if self._is_checked:
            # What is deferred to COMMIT would be an error nobody could isolate.
            self._connection.execute(_IMMEDIATE)
        return results

    @contextmanager
    def _unprepared(self) -> Iterator[None]:
        # What psycopg prepares by itself keeps the types that its parameters had then, whatever becomes of the table.
        threshold = self._connection.prepare_threshold
        self._connection.prepare_threshold = None
        try:
            yield
        finally:
            self._connection.prepare_threshold = threshold

    def _singly(self, jobs: Sequence[Any]) -> list[Any]:
        return [self._alone(job) for job in jobs]

    def _alone(self, job: Any) -> Any:
        if isinstance(job, BaseException):
            return job
        try:
            with self._connection.transaction():
                return self._together([job])[0]
        except OutcomeUnknown:
            raise
        except Exception as error:
            if self._concerns_all(error, kind_of(error)):
                raise
            return self._noted(named(self._last_word(error), self._connection))

    def _noted(self, error: Exception) -> Exception:
        if not isinstance(error, psycopg.Error):
            return error
        try:
            _, names = placeholders(self._connection, self._statement)
        except Exception:  # of a psycopg whose inside is unknown
            names = ()
        return at(error, said(error, names))

    def _culprit(self, jobs: Sequence[Any], error: Exception) -> dict[int, Exception]:
        """The first job that fails, found without keeping anything. Raises *error* if none of them does alone."""
        with self._rehearsal(singly=True) if self._rehearses else self._connection.transaction(force_rollback=True):
            for i, job in enumerate(jobs):
                result = self._alone(job)
                if isinstance(result, Exception):
                    return {i: result}
        raise error

    def _commit(self, work: Callable[[], list[Any]]) -> list[Any]:
        try:
            with self._connection.transaction():
                results = work()
                self._check_open()
                # Set before the block ends, which is what sends COMMIT: from here on a failure proves nothing.
                self.pending = Pending(results, Token(), NoGuard(), self._batch.deadline)
            expected = TransactionStatus.INTRANS if self._inside else TransactionStatus.IDLE
            if self._session.status != expected:
                # transaction() ends without a word, and without COMMIT, when the connection is closed by then.
                raise psycopg.OperationalError("the connection was closed before the transaction ended")
        except BaseException as error:
            pending, self.pending = self.pending, None
            is_refused = is_refusal(error) and self._session.status == TransactionStatus.IDLE
            if not isinstance(error, Exception):
                self._connection.close()  # psycopg's own count of open transactions may be wrong now
            if pending is None or self._inside or is_refused:
                raise
            raise unknown(self._batch.id, pending.guard, pending.token, error) from error
        return results

    def _check_open(self) -> None:
        if self._connection.closed:
            raise psycopg.OperationalError("the connection was closed inside the batch")
        if self._session.status != TransactionStatus.INTRANS:
            raise ProcessorContractError(
                f"the statement ended the transaction of batch {self._batch.id}: take COMMIT or ROLLBACK out of it",
                batch_id=self._batch.id,
            )


def _parameters(job: Job) -> Any:
    """What psycopg gets, read already: what a lazy mapping raises must not meet an open transaction."""
    try:
        parameters = parameters_of(job)
        is_lazy = isinstance(parameters, Mapping) and not isinstance(parameters, dict)
        return dict(parameters) or parameters if is_lazy else parameters
    except BaseException as error:
        if not is_jobs_own(error):
            raise
        return error


def _result(cursor: psycopg.Cursor[tuple[Any, ...]]) -> Any:
    # No row number: the statement returns no rows at all.
    if cursor.rownumber is None or cursor.pgresult is None:
        return count_of((cursor.statusmessage or "").encode())
    names = columns_of(cursor.pgresult, encoding_of(cursor.connection))
    return as_result([dict(zip(names, row, strict=True)) for row in _rows(cursor, cursor.pgresult)])


def _rows(cursor: psycopg.Cursor[tuple[Any, ...]], answer: PGresult) -> list[tuple[Any, ...]]:
    try:
        return cursor.fetchall()
    except Exception:
        # What Python has no value for is handed out as text, as by `translate.Reader`.
        if cursor.format != Format.TEXT:
            raise
        columns = range(answer.nfields)
        return [tuple([_value(cursor, answer, row, i) for i in columns]) for row in range(answer.ntuples)]


def _value(cursor: psycopg.Cursor[Any], answer: PGresult, row: int, column: int) -> Any:
    data, number = answer.get_value(row, column), answer.ftype(column)
    if data is None:
        return None
    try:
        loader = cursor.adapters.get_loader(number, Format.TEXT) or cursor.adapters.get_loader(0, Format.TEXT)
        return loader(number, cursor).load(data) if loader else data
    except Exception:
        return text_of(data, encoding_of(cursor.connection))
