"""The processor: one statement, one transaction per batch, one result per job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from psycopg import sql
from psycopg.abc import Query

from microbatch.protocols import Batch

from . import sqlstate
from .columns import column_of
from .errors import TableChanging, Undecided
from .guard import Guards
from .log import describe
from .order import Order, Ordered
from .parameters import Job
from .plan import Plan
from .portable import Portable
from .session import Session
from .settling import Undecideds
from .sources import Conninfo, connections_from
from .splitting import Suspects, Watch
from .transaction import Attempt, Outdated, Pending
from .writer import StatementWriter, TableWriter, Writer

Statement: TypeAlias = str | bytes | sql.Composable

_LOOKS = 4  # so often an attempt looks at its table


@dataclass(slots=True)
class Trial:
    """One call of `process`: its batch, what is *known* to be undecided of it, and how far this attempt came."""

    batch: Batch[Job]
    known: Pending | None
    watch: Watch
    order: Ordered | None = None
    attempt: Attempt | Portable | None = None

    def fresh(self) -> Pending | None:
        """What is undecided since this attempt."""
        pending = None if self.attempt is None else self.attempt.pending
        if pending is not None:
            pending.order = self.order
        return pending


_AWAY = (sqlstate.Kind.LINK, sqlstate.Kind.RESOURCES, sqlstate.Kind.READ_ONLY)


class PostgresProcessor:
    """Runs one statement per job, a batch in one transaction; safe to call from several threads at once.

    A job's result is its statement's row as a dict, None where it returned no row (ON CONFLICT DO NOTHING, an UPDATE …
    RETURNING that met nothing), a list of dicts where it returned several. Without RETURNING an UPDATE, DELETE or MERGE
    gives the number of its rows as an int, any other command None.

    What a job gives for json, jsonb, an array or a domain of them is JSON, in every form: dict, list, tuple, bool,
    numbers, dates and uuids too, on any level; a str is JSON text as it stands, None is NULL. `Json` and `Jsonb`,
    psycopg's `set_json_dumps` and dumpers of your own win.

    A job that the database refuses fails alone, with psycopg's own error; the others are committed. When the
    answer to COMMIT is missing, the batch is looked up (`commit_guard`) and either completed or written anew.

    Args:
        conninfo: a connection string, or a `sqlalchemy.URL`: the processor makes its own connections, one per batch in
            flight, anew in each process. libpq's keywords, `postgresql://` or `postgres://`, `postgresql+psycopg://`
            and what else SQLAlchemy and Django write. Unless it names them, `connect_timeout`, the keep-alives,
            `tcp_user_timeout` and `application_name` are set. It reaches no log, no repr and no error.

            Or a callable that gives such a string: called when a connection is made, so it may read settings that come
            later, or a password that changes. Or a `sqlalchemy.Engine` on psycopg: connections of the processor's own,
            made as the engine makes its own, with `connect_args` and `do_connect` events.

            Or a callable that gives a context manager with a psycopg connection, called for each batch. The batch is
            committed before the context manager is left. Inside a transaction (one that has run a statement) it gets a
            savepoint instead, and a completed job is as true as the commit of that transaction. Nobody else may use
            the connection meanwhile. A bare connection would close itself on leaving: lend it with
            `contextlib.nullcontext`.

            Or an open `psycopg_pool.ConnectionPool` with connections to spare. Request threads that hold
            all of them while they wait for a future are a deadlock: their batch waits for a connection.
        statement: any single command, with psycopg's placeholders: `%(name)s` for jobs that have names (mappings,
            dataclasses, named tuples, rows of `sqlite3` or SQLAlchemy), `%s` for plain tuples and lists.
        on_job_error: `"isolate"`: the good jobs of a batch are committed, each bad one gets its own error.
            `"fail_batch"`: one bad job undoes its batch; it keeps its error, the others get `BatchRolledBack`.
        commit_guard: how to find out whether a COMMIT without an answer was carried out: `"ledger"` (a table,
            see `microbatch init-db`), `"xid"` (the server's memory of transactions, which a crash spoils),
            `"none"` (such a batch is `CommitUnknown` at once), `"auto"` (the ledger if it is there, else xid).
        sort_key: orders the jobs inside a batch, stably. Give the key that is updated or upserted, so that
            several processes take their row locks in one order and do not deadlock.

    Raises:
        ValueError: *conninfo* cannot be read, *statement* is empty, or an option has an unknown value.
        TypeError: one of them is of another type.
    """

    def __init__(
        self,
        conninfo: Conninfo,
        statement: Statement,
        *,
        on_job_error: Literal["isolate", "fail_batch"] = "isolate",
        commit_guard: Literal["auto", "ledger", "xid", "none"] = "auto",
        sort_key: Callable[[Any], Any] | None = None,
    ) -> None:
        isolates = _one_of("on_job_error", on_job_error, ("isolate", "fail_batch")) == "isolate"
        writer = StatementWriter(_checked(statement), isolates)
        self._set_up(conninfo, writer, commit_guard, sort_key, isolates)

    @classmethod
    def insert_into(
        cls,
        conninfo: Conninfo,
        table: str,
        columns: Sequence[str],
        *,
        returning: Literal["*"] | Sequence[str] | None = "*",
        on_conflict: str | sql.Composable | None = None,
        sort_key: Callable[[Any], Any] | None = None,
        overriding: Literal["system"] | None = None,
        strategy: Literal["auto", "keys", "merge", "statement"] = "auto",
        on_job_error: Literal["isolate", "fail_batch"] = "isolate",
        commit_guard: Literal["auto", "ledger", "xid", "none"] = "auto",
    ) -> PostgresProcessor:
        """A processor that inserts jobs as rows of *table*, a batch in one statement: the bulk form.

        Every value is sent as text and read by the server as the column's type, as a literal in SQL would be: 1.5
        for an integer column is an error and is not rounded. For JSON see the constructor. A datetime with a time zone
        becomes the session's local time where the column has none.

        Args:
            conninfo: as for the constructor.
            table: its name as in SQL: `payments`, `shop.payments`, `"Odd Name"`.
            columns: the columns that every job gives: by name if it has names (a mapping, a dataclass, a named tuple,
                a row), else in this order. The others get their defaults.
            returning: the columns of a job's row that is its result; None if no result is needed.
            on_conflict: SQL that follows ON CONFLICT, such as `(id) DO NOTHING`; such a job may have no row, and
                its result is None.
            overriding: `"system"`: OVERRIDING SYSTEM VALUE, so that the jobs may give the ids of an identity that is
                GENERATED ALWAYS, such as those of a dump.
            sort_key: as for the constructor.
            strategy: how; see `plan`. One that cannot be had for the table is refused by `open()`.
            on_job_error: as for the constructor.
            commit_guard: as for the constructor. Drawn keys need none, unless others delete rows as soon as they are
                there or set the sequence back: `"ledger"` takes a way without drawn keys.

        Raises:
            ValueError: an option has a wrong value; the message names it and the remedy.
            TypeError: one of them is of another type.
        """
        isolates = _one_of("on_job_error", on_job_error, ("isolate", "fail_batch")) == "isolate"
        self = cls.__new__(cls)
        has_ledger = commit_guard == "ledger"
        writer = TableWriter(table, columns, returning, on_conflict, strategy, isolates, has_ledger, overriding)
        self._set_up(conninfo, writer, commit_guard, sort_key, isolates)
        return self

    def _set_up(
        self,
        conninfo: Conninfo,
        writer: Writer,
        commit_guard: str,
        sort_key: Callable[[Any], Any] | None,
        isolates: bool,
    ) -> None:
        self._connections = connections_from(conninfo)
        self._writer = writer
        self._guards = Guards(_one_of("commit_guard", commit_guard, ("auto", "ledger", "xid", "none")))
        self._order = Order(sort_key)
        self._undecideds = Undecideds()
        self._suspects = Suspects(isolates)

    @property
    def plan(self) -> Plan | None:
        """How `insert_into` writes its table and why; None before `open()` or the first batch, and for statements."""
        return self._writer.plan

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with {self._connections}>"

    # Any: the statement decides between a row, several and none.
    def process(self, batch: Batch[Job], /) -> list[Any]:
        """Write *batch* and return its results in its order. Blocks until COMMIT is answered.

        Raises:
            psycopg.Error: the database or the way to it failed; nothing was written.
            CommitUnknown: the answer to COMMIT is missing; the subclass `Undecided` asks for another attempt.
        """
        if not len(batch):
            return []
        trial = Trial(batch, self._undecideds.get(batch), self._suspects.watch(batch))
        try:
            with self._connections.lend(batch, fresh=trial.watch.suspect is not None) as session:
                trial.watch.begin(session)
                try:
                    results = self._settled(session, trial)
                    if results is None:
                        results = self._written(session, trial)
                finally:
                    trial.watch.end()
                self._suspects.forget(batch)
                return results
        except BaseException as error:
            fresh = trial.fresh()
            try:
                verdict = self._undecideds.verdict(batch, trial.known, fresh, error)
                self._suspects.judge(batch, trial.watch, verdict)
            except BaseException:  # an interruption, which says nothing else
                verdict = self._undecideds.verdict(batch, trial.known, fresh, error)
            if verdict is error:
                raise
            raise verdict from error

    def _settled(self, session: Session, trial: Trial) -> list[Any] | None:
        """The results of an earlier attempt that was undecided; None if nothing is there, and all is to do."""
        if trial.known is not None:
            results = self._undecideds.settle(session, trial.batch, trial.known, trial.watch.has_broken_retry)
            if results is not None:
                return results
            trial.known = None
        self._suspects.sentence(trial.batch, trial.watch)
        return None

    def _written(self, session: Session, trial: Trial) -> list[Any]:
        trial.order = order = self._order.of(trial.batch)
        for look in range(_LOOKS):
            try:
                return order.restored(self._attempt(session, order, trial, again=look > 0).run())
            except Outdated:
                self._writer.forget(session)
                session.forget_prepared()
        raise TableChanging("the table is changed faster than it can be looked at")

    def _attempt(self, session: Session, order: Ordered, trial: Trial, again: bool) -> Attempt | Portable:
        attempt = trial.attempt = self._writer.attempt(session, order.batch, self._guards, again)
        attempt.is_suspect = trial.watch.suspect is not None
        return attempt

    def open(self) -> None:
        """Connect, so that an unreachable server shows at once. Blocks up to `connect_timeout` seconds.

        Raises:
            psycopg.Error: the server cannot be reached.
            ValueError: `commit_guard="ledger"`, and its table is not there, not writable or another one; the table of
                `insert_into` cannot be written as asked; or two columns of a result have one name.
        """
        with self._connections.visit() as session:
            if session is not None:
                self._guards.choose(session)
                self._writer.open(session)

    def close(self) -> None:
        """Close the idle ones of the connections made in this process; a later batch makes new ones."""
        self._connections.close(self._leave)

    def is_retryable(self, error: BaseException) -> bool:
        """Whether the same jobs may succeed when tried again; the table is in `docs/postgres.rst`. Override at will."""
        return isinstance(error, Undecided) or sqlstate.is_retryable(error)

    def column_of(self, error: BaseException) -> str | None:
        """The column that *error*, a job's own, is about; of a statement the placeholder's name, where that is nearer.

        None where the server does not tell, and for errors that are about no column. The same stands in a note of the
        exception and in its text. Never a value.
        """
        return column_of(error)

    def is_unavailable(self, error: BaseException) -> bool:
        """Whether *error* says that the server gave no answer, or takes no writes: one line in the log per outage."""
        return isinstance(error, Undecided) or sqlstate.kind_of(error) in _AWAY

    def describe(self, error: BaseException) -> str:
        """*error* on one line for the log: type, SQLSTATE, the text where it quotes no value, and which server."""
        return describe(error, self._connections.where)

    def abandon(self, batch: Batch[Job]) -> None:
        """Free the thread in `process(batch)` by cutting its connection; from any thread, without blocking.

        Borrowed connections are left alone. The server notices when the running statement ends.
        """
        self._connections.abandon(batch)

    def _leave(self, session: Session) -> None:
        if self._undecideds.is_empty():
            self._guards.leave(session)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def _checked(statement: Statement) -> Query:
    if not isinstance(statement, (str, bytes, sql.Composable)):
        raise TypeError(f"statement must be str, bytes or made by psycopg.sql, not {type(statement).__qualname__}")
    if _is_empty(statement):
        raise ValueError("statement is empty; pass an INSERT, UPDATE, DELETE or any other single command")
    return cast(Query, statement)


def _is_empty(statement: Statement) -> bool:
    # Part by part: rendering the whole would need a connection for the literals of some types.
    if isinstance(statement, sql.Composed):
        return all(_is_empty(part) for part in statement)
    if isinstance(statement, sql.SQL):
        return not statement.as_string(None).strip()
    return isinstance(statement, (str, bytes)) and not statement.strip()
