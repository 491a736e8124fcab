"""A connection while a batch uses it, and what is known of the server behind it."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from .connecting import Steps, Wait
from .conversions import encoding_of, recoded, settled
from .flight import Flight, Prepared, is_error

LEDGER = "microbatch_ledger"

_PATIENCE = 1000  # milliseconds for a lock, where there is no deadline
# Set aside to say what became of the batch: a part of the time until its deadline, and so many seconds at most.
_ASIDE, _MARGIN = 0.2, 0.25
# Of the time until then: for a flight, for one that commits, for a statement.
_SHARE, _COMMIT_SHARE, _STATEMENT_SHARE = 0.75, 0.5, 0.6
_REST = 5.0  # seconds for the rest of an answer that has begun to come
# Milliseconds. A server's timeouts are integers of 32 bits, and one of them is a little longer than the others.
_LONGEST = 2**31 - 1 - 60_000

# The life of a history of transactions: a crash changes the third part, a failover the second.
MARKER = settled("""
    (SELECT system_identifier FROM pg_control_system()) || '/' ||
    CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END || '/' ||
    (SELECT coalesce(extract(epoch FROM stats_reset)::text, '') FROM pg_stat_wal)""")

# Whether table c takes what the guard writes: a user's own table may have the name, or one of another version.
_IS_LEDGER = """(
    c.relkind IN ('r', 'p') AND NOT row_security_active(c.oid)
    AND 3 = (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped
        AND a.attgenerated = '' AND a.attidentity = '' AND (a.attname, a.atttypid) IN (
            ('lane', 'pg_catalog.uuid'::regtype), ('batch', 'pg_catalog.int8'::regtype),
            ('at', 'pg_catalog.timestamptz'::regtype)))
    AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attname NOT IN ('lane', 'batch'))
    AND EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'lane'
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL
        AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum))"""

_FACTS = settled(f"""
    SELECT pg_backend_pid(), current_setting('server_version_num'),
        (SELECT setting FROM pg_settings WHERE name = 'statement_timeout'),
        (SELECT setting FROM pg_settings WHERE name = 'lock_timeout'),
        (SELECT setting FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'),
        (SELECT extract(epoch FROM backend_start)::text FROM pg_stat_activity WHERE pid = pg_backend_pid()),
        l.name, l.is_ledger::int, (EXISTS (SELECT FROM pg_foreign_server))::int
    FROM (VALUES (1)) AS one LEFT JOIN (
        SELECT format('%I.%I', n.nspname, c.relname) AS name, {_IS_LEDGER} AS is_ledger
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = to_regclass('{LEDGER}') AND has_table_privilege(c.oid, 'SELECT')
            AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')) AS l ON true""")


_IN_DIGITS = (
    "SELECT encode(convert_to(q.found::pg_catalog.text,"
    " CASE WHEN getdatabaseencoding() = 'SQL_ASCII' THEN 'SQL_ASCII' ELSE 'UTF8' END), 'hex') FROM ({}) AS q(found)"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a new connection tells: once, for it stays true as long as the connection lives.

    *pooled*: something like pgbouncer stands in between, and transactions may meet another server process each.
    The timeouts are the session's own, in milliseconds, 0 for none. *marker* is None where it may not be read.
    """

    pooled: bool
    version: int
    statement_timeout: int
    lock_timeout: int
    idle_timeout: int
    ledger: str  # the ledger's name with its schema; empty where there is none for this role
    marker: str | None
    backend_start: str = ""
    not_ledger: str = ""  # a table of the ledger's name that is none
    has_foreign: bool = False  # whether a transaction may reach other servers


class Session:
    """One connection, lent to one batch, with its facts; *prepared* where it keeps prepared statements.

    *memory* is what others know through this connection, and lives as long.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        facts: Facts | None = None,
        prepared: Prepared | None = None,
        memory: dict[object, Any] | None = None,
        give_up: float | None = None,
    ) -> None:
        self.connection = connection
        self.give_up = give_up  # monotonic; no answer is waited for any longer
        self.facts = facts or ask(connection, give_up)
        self.memory: dict[object, Any] = {} if memory is None else memory
        self.prepared = None if self.facts.pooled else prepared
        self._flights = 0
        self._latest: Flight | None = None
        self.is_retired = False
        self.is_open = False  # a transaction, or a savepoint, that a batch has begun and not ended

    def flight(self, *, keep: bool = True, commits: bool = False) -> Flight:
        """A new flight; without *keep* it uses what is prepared and adds nothing.

        A silent link is given up before the deadline, so that there is time left to try again, and earlier by a flight
        that *commits*, so that there is time to find out.
        """
        give_up = self.give_up
        if give_up is not None:
            now = time.monotonic()
            give_up = now + (give_up - now) * (_COMMIT_SHARE if commits else _SHARE)
        self._flights += 1
        self._latest = Flight(self.connection, self.prepared, give_up, keep=keep)
        return self._latest

    def place(self) -> tuple[int, int]:
        """How far the batch is: the flights begun, and for one that broke the link the commands that were done."""
        return self._flights, 0 if self._latest is None else self._latest.answered

    @property
    def encoding(self) -> str:
        """Python's name for the encoding of SQL and of text."""
        return encoding_of(self.connection)

    def ask(self, command: bytes, *parameters: str | None) -> PGresult:
        """The answer to one command, in UTF-8 here, in a flight of its own. Raises the server's error."""
        encoded = [None if value is None else recoded(value.encode(), self.connection) for value in parameters]
        flight = self.flight(keep=False)
        flight.run(recoded(settled(command.decode()).encode(), self.connection), encoded)
        flight.sync()
        answer = flight.land()[0][-1]
        if is_error(answer):
            raise self.error(answer)
        return answer

    def ask_json(self, question: str, *parameters: str | None) -> Any:
        """The one value of *question*, which is JSON; None where it has no row.

        In hexadecimal digits, because a name need not fit into the client's encoding. In SQL_ASCII it may be no text.
        """
        answer = self.ask(_IN_DIGITS.format(question).encode(), *parameters)
        if not answer.ntuples:
            return None
        digits = (answer.get_value(0, 0) or b"").decode()
        return json.loads(bytes.fromhex(digits).decode("utf-8", "surrogateescape"))

    def describe(self, command: bytes, types: tuple[int, ...] = ()) -> PGresult:
        """The parameters and columns of *command*, which is not run; one round trip.

        Raises:
            psycopg.Error: the server cannot tell; nothing has happened to a transaction that is open.
        """
        return self._looked_at(lambda flight: flight.describe(command, types))[-1]

    def explain(self, commands: Sequence[tuple[bytes, int]]) -> None:
        """Have the server plan *commands*, each with the number of its parameters; none is run. One round trip.

        Raises:
            psycopg.Error: it refuses one of them; nothing has happened to a transaction that is open.
        """

        def queue(flight: Flight) -> None:
            for command, parameters in commands:
                flight.run(b"EXPLAIN " + command, [None] * parameters)

        self._looked_at(queue)

    def _looked_at(self, queue: Callable[[Flight], None]) -> list[PGresult]:
        is_inside = self.status == TransactionStatus.INTRANS
        flight = self.flight(keep=False)
        flight.run(b"SAVEPOINT microbatch_look" if is_inside else b"BEGIN")
        # Tables are locked for a moment, and somebody may be altering one of them.
        left = self.milliseconds_left()
        patience = _PATIENCE if left is None else max(1, left // 4)
        flight.run(b"SELECT set_config('lock_timeout', $1, true)", [b"%d" % patience])
        queue(flight)
        flight.sync()
        if is_inside:
            flight.run(b"ROLLBACK TO microbatch_look")
            flight.run(b"RELEASE microbatch_look")
        else:
            flight.run(b"ROLLBACK")
        flight.sync()
        answers = flight.land()[0]
        for answer in answers:
            if is_error(answer):
                raise self.error(answer)
        return answers

    def error(self, answer: PGresult) -> psycopg.Error:
        """psycopg's own error for a failed command."""
        return psycopg.errors.error_from_result(answer, self.encoding)

    def begin_command(self) -> bytes:
        """BEGIN, with what the user set on a connection of theirs."""
        connection = self.connection
        words = ["BEGIN"]
        if connection.isolation_level is not None:
            words.append("ISOLATION LEVEL " + psycopg.IsolationLevel(connection.isolation_level).name.replace("_", " "))
        if connection.read_only is not None:
            words.append("READ ONLY" if connection.read_only else "READ WRITE")
        if connection.deferrable is not None:
            words.append("DEFERRABLE" if connection.deferrable else "NOT DEFERRABLE")
        return " ".join(words).encode()

    def forget_prepared(self) -> bool:
        """Drop the prepared statements of this session; False if there are none."""
        if self.prepared is None or not self.prepared.names:
            return False
        self.prepared.names.clear()
        self.ask(b"DEALLOCATE ALL")
        return True

    def retire(self) -> None:
        """Have the connection closed when the batch gives it back, if it is ours: the next one may lead elsewhere."""
        self.is_retired = True

    @property
    def status(self) -> TransactionStatus:
        return self.connection.info.transaction_status

    def is_clean(self) -> bool:
        """Whether the next batch may begin on it; False if a transaction is left open or the link is gone."""
        info = self.connection.info
        if self.is_retired:
            return False
        return info.transaction_status == TransactionStatus.IDLE and info.pipeline_status == PipelineStatus.OFF

    def milliseconds_left(self) -> int | None:
        """For a statement, at least one; None without a limit. The server gives up before the flight does."""
        if self.give_up is None:
            return None
        left = int((self.give_up - time.monotonic()) * 1000 * _STATEMENT_SHARE)
        return min(_LONGEST, max(1, left))


def before(deadline: float | None) -> float | None:
    """When to give up for a batch with this *deadline*: while there is time to say that nothing was written."""
    if deadline is None:
        return None
    left = max(0.0, deadline - time.monotonic())
    return deadline - min(_MARGIN, left * _ASIDE)


def ask(connection: psycopg.Connection[Any], give_up: float | None = None) -> Facts:
    """Look at the server behind *connection*; one round trip, and no trace in a transaction that is open."""
    return _read(connection, _question(connection, give_up))


def asking(connection: psycopg.Connection[Any], seconds: float) -> Steps[Facts]:
    """The same, step by step: what the server is slow to answer, a later batch may read."""
    flight = _question(connection, time.monotonic() + seconds)
    flight.send()
    while connection.pgconn.is_busy():
        seconds = yield Wait(connection.pgconn.socket, select.POLLIN, seconds)
        connection.pgconn.consume_input()
    flight.extend(time.monotonic() + _REST)
    return _read(connection, flight)


def _question(connection: psycopg.Connection[Any], give_up: float | None) -> Flight:
    flight = Flight(connection, give_up=give_up)
    in_transaction = connection.info.transaction_status == TransactionStatus.INTRANS
    flight.run(_FACTS.encode())
    flight.sync()
    if not in_transaction:
        flight.run(f"SELECT {MARKER}".encode())
        flight.sync()
    return flight


def _read(connection: psycopg.Connection[Any], flight: Flight) -> Facts:
    (facts, *marker), encoding = flight.land(), encoding_of(connection)
    if is_error(facts[-1]):
        raise psycopg.errors.error_from_result(facts[-1], encoding)
    pid, version, *limits = (int(facts[-1].get_value(0, i) or 0) for i in range(5))
    ledger, is_ledger = _text(facts[-1], 6, encoding) or "", _text(facts[-1], 7) == "1"
    known = bool(marker) and not is_error(marker[0][-1])
    return Facts(
        pooled=pid != connection.info.backend_pid,
        version=version,
        statement_timeout=limits[0],
        lock_timeout=limits[1],
        idle_timeout=limits[2],
        ledger=ledger if is_ledger else "",
        not_ledger="" if is_ledger else ledger,
        marker=_text(marker[0][-1], 0) if known else None,
        backend_start=_text(facts[-1], 5) or "",
        has_foreign=_text(facts[-1], 8) == "1",
    )


def _text(answer: PGresult, column: int, encoding: str = "utf-8") -> str | None:
    value = answer.get_value(0, column)
    return None if value is None else value.decode(encoding)
