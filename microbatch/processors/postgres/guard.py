"""Whether a COMMIT without an answer was carried out.

Each guard leaves something in the batch's own transaction that tells it afterwards: its transaction id, or a row
in the ledger. Three answers are possible: committed, nothing written, and not known yet.

*xid*: `pg_xact_status()` is wrong after a crash and after a failover (it may take a lost transaction for a committed
one), so "committed" counts only while the server's life marker is the same. "aborted", and an id from the future, say
that nothing is in the history that goes on.

*ledger*: one row per lane with a rising number, written by the transaction itself. Writing the same number again waits
until the first attempt is decided, and then meets it or not; after a crash, too.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGresult

from . import elsewhere
from .conversions import settled
from .errors import CommitUnknown, Undecided
from .flight import Flight, is_error
from .log import tell
from .session import LEDGER, MARKER, Session
from .sqlstate import Kind, kind_of

DDL = f"""CREATE TABLE IF NOT EXISTS {LEDGER} (
    lane uuid PRIMARY KEY,
    batch bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
)"""

# Always with the schema that the first attempt found it in: another one's ledger would say "nothing".
_UPSERT = settled(
    "INSERT INTO {} AS l (lane, batch) VALUES ($1::uuid, $2::bigint) ON CONFLICT (lane)"
    " DO UPDATE SET batch = excluded.batch, at = excluded.at WHERE l.batch < excluded.batch"
)
_SWEEP = "DELETE FROM {} WHERE at < now() - interval '7 days'"
_CLEAR = "DELETE FROM {} WHERE lane = ANY ($1::uuid[])"
_STATUS = f"SELECT pg_is_in_recovery()::int, {MARKER}, pg_xact_status($1::xid8)".encode()
_END_ORPHAN = (
    b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    b" WHERE pid = $1::int AND backend_xid = ($2::xid8)::xid AND pid <> pg_backend_pid()"
)
_IN_THE_FUTURE = "22023"
_LOCK_WAIT = "250"  # milliseconds for the first attempt to be decided by itself


@dataclass(slots=True)
class Token:
    """What an attempt left behind to be recognised by."""

    xid: str = ""
    pid: str = ""
    marker: str | None = None
    ledger: str = ""
    lane: str = ""
    number: int = 0
    is_free: bool = False
    backend_start: str = ""
    servers: int | None = None  # foreign ones that its transaction wrote to, if that was asked


class Guard(Protocol):
    """One way to find out; `needs_xid` puts transaction id, process id and marker into the token."""

    @property
    def name(self) -> str:
        """The option's word for it."""

    @property
    def needs_xid(self) -> bool:
        """Whether the transaction's first query has to tell its id."""

    def begin(self, flight: Flight, token: Token) -> int:
        """Queue what has to be in the transaction; returns how many commands that is."""

    def settle(self, session: Session, token: Token, batch_id: str, only_look: bool = False) -> bool:
        """Whether the transaction of *token* was committed; if not, nothing of it is or will be there.

        With *only_look* the jobs are not sent again, where there is another way to know.

        Raises:
            Undecided: not known yet.
            CommitUnknown: it cannot be found out.
            psycopg.Error: asking failed; not known yet.
        """

    def release(self, token: Token) -> None:
        """The attempt of *token* is decided."""

    def lookup(self, token: Token) -> str | None:
        """A query that tells it to a human."""


class NoGuard:
    """Nothing is left behind: a COMMIT without an answer stays unknown."""

    name = "none"
    needs_xid = False

    def begin(self, flight: Flight, token: Token) -> int:
        return 0

    def settle(self, session: Session, token: Token, batch_id: str, only_look: bool = False) -> bool:
        raise CommitUnknown(_cannot("commit_guard is 'none'", batch_id), batch_id=batch_id)

    def release(self, token: Token) -> None:
        pass

    def lookup(self, token: Token) -> str | None:
        return None


class XidGuard:
    """Asks the server for the state of the transaction id; needs no table and no privilege."""

    name = "xid"
    needs_xid = True

    def begin(self, flight: Flight, token: Token) -> int:
        return 0

    def settle(self, session: Session, token: Token, batch_id: str, only_look: bool = False) -> bool:
        try:
            in_recovery, marker, status = _texts(session.ask(_STATUS, token.xid))
        except psycopg.Error as error:
            if error.sqlstate == _IN_THE_FUTURE:
                in_recovery, marker, status = _texts(session.ask(_STATUS, None))
                status = "aborted"
            else:
                raise
        if in_recovery == "1":
            session.connection.close()  # a standby may not have heard of it; the next connection may be better
            raise Undecided(f"the server that should know of batch {batch_id} is a standby", batch_id=batch_id)
        if token.marker is None or marker is None or _system(marker) != _system(token.marker):
            raise CommitUnknown(_cannot("this is not the same server", batch_id), batch_id=batch_id)
        if status == "in progress":
            end_orphan(session, token)
            raise Undecided(f"the transaction of batch {batch_id} is still open", batch_id=batch_id)
        if status == "aborted":
            _check_elsewhere(session, token, batch_id)
            return False
        if status is None:
            raise CommitUnknown(_cannot("its transaction is too old", batch_id), batch_id=batch_id)
        if marker != token.marker:
            reason = "the server crashed or failed over, and may take a lost transaction for a committed one"
            raise CommitUnknown(_cannot(reason, batch_id), batch_id=batch_id, lookup=self.lookup(token))
        return True

    def release(self, token: Token) -> None:
        pass

    def lookup(self, token: Token) -> str | None:
        return None if token.servers else f"SELECT pg_xact_status('{token.xid}')"


class LedgerGuard:
    """Writes a number into a lane of the ledger. A lane belongs to one batch at a time, in one process."""

    name = "ledger"
    needs_xid = True

    def __init__(self) -> None:
        # By process id: a forked child would write the parent's numbers. Lists, whose steps are atomic.
        self._free: dict[int, list[tuple[str, int]]] = {}
        self._swept: set[int] = set()

    def begin(self, flight: Flight, token: Token) -> int:
        if not token.lane:
            token.lane, token.number = self._next()
        flight.run(*_upsert(token))
        return 1

    def settle(self, session: Session, token: Token, batch_id: str, only_look: bool = False) -> bool:
        flight = session.flight(keep=False)
        flight.run(b"BEGIN")
        flight.run(b"SELECT set_config('lock_timeout', $1, true)", [_LOCK_WAIT.encode()])
        flight.run(*_upsert(token))
        flight.sync()
        flight.run(b"ROLLBACK")
        flight.sync()
        last = flight.land()[0][-1]
        if not is_error(last):
            is_there = (last.command_tuples or 0) == 0
            if not is_there:
                _check_elsewhere(session, token, batch_id)
            return is_there
        error = session.error(last)
        if kind_of(error) is not Kind.LOCK:
            raise error
        end_orphan(session, token)
        raise Undecided(f"the transaction of batch {batch_id} is still open", batch_id=batch_id) from error

    def release(self, token: Token) -> None:
        # Once: a lane that two batches have at a time would tell the one's fate for the other's.
        if token.lane and not token.is_free:
            token.is_free = True
            self._mine().append((token.lane, token.number))

    def lookup(self, token: Token) -> str | None:
        query = f"SELECT batch >= {token.number} FROM {token.ledger} WHERE lane = '{token.lane}'"
        return None if token.servers else query

    def sweep(self, session: Session) -> None:
        """Once in a process: take out what processes that are long gone have left. A failure changes nothing."""
        if os.getpid() not in self._swept and session.status == TransactionStatus.IDLE:
            self._swept.add(os.getpid())
            _try(session, _SWEEP.format(session.facts.ledger).encode())

    def clear(self, session: Session) -> None:
        """Take the idle lanes of this process out of the table."""
        lanes = [lane for lane, _ in self._mine()]
        self._mine().clear()
        if lanes and session.facts.ledger:
            _try(session, _CLEAR.format(session.facts.ledger).encode(), f"{{{','.join(lanes)}}}")

    def _next(self) -> tuple[str, int]:
        try:
            lane, number = self._mine().pop()
        except IndexError:
            lane, number = str(uuid.uuid4()), 0
        return lane, number + 1

    def _mine(self) -> list[tuple[str, int]]:
        return self._free.setdefault(os.getpid(), [])


def _upsert(token: Token) -> tuple[str, list[bytes]]:
    return _UPSERT.format(token.ledger), [token.lane.encode(), b"%d" % token.number]


def end_orphan(session: Session, token: Token) -> None:
    """End the server process that still holds the first attempt's transaction, if it is still that one."""
    if token.pid and token.xid:
        _try(session, _END_ORPHAN, token.pid, token.xid)


def _check_elsewhere(session: Session, token: Token, batch_id: str) -> None:
    """Raise `CommitUnknown` if what was not committed here may be committed on another server."""
    if token.servers is None:
        token.servers = elsewhere.in_reach(session)
    if token.servers:
        reason = "not carried out here, it may be so on the server of a foreign table that the batch writes to"
        raise CommitUnknown(_cannot(reason, batch_id), batch_id=batch_id)


def read_token(session: Session, token: Token, answer: PGresult) -> None:
    """Fill *token* from the answer to the transaction's first query."""
    token.xid, token.pid, *marker = (text or "" for text in _texts(answer)[:3])
    token.marker = marker[0] if session.facts.pooled else session.facts.marker


def _cannot(reason: str, batch_id: str) -> str:
    return f"no answer to the COMMIT of batch {batch_id}, and no way to find out: {reason}"


def _system(marker: str) -> str:
    return marker.partition("/")[0]


def _texts(answer: PGresult) -> list[str | None]:
    values = (answer.get_value(0, i) for i in range(answer.nfields))
    return [None if value is None else value.decode() for value in values]


def _try(session: Session, command: bytes, *parameters: Any) -> None:
    try:
        session.ask(command, *parameters)
    except psycopg.Error:
        pass


class Guards:
    """Which guard a batch gets: the pinned one, or the best that its server offers."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._ledger = LedgerGuard()
        self._xid = XidGuard()
        self._none = NoGuard()
        self._refused: set[str] = set()

    def choose(self, session: Session) -> Guard:
        """The guard for a batch on *session*. Raises `ValueError` if the ledger is pinned and not there."""
        if self._mode == "none":
            return self._none
        if session.facts.not_ledger and self._mode in ("auto", "ledger"):
            self._refuse(session.facts.not_ledger)
        if self._mode == "ledger" and not session.facts.ledger:
            raise ValueError(
                f"commit_guard='ledger', but table {LEDGER} is not on the search path of this role with SELECT, INSERT"
                " and UPDATE: create it with `microbatch init-db --apply`, or use commit_guard='auto'"
            )
        if self._mode != "xid" and session.facts.ledger:
            self._ledger.sweep(session)
            return self._ledger
        return self._xid

    def _refuse(self, table: str) -> None:
        """A table has the ledger's name, and not its columns or key: pinned, an error; else said once."""
        what = f"table {table} is not the ledger of microbatch: it needs the columns and the key that init-db prints"
        if self._mode == "ledger":
            raise ValueError(f"commit_guard='ledger', but {what}; rename it, or use commit_guard='auto'")
        if table not in self._refused:
            self._refused.add(table)
            tell(logging.WARNING, "%s; it is left alone, and the guard is xid", what)

    def leave(self, session: Session) -> None:
        """Clean up what this process has in the database, before its last connection closes."""
        self._ledger.clear(session)
