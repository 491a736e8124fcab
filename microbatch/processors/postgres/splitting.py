"""Batches whose link breaks while they are written: together at first, then in halves, until the job that does it is
alone.

A link breaks because of a job (its trigger ends or crashes the server process, its row is too long a message, its
batch takes longer than the server allows) or because of the world (a restart, a fail-over, a neighbour that crashes the
server). One break does not tell which, so it is counted, per batch::

    new ──a link breaks──► watched ──as often as it may──► split in two, each of them watched more closely
                              │                       └──► alone: the job fails with its link's error
                              └──written, refused, forgotten──► (gone)

What keeps the innocent from harm:

* A split writes in two transactions what would have been one, and harms no job. Only a job alone is ever given up.
* A batch comes back alone, so what breaks its link breaks no stranger's. It comes back once as it is, for one break is
  most often the world's. A half is split at once.
* Only a break on a link that had answered just before is counted: a link that was dead already, or that cannot be made,
  is nobody's fault.
* Not counted is what the server itself blames on others: a crash of another process, an immediate shutdown. Nor is
  silence up to the deadline. A break is taken back when the server turns out to have been started anew since.
* A job alone is patient: so many breaks *at the same place*, with a back-off between them, that what breaks links at
  random does not do it. A server that crashes again and again under others tells so, see above; and an error that
  leaves the link intact never gives it up.
* Nothing is split or given up that is undecided: what became of it is found out first.
* `on_job_error="fail_batch"`: the batch is not split, and is as patient as a job alone.

Nothing of this is needed to be right: what is forgotten is found again by the next breaks.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from microbatch.errors import in_parts
from microbatch.protocols import Batch

from .errors import CommitUnknown, ServerSilent, Undecided
from .log import tell
from .session import Session
from .sqlstate import Kind, finally_failed, kind_of

# So many breaks a batch may have: as it came; as a part of another; alone.
_TOGETHER, _IN_PART, _ALONE = 2, 1, 6
_REMEMBERED = 10_000
# In these words, which are no errors, a server process that is ended says that it is not to blame.
_INNOCENT = ("57P01", "57P02")
_STARTED = b"SELECT extract(epoch FROM pg_postmaster_start_time())::text"


@dataclass(slots=True)
class Suspect:
    """A batch that broke a link: its latest error, and the breaks that count, by place."""

    is_part: bool
    error: psycopg.Error
    places: Counter[object] = field(default_factory=Counter)
    latest: object = None
    breaks: int = 1
    server: bytes | None = None

    def count(self, place: object) -> None:
        self.latest = place
        self.places[place] += 1

    def excuse(self) -> None:
        """The latest break was not its doing."""
        self.places[self.latest] -= 1

    def most(self) -> int:
        """The breaks at one place."""
        return max(self.places.values(), default=0)


class Watch:
    """One attempt of a batch, and what is seen of its link; *suspect* if it broke one before."""

    def __init__(self, suspect: Suspect | None) -> None:
        self.suspect = suspect
        self.is_over = False  # the batch has its sentence
        self._session: Session | None = None
        self._is_excused = False

    def begin(self, session: Session) -> None:
        """Before anything is sent. Raises `psycopg.Error` if the link is dead already."""
        if session.status != TransactionStatus.IDLE:
            return  # what breaks here takes its owner's transaction along: there is nothing to try again
        suspect = self.suspect
        if suspect is not None:
            session.connection.add_notice_handler(self._hear)
            server = session.ask(_STARTED).get_value(0, 0)
            if suspect.server not in (None, server):
                suspect.excuse()
            suspect.server = server
        self._session = session

    def end(self) -> None:
        """The connection is not listened to any more."""
        if self.suspect is not None and self._session is not None:
            self._session.connection.remove_notice_handler(self._hear)

    @property
    def has_begun(self) -> bool:
        """Whether there was a link that answered."""
        return self._session is not None

    @property
    def has_broken_retry(self) -> bool:
        """Whether a second look at an undecided batch broke its link, too."""
        return self.suspect is not None and self.suspect.breaks > 1

    def broken_by(self, error: BaseException) -> psycopg.Error | None:
        """The link's error, if *error* comes from it."""
        cause = error.__cause__ if isinstance(error, Undecided) else error
        if self._session is None or not isinstance(cause, psycopg.Error) or kind_of(cause) is not Kind.LINK:
            return None
        return cause

    def is_counted(self, error: psycopg.Error, *, is_last: bool) -> bool:
        """Whether the break is held against the batch; the *last* word needs a link that is really gone."""
        if self._is_excused or isinstance(error, ServerSilent) or self._session is None:
            return False
        return not is_last or self._session.connection.closed

    def place(self) -> object:
        """Where the link broke; what breaks it on purpose does so at the same place of each attempt."""
        return None if self._session is None else self._session.place()

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        self._is_excused = self._is_excused or notice.sqlstate in _INNOCENT


class Suspects:
    """By batch id; a batch is with one thread at a time."""

    def __init__(self, isolates: bool) -> None:
        self._isolates = isolates
        self._known: dict[str, Suspect] = {}

    def watch(self, batch: Batch[Any]) -> Watch:
        """For one attempt of *batch*."""
        return Watch(self._known.get(batch.id) if self._known else None)

    def forget(self, batch: Batch[Any]) -> None:
        """*batch* is written, or failed for another reason."""
        if self._known:
            self._known.pop(batch.id, None)

    def sentence(self, batch: Batch[Any], watch: Watch) -> None:
        """For a batch that is known to have left nothing: raises what it comes to, if it has no break left."""
        suspect = watch.suspect
        if suspect is None or not self._is_due(batch, suspect):
            return
        watch.is_over = True
        error = copy.copy(suspect.error)
        if self._splits(batch):
            self._split(batch, error)
            raise error
        self.forget(batch)
        said = (batch.id, suspect.breaks, type(error).__name__, error.sqlstate)
        tell(logging.WARNING, "batch %s broke its link %d times (%s %s); it is given up", *said)
        raise finally_failed(error)

    def judge(self, batch: Batch[Any], watch: Watch, error: BaseException) -> None:
        """Note what *error*, which an attempt ended with, says of its batch, and how the batch is to come back."""
        if watch.is_over:
            return
        suspect, cause = watch.suspect, watch.broken_by(error)
        if cause is not None:
            self._count(batch, watch, cause)
            suspect = self._known.get(batch.id)
            if suspect is not None and error is cause and self._splits(batch) and self._is_due(batch, suspect):
                self._split(batch, cause)
                return
        elif watch.has_begun and not isinstance(error, CommitUnknown):
            self.forget(batch)
            return
        if suspect is not None and isinstance(error, psycopg.Error):
            in_parts(error, [(batch.id, len(batch))])

    def _count(self, batch: Batch[Any], watch: Watch, cause: psycopg.Error) -> None:
        suspect, splits = watch.suspect, self._splits(batch)
        if suspect is None:
            if isinstance(cause, ServerSilent):
                return
            suspect = Suspect(False, cause)
            if splits:
                # The link may have been dead already, which is no job's fault; to split because of it does no harm.
                suspect.count(None)
            self._remember(batch.id, suspect)
            return
        suspect.error = cause
        suspect.breaks += 1
        if watch.is_counted(cause, is_last=not splits):
            suspect.count(None if splits else watch.place())

    def _is_due(self, batch: Batch[Any], suspect: Suspect) -> bool:
        # By the jobs that are left: those that ended meanwhile do not come back, and one may be alone by now.
        may = _ALONE if not self._splits(batch) else _IN_PART if suspect.is_part else _TOGETHER
        return suspect.most() >= may

    def _splits(self, batch: Batch[Any]) -> bool:
        return self._isolates and len(batch) > 1

    def _split(self, batch: Batch[Any], cause: psycopg.Error) -> None:
        half = len(batch) // 2
        parts = [(f"{batch.id}.1", half), (f"{batch.id}.2", len(batch) - half)]
        for batch_id, _ in parts:
            self._remember(batch_id, Suspect(True, cause))
        self.forget(batch)
        in_parts(cause, parts)
        said = (batch.id, type(cause).__name__, cause.sqlstate, len(batch))
        tell(logging.WARNING, "batch %s broke its link again (%s %s); its %d jobs are split in two", *said)

    def _remember(self, batch_id: str, suspect: Suspect) -> None:
        self._known[batch_id] = suspect
        if len(self._known) > _REMEMBERED:
            for oldest in list(self._known)[:1]:
                self._known.pop(oldest, None)
