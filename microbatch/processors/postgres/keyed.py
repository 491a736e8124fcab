"""Writing with drawn keys: one flight that commits by itself, and a retry that cannot double.

What may happen, and what follows:

1. The flight's synchronisation point came back and no error stood before it: committed.
2. An ERROR came back: nothing is there. The key's own constraint in a first attempt is nobody's fault: a stranger has
   the key, so others are drawn. Everything else is isolated, in a transaction of its own and with the same keys.
3. No answer: undecided. The retry inserts the same keys where they are not there yet, in an explicit transaction. It
   waits for a first attempt that is still open, and so does a first attempt that arrives late for the retry.
   All rows went in: the first attempt left nothing, and the retry is committed. Otherwise it is rolled back (a part of
   the rows may have been deleted since, and must not come back), and the keys are looked up.
   Not one row can go in: no key would stop a first attempt that is still open, so it is ended before its jobs fail.
4. The keys are there: on the server and the timeline that gave them they are the batch's own, for they are drawn
   durably. After a failover they may be a stranger's, and so may a part of them where somebody inserts by hand: the
   contents decide, and where they cannot nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import psycopg
from psycopg.pq.abc import PGresult

from microbatch.protocols import Batch

from .catalogue import Table
from .commands import KeyedCommands
from .errors import CommitUnknown, KeysTaken, Undecided
from .flight import Flight, is_error
from .guard import NoGuard, Token
from .keys import Keys
from .lookout import Lookout
from .session import MARKER, Session
from .sqlstate import Kind, kind_of
from .tables import KeyedWay
from .transaction import Attempt, Outdated, Pending, Refused, unknown
from .translate import Reader

_END = (
    b"SELECT pg_terminate_backend(pid, 500) FROM pg_stat_activity WHERE pid = $1::int AND pid <> pg_backend_pid()"
    # Of another role's process it is not told when it began.
    b" AND coalesce(extract(epoch FROM backend_start)::pg_catalog.text = $2, true)"
)
# Behind a pooler nobody knows whose process it was: any that began before, and is at a command of a batch of the table.
_STILL_OPEN = (
    b"SELECT false FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    b" AND state <> 'idle' AND xact_start < $2::pg_catalog.timestamptz AND (starts_with(query, $1)"
    b" OR query IN ('COMMIT', 'SET CONSTRAINTS ALL IMMEDIATE') OR starts_with(query, 'SELECT set_config')) LIMIT 1"
)
_NOW = b"SELECT clock_timestamp()"
_MARKER = f"SELECT {MARKER}".encode()
_OWN_KEY = (
    b"SELECT FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid"
    b" JOIN pg_namespace n ON n.oid = t.relnamespace"
    b" WHERE (i.oid = $1::oid OR i.oid IN (SELECT relid FROM pg_partition_tree($1::oid::regclass)))"
    b" AND n.nspname = $2 AND t.relname = $3 AND i.relname = $4"
)
_UNIQUE = "23505"
_OF_VALUES = ("22", "23")  # 23 for the check of a domain
_COMMITTING = 2 / 3  # of a statement's time, where its flight commits as well and is given up sooner
_GHOSTS = 2  # so often a key is taken and nobody has it: deleted meanwhile, or a trigger inserts another one
_THEFTS = 20  # so often an attempt draws new keys; then somebody inserts by hand what the sequence gives, too
_TAKEN = "the keys of this table are taken by others as fast as they are drawn"
_ROUNDS = 5  # of a retry whose keys appear and disappear
_LOOKS = 4  # so often a retry looks at its table


class Planner(Protocol):
    """Knows the table, on any session."""

    def today(self, session: Session, way: KeyedWay) -> tuple[KeyedWay | None, Lookout]:
        """*way* for the table as it is; None where it draws no such keys any more."""

    def forget(self, session: Session) -> None:
        """What is known through *session* is out of date."""


class KeyGuard:
    """Not a witness but the retry itself: it ends with the rows there, once, and fills in the *results*."""

    name = "keys"
    needs_xid = False

    def __init__(
        self, way: KeyedWay, positions: Sequence[int], results: list[Any], batch: Batch[Any], planner: Planner
    ) -> None:
        self._planner = planner
        self._way = way
        self._positions = list(positions)
        self._results = results
        self._batch = batch
        self.attempts: list[Token] = []
        self.since = ""  # when the last of them was over for us, by the server's clock; asked behind a pooler only

    def begin(self, flight: Flight, token: Token) -> int:
        return 0

    def settle(self, session: Session, token: Token, batch_id: str, only_look: bool = False) -> bool:
        self.attempts = self.attempts or [token]
        results = self._retried(session, token, only_look)
        if results is None:
            return False
        for i, result in results.items():
            # A row that was read before COMMIT is the first attempt's own; a later look may find it changed.
            if not isinstance(self._results[i], dict):
                self._results[i] = result
        return True

    def _retried(self, session: Session, token: Token, only_look: bool) -> dict[int, Any] | None:
        """Its jobs' results; None if nothing of it is there, nor will be, and the table draws no such keys any more."""
        for look in range(_LOOKS):
            way, lookout = self._planner.today(session, self._way)
            try:
                if way is None:
                    return self._retry(session, self._way.with_reader(Reader(session.connection)), token).look()
                retry = self._retry(session, way, token)
                retry.lookout, retry.outdated_by = lookout, None if look else frozenset()
                return retry.look() if only_look and retry.can_look() else retry.run()
            except Outdated:
                self._planner.forget(session)
                session.forget_prepared()
        raise Undecided(f"the table of batch {self._batch.id} keeps changing", batch_id=self._batch.id)

    def _retry(self, session: Session, way: KeyedWay, token: Token) -> KeyedRetry:
        return KeyedRetry(session, way, self._batch, self._positions, token, self)

    def fail(self, failed: dict[int, Exception]) -> None:
        """These are out, whatever becomes of the others: the next round is not about them."""
        for i, error in failed.items():
            self._results[i] = error
            self._positions.remove(i)

    def forget_rows(self) -> None:
        """The first attempt left nothing: what it had read, such as a time, is not what the retry writes."""
        for i in self._positions:
            self._results[i] = None

    def release(self, token: Token) -> None:
        pass

    def lookup(self, token: Token) -> str | None:
        return None


class KeyedAttempt(Attempt):
    """The first attempt, and the isolation that may follow it."""

    def __init__(
        self,
        session: Session,
        way: KeyedWay,
        batch: Batch[Any],
        keys: Keys,
        isolates: bool,
        table: Table,
        planner: Planner,
    ) -> None:
        super().__init__(session, way, batch, NoGuard(), isolates)
        self._planner = planner
        self._keyed = way
        self._keys = keys
        self._table = table
        self._ghosts = 0

    def run(self) -> list[Any]:
        failed = self._unsendable()
        if failed and not self._isolates:
            return self._all_failed(failed)
        positions = [i for i in range(len(self._batch)) if i not in failed]
        results = self._first(positions, failed) if positions else None
        return self._complete(results or {}, failed)

    def _give_keys(self, positions: Sequence[int], failed: dict[int, Exception]) -> list[int]:
        """Those that have keys; the others *failed* because a sequence has ended."""
        keys, end = self._drawn(len(positions))
        self._keyed.keys = dict(zip(positions, keys, strict=False))
        keyless = positions[len(keys) :]
        if end is not None and keyless:
            failed |= dict.fromkeys(keyless, end)
            if not self._isolates:
                failed |= dict(enumerate(self._all_failed({keyless[0]: end})))
                return []
        return list(positions[: len(keys)])

    def _drawn(self, count: int) -> tuple[list[tuple[bytes, ...]], psycopg.Error | None]:
        try:
            return self._keys.draw(self._session, count)
        except psycopg.Error as error:
            kind = kind_of(error)
            self._check_outdated(error, kind is Kind.PERMANENT and self._has_moved())
            if kind is Kind.READ_ONLY:
                self._session.retire()
            raise

    def _complete(self, results: dict[int, Any], failed: dict[int, Exception]) -> list[Any]:
        return [results[i] if i in results else failed[i] for i in range(len(self._batch))]

    def _first(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any] | None:
        """The results, committed; None if every job failed."""
        for _ in range(_THEFTS):
            positions = self._give_keys(positions, failed)
            if not positions:
                return None
            try:
                by_steps = self.is_suspect or not self._keyed.fits(positions)
                return self._by_steps(positions, failed) if by_steps else self._fly(positions, failed)
            except Refused as refused:
                error = refused.error
                self._check_outdated(error, refused.is_outdated)
            if not self._is_theft(error, positions):
                break
            self._keys.forget()
        else:
            raise KeysTaken(_TAKEN)
        self._settle_failure(error, positions, failed)
        remaining = [i for i in positions if i not in failed]
        if not remaining:
            return None
        return self._isolated_with_keys(remaining, failed)

    def _isolated_with_keys(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any] | None:
        for _ in range(_THEFTS):
            alone: dict[int, Exception] = {}
            results = self._isolated(positions, alone)
            if any(isinstance(error, psycopg.Error) and self._is_theft(error, [i]) for i, error in alone.items()):
                if results:
                    self._roll_back()
                self._keys.forget()
                positions = self._give_keys(positions, failed)
                if not positions:
                    return None
                continue
            failed |= alone
            return self._commit_isolated(results, failed) if results else None
        raise KeysTaken(_TAKEN)

    def _by_steps(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any]:
        """COMMIT apart, when all is well: what breaks the link before it has left nothing for certain.

        It is also what takes long: of a flight that commits no more than half the time is awaited.
        """
        try:
            results = self._plainly(positions)
        except Refused:
            self._roll_back()
            raise
        return self._commit_isolated(results, failed)

    def _fly(self, positions: list[int], failed: dict[int, Exception]) -> dict[int, Any]:
        """One flight, one implicit transaction, one round trip."""
        self.pending = self._undecided(positions, failed)
        flight = self._session.flight(commits=True)
        before = self._limit(flight)
        count = self._way.send(flight, positions)
        looks = self.lookout.look(flight)
        if self._keyed.has_deferred:
            flight.run(b"SET CONSTRAINTS ALL IMMEDIATE")
        flight.sync()
        try:
            answers = flight.land()[0]
        except BaseException as error:
            raise unknown(self._batch.id, self.pending.guard, self._token, error) from error
        try:
            self._check_refused(positions, answers, before, count, looks)
        except Refused:
            # The server says so itself, before the implicit commit or in its place.
            self.pending = None
            raise
        return self._way.read(positions, answers[before : before + count])

    def _limit(self, flight: Flight) -> int:
        # The server gives up before the flight does, so that an answer still to come, and not a silence, decides.
        limits = self._limits(False, _COMMITTING)
        if limits is None:
            return 0
        # Nothing is idle in a transaction of one flight.
        flight.run(
            b"SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $2, true)",
            [b"%d" % limit for limit in limits[:2]],
        )
        return 1

    def _is_theft(self, error: psycopg.Error, positions: Sequence[int]) -> bool:
        """Whether somebody has one of the keys, which is no job's fault."""
        if error.sqlstate != _UNIQUE or not self._is_of_key(error):
            return False
        flight = self._session.flight()
        self._keyed.look_up(flight, positions)
        flight.sync()
        answer = flight.land()[0][-1]
        if not is_error(answer) and answer.ntuples:
            return True
        self._ghosts += 1
        return self._ghosts <= _GHOSTS

    def _is_of_key(self, error: psycopg.Error) -> bool:
        """By schema and table, too: a trigger may write elsewhere. A partition has a constraint of its own."""
        table, said = self._table, error.diag
        where = (said.schema_name, said.table_name, said.constraint_name)
        if where == (table.schema, table.name, table.key_constraint):
            return True
        return self._session.ask(_OWN_KEY, str(table.key_index), *where).ntuples > 0

    def _settle_failure(self, error: psycopg.Error, positions: list[int], failed: dict[int, Exception]) -> None:
        """Raise what the whole batch is tried again for; note what fails without a look at the others."""
        kind = kind_of(error)
        is_isolated = self._isolates and len(positions) > 1  # which looks, too
        self._check_outdated(error, kind is Kind.PERMANENT and not is_isolated and self._has_moved())
        self._raise_if_retried(error, kind)
        if not self._isolates:
            failed.update(self._blamed(error, positions, None))
        elif len(positions) == 1:
            failed[positions[0]] = error

    def _commit_isolated(self, results: dict[int, Any], failed: dict[int, Exception]) -> dict[int, Any]:
        ordered = self._complete(results, failed)
        self._guard = KeyGuard(self._keyed, list(results), ordered, self._batch, self._planner)
        self._token = token_of(self._session)
        self._commit(ordered)
        return results

    def _undecided(self, positions: list[int], failed: dict[int, Exception]) -> Pending:
        # Whatever becomes of the others: who has no key was not sent.
        results = [failed.get(i) for i in range(len(self._batch))]
        self._token = token_of(self._session)
        guard = KeyGuard(self._keyed, positions, results, self._batch, self._planner)
        return Pending(results, self._token, guard, self._batch.deadline)


class KeyedRetry(Attempt):
    """The same keys again, on whatever connection, until it is known that the rows are there once."""

    def __init__(
        self,
        session: Session,
        way: KeyedWay,
        batch: Batch[Any],
        positions: Sequence[int],
        token: Token,
        owner: KeyGuard,
    ) -> None:
        super().__init__(session, way, batch, NoGuard(), True)
        self._owner = owner
        self._keyed = way
        self._positions = list(positions)
        self._first_token = token

    def run(self) -> dict[int, Any]:  # type: ignore[override]
        """One result or error per job of *positions*.

        Raises:
            Undecided: not known yet.
            CommitUnknown: it cannot be found out.
            psycopg.Error: not known yet.
        """
        self._keyed.careful = True
        if self._session.facts.pooled and not self._owner.since:
            self._owner.since = (self._session.ask(_NOW).get_value(0, 0) or b"").decode()
        try:
            for _ in range(_ROUNDS):
                results = self._round()
                if results is not None:
                    return results
        finally:
            self._keyed.careful = False
        raise Undecided(f"the keys of batch {self._batch.id} come and go", batch_id=self._batch.id)

    def can_look(self) -> bool:
        """Whether the table and the server's processes tell all: the first attempt's history goes on here."""
        if not self._owner.since and not all(token.pid for token in self._owner.attempts):
            return False
        return self._is_same_history()

    def look(self) -> dict[int, Any] | None:
        """The rows of the first attempt, without sending the jobs again; None if they are not there and never will be.

        Raises:
            Undecided: the first attempt's process still lives.
            CommitUnknown: it cannot be found out.
        """
        # Before the keys, in a transaction of its own: what it commits until it is gone is seen then.
        self._end_attempts()
        return self.found()

    def _round(self) -> dict[int, Any] | None:
        try:
            results = self._plainly(self._positions)
        except Refused as refused:
            kind = kind_of(refused.error)
            self._check_outdated(refused.error, self._roll_back(look=kind is Kind.PERMANENT) or refused.is_outdated)
            if kind not in (Kind.PERMANENT, Kind.STALE):
                if kind is Kind.LOCK:
                    self._end_attempts()
                raise refused.error from None
            # Decided against the data of today. If the first attempt was committed, its keys tell.
            return self.found() or self._anew()
        if len(results) == len(self._positions):
            self._commit_retry(results)
            return results
        self._roll_back()
        return self.found()

    def found(self) -> dict[int, Any] | None:
        """The rows of the first attempt; None if not one of the keys is there."""
        found = self._look_up(self._positions)
        if found is None:
            found = {}
            for i in self._positions:
                found |= self._look_up([i]) or {}
        if not found:
            return None
        self._check_history(found)
        # What is not there any more has been deleted since: its job is done, and has no row.
        return {i: found.get(i) for i in self._positions}

    def _look_up(self, positions: Sequence[int]) -> dict[int, Any] | None:
        """The rows with the keys of these jobs; None where a value cannot be read, and so was never written."""
        flight = self._session.flight()
        self._keyed.look_up(flight, positions)
        flight.sync()
        answer = flight.land()[0][-1]
        if is_error(answer) and (self._session.error(answer).sqlstate or "")[:2] in _OF_VALUES:
            return None
        return self._keyed.found(positions, self._checked(answer))

    def _check_history(self, found: dict[int, Any]) -> None:
        """Whether the rows found are this batch's, and not those of somebody who has its keys.

        A batch is atomic. On the server and the timeline that gave its keys they are its own where all of them are
        there; where some are, one row that is surely its own speaks for all. Elsewhere each has to speak for itself.
        """
        all_there = len(found) == len(self._positions)
        if self._is_same_history():
            if all_there or self._keyed.may_change or self._count_own():
                return
        elif all_there and self._count_own() == len(found):
            return
        raise CommitUnknown(
            f"batch {self._batch.id}: there are rows with its keys that are not what it wrote; they were changed"
            " since, or are somebody else's who took the keys by hand or after a failover",
            batch_id=self._batch.id,
        )

    def _is_same_history(self) -> bool:
        """Whether this is the first attempt's server and timeline. A crash takes back no key that is logged."""
        flight = self._session.flight(keep=False)
        flight.run(_MARKER)
        flight.sync()
        answer = flight.land()[0][-1]
        marker = None if is_error(answer) else answer.get_value(0, 0)
        if marker is None or self._first_token.marker is None:
            return False
        parts = 2 if self._keyed.is_logged else 3
        return marker.decode().split("/")[:parts] == self._first_token.marker.split("/")[:parts]

    def _count_own(self) -> int:
        flight = self._session.flight(keep=False)
        self._keyed.compare(flight, self._positions)
        flight.sync()
        answers = flight.land()[0]
        # A value that cannot even be read was never written.
        return 0 if any(map(is_error, answers)) else sum(int(answer.get_value(0, 0) or 0) for answer in answers)

    def _anew(self) -> dict[int, Any] | None:
        """Each job for itself, with the same keys: a first attempt that arrives late meets them."""
        failed: dict[int, Exception] = {}
        results = self._isolated(self._positions, failed)
        if len(results) + len(failed) != len(self._positions):
            self._roll_back()  # a key has appeared meanwhile
            return None
        if not results:
            # There is nothing that it would meet.
            self._end_attempts()
            if found := self.found():
                return found
        self._owner.fail(failed)
        if results:
            self._commit_retry(results)
        return results

    def _commit_retry(self, results: dict[int, Any]) -> None:
        # Its own fate is the same question again, so nothing has to be kept for it.
        self._owner.forget_rows()
        self._owner.attempts.append(token_of(self._session))
        self._owner.since = ""
        flight = self._session.flight(commits=True)
        flight.run(b"COMMIT")
        flight.sync()
        self._checked(flight.land()[0][-1])
        self._session.is_open = False

    def _end_attempts(self) -> None:
        """End the server processes of the attempts before: nobody listens to them any more, and they hold the keys.

        Raises:
            Undecided: one of them is still open.
        """
        for token in self._owner.attempts:
            flight = self._session.flight(keep=False)
            if token.pid:
                flight.run(_END, [token.pid.encode(), token.backend_start.encode()])
            else:
                flight.run(_STILL_OPEN, [self._keyed.beginning, self._owner.since.encode()])
            flight.sync()
            answer = flight.land()[0][-1]
            if is_error(answer) or (answer.ntuples and answer.get_value(0, 0) != b"t"):
                raise Undecided(f"an attempt of batch {self._batch.id} is still open", batch_id=self._batch.id)

    def _checked(self, answer: PGresult) -> PGresult:
        if is_error(answer):
            raise self._session.error(answer)
        return answer


def token_of(session: Session) -> Token:
    """What tells an attempt on *session* from others."""
    facts = session.facts
    if facts.pooled:
        return Token(marker=facts.marker)
    pid = str(session.connection.info.backend_pid)
    return Token(marker=facts.marker, pid=pid, backend_start=facts.backend_start)


def refusal_of(session: Session, commands: KeyedCommands) -> str:
    """Why the server does not take *commands*, in its own words; empty if it does. Writes nothing.

    Raises:
        psycopg.Error: it did not come to an answer.
    """
    try:
        session.explain([(commands.careful_all, commands.count), (commands.look_up, len(commands.key))])
    except psycopg.Error as error:
        if kind_of(error) is not Kind.PERMANENT:
            raise
        return str(error).partition("\n")[0]
    return ""
