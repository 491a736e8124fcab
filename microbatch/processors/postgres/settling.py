"""Batches whose COMMIT was not answered, until somebody knows what became of it."""

from __future__ import annotations

import logging
import time
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from microbatch.errors import OutcomeUnknown
from microbatch.protocols import Batch

from .errors import CommitUnknown, Undecided
from .guard import NoGuard, Token
from .log import tell
from .session import Session
from .sqlstate import Kind, kind_of
from .transaction import Pending, unknown

# Past the earliest deadline of its jobs a batch may come back for the others. Then it is only remembered that nobody
# knows: written anew, it could be there twice.
_GRACE = 60.0
_REMEMBERED = 10_000


class Undecideds:
    """By batch id. A batch comes back unchanged, on any thread, until its fate is known or its deadline is over.

    An entry stays when the batch turns out to be committed: an interruption may keep that from being heard, and the
    batch comes back once more. It goes just before the batch is written anew.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Pending] = {}

    def verdict(
        self, batch: Batch[Any], known: Pending | None, fresh: Pending | None, error: BaseException
    ) -> BaseException:
        """What *error* says of a batch that was *known* to be undecided, or is so since now: the *fresh* is kept."""
        # The known one is kept already, unless it was just found to have left nothing: then its lane may be another's.
        if fresh is not None and not isinstance(fresh.guard, NoGuard):
            self._keep(batch, fresh)
        pending = fresh or known
        if pending is None or isinstance(error, CommitUnknown):
            return error
        if isinstance(pending.guard, NoGuard) and isinstance(error, OutcomeUnknown):
            return error
        return unknown(batch.id, pending.guard, pending.token, error)

    def is_empty(self) -> bool:
        """Whether nobody may come back and ask."""
        return all(pending.is_settled for pending in list(self._pending.values()))

    def _keep(self, batch: Batch[Any], pending: Pending) -> None:
        # Before anything else: what is not kept is written anew when it comes back.
        self._pending[batch.id] = pending
        pending.deadline = batch.deadline
        self._give_up_overdue()

    def get(self, batch: Batch[Any]) -> Pending | None:
        return self._pending.get(batch.id)

    def settle(self, session: Session, batch: Batch[Any], pending: Pending, only_look: bool) -> list[Any] | None:
        """The results, if the batch was committed; None if nothing of it is there, so that it can be written anew.

        With *only_look* nothing that breaks links is sent again, where that can be had.

        Raises:
            Undecided: not known yet; it is kept.
            CommitUnknown: it will never be known.
        """
        pending.deadline = batch.deadline
        if pending.is_settled:
            return pending.outcome()
        if session.status != TransactionStatus.IDLE:
            raise unknown(batch.id, pending.guard, pending.token, "its connection is inside a transaction")
        try:
            committed = _asked(session, batch, pending, only_look)
        except Undecided:
            raise
        except CommitUnknown as error:
            tell(logging.ERROR, "batch %s is unknown: %s", batch.id, _advice(error, pending))
            raise
        except psycopg.Error as error:
            if kind_of(error) is Kind.READ_ONLY:
                session.retire()
            raise unknown(batch.id, pending.guard, pending.token, error) from error
        if committed:
            pending.is_settled = True
        else:
            # Before the lane is free: with the next batch's number in it, this one would look committed.
            self._pending.pop(batch.id, None)
        pending.guard.release(pending.token)
        found = "was carried out" if committed else "left nothing; again"
        tell(logging.WARNING, "batch %s: its COMMIT %s", batch.id, found)
        return pending.outcome() if committed else None

    def _give_up_overdue(self) -> None:
        now = time.monotonic()
        for batch_id, pending in list(self._pending.items()):
            if pending.results and pending.deadline is not None and pending.deadline + _GRACE < now:
                if not pending.is_settled:
                    lookup = pending.guard.lookup(pending.token) or ""
                    tell(logging.ERROR, "batch %s stayed unknown; %s", batch_id, lookup)
                self._pending[batch_id] = Pending([], Token(), NoGuard(), None)
        over = [batch_id for batch_id, pending in self._pending.items() if pending.is_settled or not pending.results]
        # Never one that may still come back: forgotten, it would be written anew.
        for batch_id in over[: max(0, len(self._pending) - _REMEMBERED)]:
            self._pending.pop(batch_id, None)


def _asked(session: Session, batch: Batch[Any], pending: Pending, only_look: bool) -> bool:
    try:
        return pending.guard.settle(session, pending.token, batch.id, only_look)
    except psycopg.Error as error:
        # Of the session, and not of the batch: what had been prepared on it is not there any more.
        if kind_of(error) is not Kind.STALE or not session.forget_prepared():
            raise
    return pending.guard.settle(session, pending.token, batch.id, only_look)


def _advice(error: CommitUnknown, pending: Pending) -> str:
    lookup = error.lookup or pending.guard.lookup(pending.token)
    return f"{error}; {lookup}" if lookup else str(error)
