"""One attempt to write a batch: a transaction that is committed in a flight of its own, and an honest word about it.

What may happen to the batch, and who says so:

1. Before COMMIT is called, a lost link or an error proves that nothing was written.
2. From that call on only two things are certain: the answer COMMIT, and an ERROR on a connection that is still usable.
   Everything else leaves the batch undecided, and the guard finds out.
3. COMMIT is sent alone, when every result is here. What the guard finds committed is completed with those.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGresult

from microbatch.errors import ProcessorContractError
from microbatch.protocols import Batch

from . import elsewhere
from .errors import BatchRolledBack, CommitUnknown, Undecided
from .flight import Flight, is_error
from .guard import Guard, NoGuard, Token, read_token
from .isolation import Isolated, by_chunks, one_by_one
from .log import complain, tell
from .lookout import Lookout, NoLookout, has_moved
from .order import Ordered
from .session import MARKER, Session
from .sqlstate import Kind, finally_failed, is_refusal, kind_of
from .way import Way

_IMMEDIATE = b"SET CONSTRAINTS ALL IMMEDIATE"
_DEFERRABLE = b"SELECT EXISTS (SELECT FROM pg_constraint WHERE condeferrable)::int"
# No statement may outlast the batch's deadline, and a client that vanished must not keep its locks for ever.
_LIMITS = (
    "set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true),"
    " set_config('idle_in_transaction_session_timeout', $3, true)"
)
_IDENTITY = "pg_current_xact_id()::pg_catalog.text, pg_backend_pid()::pg_catalog.text"
_IDLE_GRACE = 1000  # milliseconds
_MESSAGE = 2**30 - 2**16  # bytes of values in one message; a server that is sent more hangs up
_TOO_LARGE = "the job's values are %d bytes as text, and the server takes no message of 1 GB: write them in parts"
# So many attempts of a whole batch before it is isolated, so that a job that always meets the error meets it alone.
_TOGETHER = {Kind.LOCK: 1, Kind.CONFLICT: 3, Kind.RESOURCES: 3}
# A lock is waited for during so large a part of the time that is left: first by the whole batch, which is then
# isolated; then by each job that meets it.
_PATIENCE = {False: 4, True: 10}


@dataclass(slots=True)
class Pending:
    """A batch whose COMMIT was not answered: what it comes to if it was carried out, and how to find out."""

    results: list[Any]
    token: Token
    guard: Guard
    deadline: float | None
    order: Ordered | None = None
    is_settled: bool = False

    def outcome(self) -> list[Any]:
        """The results, in the order of the jobs."""
        return self.results if self.order is None else self.order.restored(self.results)


class Refused(Exception):
    """The server refused a command before COMMIT; the transaction is aborted. *position* is the job, where known.

    *is_outdated*: it was the look behind the rows, and the table is another one by now.
    """

    def __init__(self, error: psycopg.Error, position: int | None) -> None:
        super().__init__()
        self.error = error
        self.position = position
        self.is_outdated = False


class Outdated(Exception):
    """What is known of the table, or prepared, is out of date; nothing was written, and another attempt starts anew."""


class Frame:
    """One batch on one session, whatever it is written with; used once, by one thread.

    `pending` is set from the call of COMMIT until its answer is understood. One that *is_suspect* has broken a link.
    """

    is_suspect = False

    def __init__(self, session: Session, batch: Batch[Any], isolates: bool) -> None:
        self._session = session
        self._batch = batch
        self._isolates = isolates
        # Inside somebody else's transaction only a savepoint is ours, and COMMIT is theirs.
        self._inside = session.status == TransactionStatus.INTRANS
        self.pending: Pending | None = None

    def _raise_if_retried(self, error: Exception, kind: Kind) -> None:
        """Unless it is a matter of single jobs: the whole batch is tried again."""
        if self._is_matter_of_jobs(kind):
            self._last_word(error)
            return
        if kind is Kind.READ_ONLY and not self._inside:
            self._session.retire()
        raise error

    def _is_matter_of_jobs(self, kind: Kind) -> bool:
        if kind in (Kind.PERMANENT, Kind.STALE):
            return True
        if kind is not Kind.LOCK and not self._isolates:
            return False
        return kind in _TOGETHER and self._batch.attempt > _TOGETHER[kind]

    def _concerns_all(self, error: Exception, kind: Kind) -> bool:
        """Whether not even the others can be written; a lock was waited for by one job alone."""
        return kind is not Kind.LOCK and not self._is_matter_of_jobs(kind)

    def _last_word(self, error: Exception) -> Exception:
        """*error*, not to be tried again where it has been."""
        complain(error)
        kind = kind_of(error)
        is_last = kind is Kind.STALE or (kind is Kind.LOCK and self._batch.attempt > _TOGETHER[kind])
        return finally_failed(error) if is_last and isinstance(error, psycopg.Error) else error

    def _all_failed(self, failed: dict[int, Exception]) -> list[Any]:
        first, error = next(iter(failed.items()))
        state = error.sqlstate if isinstance(error, psycopg.Error) else None
        reason = f"{type(error).__name__} {state}" if state else type(error).__name__
        message = f"another job of the batch failed ({reason}); nothing was written"
        return [
            failed[i] if i in failed else BatchRolledBack(message, job=self._batch[first])
            for i in range(len(self._batch))
        ]


class Attempt(Frame):
    """Writes one batch by flights."""

    def __init__(self, session: Session, way: Way, batch: Batch[Any], guard: Guard, isolates: bool) -> None:
        super().__init__(session, batch, isolates)
        self._way = way
        self._guard = NoGuard() if self._inside else guard
        self._token = Token()
        self._is_checked: bool | None = None
        self.lookout: Lookout = NoLookout()
        # The SQLSTATEs of an answer that is worth another look; None where this is that look.
        self.outdated_by: frozenset[str] | None = frozenset()

    def run(self) -> list[Any]:
        """One result per job; an exception in the place of a job that failed alone.

        Raises:
            Undecided, CommitUnknown: COMMIT was called and nobody knows.
            ProcessorContractError: the statement itself ended the transaction.
            psycopg.Error: nothing was written for any job.
        """
        failed = self._unsendable()
        if failed and not self._isolates:
            return self._all_failed(failed)
        while positions := [i for i in range(len(self._batch)) if i not in failed]:
            results = self._write(positions, failed)
            if not results:
                continue  # all of them failed, and everything is undone
            unread = {i: value for i, value in results.items() if isinstance(value, Exception)}
            if unread and not self._isolates:
                self._roll_back()
                return self._all_failed(unread)
            if not unread:
                ordered = [results[i] if i in results else failed[i] for i in range(len(self._batch))]
                self._commit(ordered)
                return ordered
            # Written, but the row cannot be handed out: once more, without these.
            failed |= unread
            self._roll_back()
        return [failed[i] for i in range(len(self._batch))]

    # Writing, up to a transaction that is open and complete.

    def _write(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any]:
        try:
            return self._plainly(positions)
        except Refused as refused:
            kind = kind_of(refused.error)
            is_outdated = self._roll_back(look=kind is Kind.PERMANENT) or refused.is_outdated
            self._check_outdated(refused.error, is_outdated)
            self._raise_if_retried(refused.error, kind)
            if not self._isolates:
                failed.update(self._blamed(refused.error, positions, refused.position))
                return {}
            if len(positions) == 1:
                failed[positions[0]] = self._last_word(refused.error)
                return {}
            return self._isolated(positions, failed)

    def _plainly(self, positions: list[int]) -> dict[int, Any]:
        """All jobs in one flight."""
        if self._inside and self._checks():
            # Undone, for that alone gives their owner back what is deferred and what is not.
            self._written(positions, checked=True)
            self._roll_back()
        return self._written(positions, checked=not self._inside)

    def _written(self, positions: list[int], checked: bool) -> dict[int, Any]:
        flight = self._session.flight()
        before = self._begin(flight)
        self.lookout.prepare(flight)
        count = self._way.send(flight, positions)
        looks = self.lookout.look(flight)
        if checked:
            # What is deferred to COMMIT would be an error nobody could isolate.
            flight.run(_IMMEDIATE)
        if asks := self._asks_elsewhere():
            flight.run(elsewhere.REACHED)
        flight.sync()
        answers = self._landed(flight)
        self._check_refused(positions, answers, before, count, looks)
        self._read_head(answers)
        if asks:
            self._token.servers = int(answers[-1].get_value(0, 0) or 0)
        return self._way.read(positions, answers[before : before + count])

    def _check_refused(
        self, positions: Sequence[int], answers: Sequence[PGresult], before: int, count: int, looks: int
    ) -> None:
        """Raise for the first error among *answers*: to so many commands *before* the jobs', to these, to *looks*."""
        for number, answer in enumerate(answers):
            if is_error(answer):
                command = number - before
                position = self._way.culprit(positions, command) if 0 <= command < count else None
                refused = self._refused(answer, position)
                refused.is_outdated = count <= command < count + looks and has_moved(refused.error)
                raise refused

    def _asks_elsewhere(self) -> bool:
        """Whether it is to be seen which other servers this transaction has reached."""
        return self._guard.needs_xid and self._session.facts.has_foreign and self._token.servers is None

    def _isolated(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any]:
        isolated = self._isolate(one_by_one if self._way.in_order else by_chunks, positions)
        if isolated.order_mattered() and not self._way.in_order:
            # The earlier of two jobs wins, also when only its neighbours had made its chunk fail.
            self._roll_back()
            isolated = self._isolate(one_by_one, positions)
        if self._has_moved() or any(map(self._is_outdated, isolated.errors.values())):
            self._roll_back()
            raise Outdated
        for i, error in isolated.errors.items():
            failed[i] = self._last_word(error)
        for first in isolated.errors.values():
            said = (self._batch.id, len(isolated.errors), len(self._batch), type(first).__name__, first.sqlstate)
            tell(logging.INFO, "batch %s: %d of %d jobs failed alone, the first with %s %s", *said)
            break
        if not isolated.results:
            self._roll_back()
        elif self._inside and self._checks():
            self._roll_back()
            return self._again(list(isolated.results))
        return isolated.results

    def _again(self, positions: list[int]) -> dict[int, Any]:
        """Those that are right, for good."""
        try:
            return self._written(positions, checked=False)
        except Refused as refused:
            self._roll_back()
            raise refused.error from None

    def _isolate(self, how: Any, positions: list[int]) -> Isolated:
        flight = self._session.flight()
        self._begin(flight, isolating=True)
        if self._checks():
            flight.run(_IMMEDIATE)
        flight.sync()
        answers = self._landed(flight)
        for answer in answers:
            if is_error(answer):
                self._roll_back()
                self._check_outdated(self._session.error(answer))
                self._session.retire()  # what is known of this server may be out of date
                raise self._session.error(answer)
        self._read_head(answers)
        isolated: Isolated = how(self._session, self._way, positions)
        self._check_open()
        for error in isolated.errors.values():
            if self._concerns_all(error, kind_of(error)):
                self._roll_back()
                self._raise_if_retried(error, kind_of(error))
        return isolated

    def _refused(self, answer: PGresult, position: int | None) -> Refused:
        error = self._session.error(answer)
        return Refused(error if position is None else self._way.note(position, error), position)

    # Whether it is the job's fault, or what it was put together with is of another day.

    def _unsendable(self) -> dict[int, Exception]:
        """The jobs that cannot even be sent, for the table as it is."""
        if self.is_suspect:
            self._refuse_large()
        refused = dict(self._way.refused)
        if refused and not self._inside and self._has_moved():
            raise Outdated
        return refused

    def _refuse_large(self) -> None:
        """Of a batch that broke a link it is seen which jobs are more than a message."""
        refused = self._way.refused
        for i in range(len(self._batch)):
            if i not in refused and self._way.size(i) > _MESSAGE:
                refused[i] = psycopg.DataError(_TOO_LARGE % self._way.size(i))

    def _check_outdated(self, error: psycopg.Error, is_outdated: bool = False) -> None:
        """Raise `Outdated` unless *error* is to be believed; nothing of the batch is left by now."""
        if is_outdated or self._is_outdated(error):
            raise Outdated from error

    def _is_outdated(self, error: psycopg.Error) -> bool:
        if self.outdated_by is None:
            return False
        return error.sqlstate in self.outdated_by or kind_of(error) is Kind.STALE

    def _has_moved(self) -> bool:
        """A look by itself; in a transaction of ours that is open it takes the rows along if it fails."""
        flight = self._session.flight()
        if not self.lookout.look(flight):
            return False
        flight.sync()
        try:
            return self._seen(flight.land()[0])
        except psycopg.Error:
            if self._session.is_open:
                self._roll_back()
            raise

    def _seen(self, answers: Sequence[PGresult]) -> bool:
        """Whether a look with these *answers* has seen that something moved."""
        for answer in answers:
            if is_error(answer):
                error = self._session.error(answer)
                if has_moved(error):
                    return True
                raise error
        return False

    def _landed(self, flight: Flight) -> list[PGresult]:
        answers = flight.land()[0]
        if not is_error(answers[0]):  # without a beginning there is nothing that could have been ended
            self._check_open()
        return answers

    def _check_open(self) -> None:
        if self._session.status not in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            raise ProcessorContractError(
                f"the statement ended the transaction of batch {self._batch.id}: take COMMIT or ROLLBACK out of it",
                batch_id=self._batch.id,
            )

    def _checks(self) -> bool:
        """Whether deferred constraints are checked; not in somebody else's transaction that is not clean."""
        if self._is_checked is None:
            self._is_checked = not self._inside or self._is_clean()
        return self._is_checked

    def _is_clean(self) -> bool:
        # An owner with a violation of its own, which it may be about to cure, would have every job fail for it.
        flight = self._session.flight()
        self._begin(flight)
        flight.run(_DEFERRABLE)
        flight.run(_IMMEDIATE)
        flight.sync()
        _, there, *checked = self._landed(flight)
        self._roll_back()
        return not any(map(is_error, [there, *checked])) and there.get_value(0, 0) == b"1"

    # Whose fault it is, where the batch fails as a whole.

    def _blamed(self, error: psycopg.Error, positions: list[int], position: int | None) -> dict[int, Exception]:
        """What each job of the batch fails with; *position* is the one that met *error*, where that is known."""
        found: dict[int, Exception] = {}
        # One statement for all does not say whose row it was: let them be tried one by one, and keep nothing.
        if position is None and len(positions) > 1 and self._isolated(positions, found):
            self._roll_back()
        first = positions[0] if position is None else position
        return dict(enumerate(self._all_failed(found or {first: error})))

    # The frame: BEGIN and COMMIT, or a savepoint in somebody else's transaction.

    def _begin(self, flight: Flight, isolating: bool = False) -> int:
        """Queue the beginning; returns how many commands that is."""
        self._session.is_open = True
        if self._inside:
            flight.run(b"SAVEPOINT microbatch_batch")
            return 1
        flight.run(self._session.begin_command())
        head, parameters = self._head(isolating)
        flight.run(head, parameters)
        self._token.ledger = self._session.facts.ledger
        return 2 + self._guard.begin(flight, self._token)

    def _head(self, isolating: bool) -> tuple[bytes, list[bytes]]:
        columns, parameters = [], []
        if self._guard.needs_xid:
            columns += [_IDENTITY, *([MARKER] if self._session.facts.pooled else [])]
        if limits := self._limits(isolating):
            columns.append(_LIMITS)
            parameters = [b"%d" % limit for limit in limits]
        return f"SELECT {', '.join(columns) or '1'}".encode(), parameters

    def _limits(self, isolating: bool, share: float = 1.0) -> list[int] | None:
        left, facts = self._session.milliseconds_left(), self._session.facts
        if left is None:
            return None
        left = max(1, int(left * share))
        own = (facts.statement_timeout, facts.lock_timeout, facts.idle_timeout)
        ours = (left, max(1, left // _PATIENCE[isolating]), left + _IDLE_GRACE)
        return [min(limit, given or limit) for limit, given in zip(ours, own, strict=True)]

    def _read_head(self, answers: Sequence[PGresult]) -> None:
        if self._guard.needs_xid:
            read_token(self._session, self._token, answers[1])

    def _roll_back(self, look: bool = False) -> bool:
        """Undo everything, and say whether a *look* sees that something has moved."""
        flight = self._session.flight()
        # Never by a name: it must work whatever became of what was prepared.
        flight.run(b"ROLLBACK TO microbatch_batch" if self._inside else b"ROLLBACK", once=True)
        flight.sync()
        looks = self.lookout.look(flight) if look else 0
        if looks:
            flight.sync()
        if self._inside:
            flight.run(b"ROLLBACK TO microbatch_batch")
            flight.run(b"RELEASE microbatch_batch")
            flight.sync()
        answers = flight.land()
        self._session.is_open = False
        # Undone for certain, so its lane is free; behind a lost link it may be locked for a while.
        self._guard.release(self._token)
        self._token = Token()
        return looks > 0 and self._seen(answers[1])

    def _commit(self, results: list[Any]) -> None:
        if self._asks_elsewhere():
            self._token.servers = elsewhere.reached(self._session)
        self.pending = Pending(results, self._token, self._guard, self._batch.deadline)
        flight = self._session.flight(commits=True)
        try:
            flight.run(b"RELEASE microbatch_batch" if self._inside else b"COMMIT")
            flight.sync()
            answer = flight.land()[0][-1]
        except BaseException as error:
            if self._inside:
                self.pending = None  # the transaction went with the connection
                raise
            raise unknown(self._batch.id, self._guard, self._token, error) from error
        if not is_error(answer) and answer.command_status != b"ROLLBACK":
            # `pending` stays: an interruption on the way back must not look like a failure.
            self._session.is_open = False
            self._guard.release(self._token)
            return
        failure = self._refusal(answer)
        if failure is None:
            failure = self._session.error(answer)
            raise unknown(self._batch.id, self._guard, self._token, failure) from failure
        self.pending = None
        self._roll_back()
        raise failure

    def _refusal(self, answer: PGresult) -> psycopg.Error | None:
        """What the answer to COMMIT says, if it says for certain that nothing was written."""
        if not is_error(answer):
            # Said without an error, so without a SQLSTATE of the server's.
            return psycopg.errors.InFailedSqlTransaction("the server rolled the batch back instead of committing it")
        failure = self._session.error(answer)
        if self._inside or self._session.status == TransactionStatus.INERROR:
            # Inside a transaction that has failed COMMIT was not even begun.
            return failure
        is_idle = self._session.status == TransactionStatus.IDLE
        return (
            failure if is_refusal(failure) and is_idle and elsewhere.is_refused(failure, self._token.servers) else None
        )


def unknown(batch_id: str, guard: Guard, token: Token, reason: BaseException | str) -> CommitUnknown:
    """What to raise when the answer to COMMIT is missing because of *reason*."""
    why = reason if isinstance(reason, str) else type(reason).__name__
    message = f"no answer to the COMMIT of batch {batch_id} ({why})"
    if isinstance(guard, NoGuard):
        return CommitUnknown(f"{message}: its rows may be in the database or not", batch_id=batch_id)
    return Undecided(f"{message}; the {guard.name} guard can tell", batch_id=batch_id, lookup=guard.lookup(token))
