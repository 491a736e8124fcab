"""What a processor writes with: a statement, or a table and the plan for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import psycopg
from psycopg import sql
from psycopg.abc import Query
from psycopg.pq import TransactionStatus

from microbatch.logs import Log
from microbatch.protocols import Batch

from .catalogue import Table, look_up
from .commands import KeyedCommands, Target
from .conversions import settings_of
from .guard import Guard, Guards
from .keyed import KeyedAttempt, refusal_of
from .keys import Keys, keys_of
from .lookout import Lookout, NoLookout, Stamp, columns_behind, stamp_of
from .plan import Plan, Strategy, plan_for
from .portable import Portable
from .session import Session
from .statement import StatementWay
from .tables import Form, KeyedWay, MergeWay, RowWay
from .transaction import Attempt
from .translate import columns_of, is_supported, once, placeholders
from .typed import JsonParameters, Known

_log = Log("microbatch.postgres")

Returning: TypeAlias = Literal["*"] | Sequence[str] | None

_REREAD_SECONDS = 60.0
# What the catalogue said, or what was prepared, may be out of date: names, types, and what is found missing inside.
_OUTDATED = frozenset(
    ("42703", "42704", "42883", "42P01", "42804", "428C9", "42P10", "0A000", "55000", "42501", "XX000")
)

# A parameter may be JSON, and its value was sent as what it is in Python; or it is JSON no more.
_MISTYPED = frozenset(("42804", "42846", "42883"))
_MISREAD = frozenset(("22P02",))
_JSON = "json"  # in a session's memory: what is known of the parameters


class Writer(Protocol):
    """Makes the attempts of a processor's batches."""

    plan: Plan | None

    def open(self, session: Session) -> None:
        """Look whether batches can be written at all; raises what is wrong."""

    def forget(self, session: Session) -> None:
        """What is known through *session* is out of date."""

    def attempt(self, session: Session, batch: Batch[Any], guards: Guards, again: bool = False) -> Attempt | Portable:
        """One attempt to write *batch*; *again*: the one before was out of date, and everything is looked at anew."""


class StatementWriter:
    """Any statement, once per job."""

    def __init__(self, statement: Query, isolates: bool) -> None:
        self.plan: Plan | None = None
        self._statement = statement
        self._isolates = isolates

    def open(self, session: Session) -> None:
        """Ask for its columns. Raises `ValueError` if two have the same name."""
        if not is_supported(session.connection):
            return
        try:
            command, _ = placeholders(session.connection, self._statement)
            answer = session.describe(command)
        except (psycopg.Error, UnicodeError):
            if session.connection.closed:
                raise
            return  # each job will be told; and perhaps the values of one tell the types that are missing here
        columns_of(answer, session.encoding)

    def forget(self, session: Session) -> None:
        """Ask for the statement's tables, and for the types of its parameters, before the next batch."""
        session.memory.pop(self, None)
        session.memory[self, _JSON] = None

    def attempt(self, session: Session, batch: Batch[Any], guards: Guards, again: bool = False) -> Attempt | Portable:
        if not is_supported(session.connection):
            return Portable(session, self._statement, batch, self._isolates)
        known: Known | None = session.memory.get((self, _JSON))
        if known is not None and not known.is_trusted():
            known = None
        parameters = JsonParameters(session, self._statement, known, at_once=(self, _JSON) in session.memory)
        way = StatementWay(session.connection, self._statement, batch, parameters.applied)
        if parameters.failure is not None:
            raise parameters.failure
        if parameters.has_asked:
            session.memory[self, _JSON] = parameters.known
        is_known = self in session.memory
        attempt = Attempt(session, way, batch, guards.choose(session), self._isolates)
        lookout = self._lookout(session, way)
        if lookout is None:
            way.is_kept = False
        else:
            attempt.lookout = lookout
        if again:
            attempt.outdated_by = None
        else:
            attempt.outdated_by = _OUTDATED if is_known else frozenset()
            if not parameters.has_asked:
                attempt.outdated_by |= _MISTYPED if known is None or not known.kinds else _MISTYPED | _MISREAD
        return attempt

    def _lookout(self, session: Session, way: StatementWay) -> Lookout | None:
        """For what is prepared with types that the server chose; None where nothing may be kept."""
        if session.prepared is None:
            return NoLookout()
        known: Lookout | None = session.memory.get(self)
        if known is not None:
            return known
        example = way.example()
        found = None if example is None else columns_behind(session, example.command, example.types)
        if found is not None:
            session.memory[self] = found
        return found


class Planned:
    """One table as one connection sees it, and the keys drawn through it."""

    def __init__(self, session: Session, target: Target, plan: Plan, stamp: Stamp, read_at: float) -> None:
        self.plan = plan
        self.stamp = stamp
        self.read_at = read_at
        self.settings = settings_of(session.connection)
        self.form = Form(session.connection, target, plan.drawn)
        self.keys: Keys | None = keys_of(target.table, plan.drawn) if plan.strategy == "keys" else None


class TableWriter:
    """Rows for one table, in the fastest way that is exact there. `plan` is the latest one."""

    def __init__(
        self,
        table: str,
        columns: Sequence[str],
        returning: Returning,
        on_conflict: str | sql.Composable | None,
        strategy: Strategy | Literal["auto"],
        isolates: bool,
        has_ledger: bool,
        overriding: str | None = None,
    ) -> None:
        self._overriding = _overriding(overriding)
        self._has_ledger = has_ledger
        self._table = _name(table)
        self._columns = _columns(columns)
        self._returning = _returning(returning)
        self._on_conflict = _on_conflict(on_conflict)
        self._strategy = _strategy(strategy, bool(self._on_conflict))
        self._isolates = isolates
        self._answer: tuple[Table | None, str] = (None, "")
        self.plan: Plan | None = None

    def open(self, session: Session) -> None:
        """Read the catalogue. Raises `ValueError` if the table cannot be written so."""
        self._planned(session)

    def forget(self, session: Session) -> None:
        """Read the catalogue again before the next batch."""
        session.memory.pop(self, None)

    def attempt(self, session: Session, batch: Batch[Any], guards: Guards, again: bool = False) -> Attempt | Portable:
        known = session.memory.get(self)
        planned = self._planned(session)
        attempt = self._attempt(session, batch, guards, planned)
        attempt.lookout = planned.stamp
        attempt.outdated_by = None if again else _OUTDATED if planned is known else frozenset()
        return attempt

    def _attempt(self, session: Session, batch: Batch[Any], guards: Guards, planned: Planned) -> Attempt:
        if planned.plan.strategy == "statement" or session.status == TransactionStatus.INTRANS:
            # In somebody else's transaction nothing can be committed on the side, and no key be drawn durably.
            return self._plain(session, RowWay(planned.form, batch), batch, guards.choose(session))
        if planned.plan.strategy == "merge":
            return self._plain(session, MergeWay(planned.form, batch), batch, guards.choose(session))
        assert planned.keys is not None
        way = KeyedWay(planned.form, batch)
        return KeyedAttempt(session, way, batch, planned.keys, self._isolates, planned.form.target.table, self)

    def today(self, session: Session, way: KeyedWay) -> tuple[KeyedWay | None, Lookout]:
        """*way*, with its keys, as the table is now on *session*; None where it draws no such keys any more."""
        planned = self._planned(session)
        is_same = planned.plan.strategy == "keys" and planned.plan.drawn == way.drawn
        return way.with_form(planned.form) if is_same else None, planned.stamp

    def _plain(self, session: Session, way: RowWay, batch: Batch[Any], guard: Guard) -> Attempt:
        return Attempt(session, way, batch, guard, self._isolates)

    def _planned(self, session: Session) -> Planned:
        known: Planned | None = session.memory.get(self)
        if known is not None and known.settings != settings_of(session.connection):
            known = None  # its converters, its commands, and perhaps its table, are another session's
        now = time.monotonic()
        # Looked at again now and then: not everything that matters is in the stamp. And each time in somebody else's
        # transaction, whose own changes all have the same stamp.
        is_inside = session.status == TransactionStatus.INTRANS
        if known is not None and now - known.read_at < _REREAD_SECONDS and not is_inside:
            return known
        stamp = stamp_of(session, self._table)
        table = look_up(session, self._table, self._columns)
        if known is not None and (known.stamp.command, known.form.target.table) == (stamp.command, table):
            known.read_at = now
            return known
        # It was parsed for the table as it was.
        session.forget_prepared()
        options = (self._columns, session.facts.version, bool(self._on_conflict), self._has_ledger)
        plan = plan_for(table, *options)
        once(self._returning or ())
        target = Target(table, self._columns, self._returning, self._on_conflict, self._overriding)
        if plan.strategy == "keys" and self._strategy in ("auto", "keys"):
            refusal = self._refusal(session, target, plan.drawn)
            plan = plan_for(table, *options, refusal) if refusal else plan
        planned = session.memory[self] = Planned(session, target, self._pinned(plan, session), stamp, now)
        self._tell(planned.plan)
        return planned

    def _refusal(self, session: Session, target: Target, drawn: tuple[str, ...]) -> str:
        """Why the server does not take drawn keys; asked once for a table, and not on every connection."""
        table, refusal = self._answer
        if table != target.table:
            refusal = refusal_of(session, KeyedCommands(target, drawn).recoded(session.connection))
            self._answer = (target.table, refusal)
        return refusal

    def _pinned(self, plan: Plan, session: Session) -> Plan:
        wanted = self._strategy
        if wanted in ("auto", plan.strategy):
            return plan
        if wanted == "statement":
            return Plan("statement", "it is pinned")
        if wanted == "merge" and plan.strategy == "keys" and session.facts.version >= 170000:
            return Plan("merge", "it is pinned")
        raise ValueError(
            f"strategy={wanted!r} cannot be had for table {self._table}: {plan.reason};"
            f" use strategy='auto', which takes {plan.strategy!r}"
        )

    def _tell(self, plan: Plan) -> None:
        if plan != self.plan:
            _log.info("table %s is written by %s: %s", self._table, plan.strategy, plan.reason)
        self.plan = plan


def _name(table: str) -> str:
    if not isinstance(table, str):
        raise TypeError(f"table must be a str, as in SQL ('shop.payments'), not {type(table).__qualname__}")
    if not table.strip():
        raise ValueError("table is empty; pass its name as in SQL, such as 'payments' or 'shop.payments'")
    return table


def _columns(columns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(columns, str) or not isinstance(columns, Sequence):
        raise TypeError(f"columns must be a list of names, not {type(columns).__qualname__}")
    if bad := [name for name in columns if not isinstance(name, str)]:
        raise TypeError(f"columns must be names, not {type(bad[0]).__qualname__}")
    if not columns:
        raise ValueError("columns is empty; name at least one column that the jobs give")
    if twice := [name for name in columns if list(columns).count(name) > 1]:
        raise ValueError(f"column {twice[0]!r} is named more than once")
    return tuple(columns)


def _returning(returning: Returning) -> Literal["*"] | tuple[str, ...] | None:
    if returning is None or returning == "*":
        return returning
    if isinstance(returning, str) or not isinstance(returning, Sequence):
        raise TypeError(f"returning must be '*', a list of column names or None, not {returning!r}")
    return tuple(returning) or None


def _on_conflict(clause: str | sql.Composable | None) -> bytes:
    if clause is None:
        return b""
    if isinstance(clause, sql.Composable):
        text = clause.as_string(None)
    elif isinstance(clause, str):
        text = clause
    else:
        raise TypeError(f"on_conflict must be SQL, such as '(id) DO NOTHING', not {type(clause).__qualname__}")
    words = text.upper().split()
    if "DO" not in words or words[:2] == ["ON", "CONFLICT"]:
        raise ValueError(
            f"on_conflict={text!r}: pass what follows ON CONFLICT, such as '(id) DO NOTHING'"
            " or '(id) DO UPDATE SET amount = excluded.amount'"
        )
    return b" ON CONFLICT " + text.encode()


def _overriding(overriding: str | None) -> bool:
    if overriding not in (None, "system"):
        raise ValueError(f"overriding must be 'system' or None, not {overriding!r}")
    return overriding == "system"


def _strategy(strategy: str, has_on_conflict: bool) -> Strategy | Literal["auto"]:
    if strategy not in ("auto", "keys", "merge", "statement"):
        raise ValueError(f"strategy must be 'auto', 'keys', 'merge' or 'statement', not {strategy!r}")
    if has_on_conflict and strategy in ("keys", "merge"):
        raise ValueError(f"strategy={strategy!r} cannot be had with on_conflict; use 'auto' or 'statement'")
    return cast('Strategy | Literal["auto"]', strategy)
