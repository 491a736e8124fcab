"""Tables of every shape, by every way that they take, with and without harm: the end is that of single INSERTs.

The ordinary run takes a sample in which each shape meets each way and each harm; `MICROBATCH_CI=full` takes all of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from conftest import new_database
from proxy import Harm, Message, Once, Proxy
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from shapes import SHAPES, Shape

from microbatch import MicroBatcher, RetryPolicy
from microbatch.errors import DeliveryTimeout, OutcomeUnknown
from microbatch.processors.postgres import PostgresProcessor

pytestmark = [pytest.mark.database, pytest.mark.slow]

FULL = os.environ.get("MICROBATCH_CI") == "full"
DEADLINE = 10.0  # seconds, which only faults need
BY_NAME = {shape.name: shape for shape in SHAPES}


def is_answered() -> Callable[[Message], bool]:
    """The end of the answer to what commits: everything is committed by then."""
    seen = threading.Event()

    def is_it(message: Message) -> bool:
        if message.to_server:
            return False
        if message.tag.partition(" ")[0] in ("INSERT", "MERGE", "COMMIT"):
            seen.set()
        if message.kind != "Z":
            return False
        has_committed = seen.is_set() and message.body == b"I"
        seen.clear()
        return has_committed

    return is_it


def is_batch(message: Message) -> bool:
    return message.to_server and message.kind == "B" and message.query.startswith(("INSERT", "MERGE"))


HARMS: dict[str, Callable[[], Once] | None] = {
    "none": None,
    "lost": lambda: Once(is_answered(), Harm.CUT),
    "swallowed": lambda: Once(is_batch, Harm.CUT),
    "isolation": None,
    "lost in isolation": lambda: Once(is_answered(), Harm.CUT),
}


@dataclass
class World:
    """A database for all shapes, each trial in a schema of its own."""

    conninfo: str
    control: psycopg.Connection[Any]
    proxy: Proxy
    extensions: frozenset[str]
    plain: dict[tuple[str, bool], Run]
    numbers: Iterator[int]

    def schema(self, shape: Shape, *, connection: psycopg.Connection[Any] | None = None) -> str:
        """A new one with the table of *shape*."""
        name = f"shape_{next(self.numbers)}"
        self.control.execute(f"CREATE SCHEMA {name}; GRANT USAGE ON SCHEMA {name} TO shape_user")
        connection = connection or self.control
        connection.execute(f"SET search_path = {name}, public")
        connection.execute(shape.sql.replace("{schema}", name).encode())
        if shape.role:
            connection.execute(shape.role.encode())
        return name

    def link(self, shape: Shape, schema: str, conninfo: str) -> str:
        options = f"-c search_path={schema},public {shape.options} {'-c role=shape_user' if shape.role else ''}"
        return make_conninfo(conninfo, options=options)


@dataclass
class Run:
    """What became of the jobs, and the rows of each table that is looked at."""

    outcomes: list[Any]
    rows: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(dsn: str) -> Iterator[World]:
    with new_database(dsn) as conninfo, contextlib.ExitStack() as stack:
        control = stack.enter_context(psycopg.connect(conninfo, autocommit=True, row_factory=dict_row))
        control.execute("SET client_min_messages = error")
        role = control.execute("SELECT FROM pg_roles WHERE rolname = 'shape_user'").fetchone()
        if role is None:
            control.execute("CREATE ROLE shape_user")
        stack.callback(lambda: control.execute("DROP OWNED BY shape_user; DROP ROLE shape_user"))
        proxy = stack.enter_context(Proxy(conninfo))
        yield World(conninfo, control, proxy, prepare(control, conninfo), {}, itertools.count(1))


def prepare(control: psycopg.Connection[Any], conninfo: str) -> frozenset[str]:
    rows = control.execute("SELECT name FROM pg_available_extensions").fetchall()
    there = frozenset(row["name"] for row in rows) & {"citext", "btree_gist", "postgres_fdw"}
    for name in there:
        control.execute(sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(name)))
    if "postgres_fdw" in there:
        given = conninfo_to_dict(conninfo)
        control.execute(
            sql.SQL(
                "CREATE SERVER loopback FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host {}, port {}, dbname {});"
                "CREATE USER MAPPING FOR PUBLIC SERVER loopback OPTIONS (user {}, password {})"
            ).format(*(str(given.get(name) or "") for name in ("host", "port", "dbname", "user", "password")))
        )
    return there


# The jobs, and what single INSERTs make of them


def parts(shape: Shape, has_bad: bool) -> list[list[tuple[Any, ...]]]:
    """One job alone, a batch that meets the harm, and a batch after it."""
    first, middle, last = list(shape.jobs[:1]), list(shape.jobs[1:6]), list(shape.jobs[6:])
    if has_bad:
        assert shape.bad is not None
        middle.insert(2, shape.bad)
    return [first, middle, last]


def plainly(world: World, shape: Shape, has_bad: bool) -> Run:
    """What psycopg does by itself, one INSERT after the other."""
    key = (shape.name, has_bad)
    if key not in world.plain:
        with psycopg.connect(world.conninfo, autocommit=True) as owner:
            if shape.is_lent:
                owner.execute("SET client_min_messages = error")
            schema = world.schema(shape, connection=owner)
            jobs = [job for part in parts(shape, has_bad) for job in part]
            if shape.is_lent:
                world.plain[key] = Run([alone(owner, shape, job) for job in jobs], rows_of(owner, shape))
            else:
                with psycopg.connect(world.link(shape, schema, world.conninfo), autocommit=True) as connection:
                    outcomes = [alone(connection, shape, job) for job in jobs]
                world.plain[key] = Run(outcomes, rows_of(owner, shape))
    return world.plain[key]


def alone(connection: psycopg.Connection[Any], shape: Shape, job: tuple[Any, ...]) -> Any:
    try:
        with connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(insert(shape).encode(), job)
            return cursor.fetchone() if cursor.description else None
    except psycopg.Error as error:
        return error


def insert(shape: Shape) -> str:
    names = ", ".join(map(quoted, shape.columns))
    values = ", ".join(["%s"] * len(shape.columns))
    back = "" if shape.returning is None else " RETURNING "
    back += "*" if shape.returning == "*" else ", ".join(map(quoted, shape.returning or ()))
    return f"INSERT INTO {shape.table} ({names})".replace("%", "%%") + f" VALUES ({values})" + back.replace("%", "%%")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def rows_of(connection: psycopg.Connection[Any], shape: Shape) -> list[list[dict[str, Any]]]:
    """The tables that are compared, and at last the one that the jobs go into."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return [
            cursor.execute(f"SELECT * FROM {table}{' AS x' if '(' in table[:1] else ''}".encode()).fetchall()
            for table in (*shape.tables, shape.table)
        ]


# What the processor makes of them


@dataclass
class Trial:
    """One shape, by one way, with one harm."""

    world: World
    shape: Shape
    way: str
    harm: str

    def run(self) -> list[str] | None:
        """What is wrong; None where the way cannot be had."""
        self.wrong: list[str] = []
        with contextlib.ExitStack() as stack:
            self.owner = stack.enter_context(psycopg.connect(self.world.conninfo, autocommit=True))
            self.owner.execute("SET client_min_messages = error")
            self.schema = self.world.schema(self.shape, connection=self.owner)
            self.processor = self.make()
            stack.callback(self.processor.close)
            if not self.can_be_had():
                return None
            jobs = parts(self.shape, "isolation" in self.harm)
            outcomes = self.outcomes(jobs)
            if len(outcomes) < sum(map(len, jobs)):
                return self.wrong
            if self.shape.is_lent and all(isinstance(each, ValueError) for each in outcomes):
                return None  # nobody looks at a lent connection before the first batch
            self.settle()
            run = Run(outcomes, rows_of(self.owner, self.shape))
            self.judge([job for part in jobs for job in part], run)
            self.look_for_wrong_rows()
        return self.wrong

    def make(self) -> PostgresProcessor:
        shape = self.shape
        source: Any = self.world.link(shape, self.schema, self.world.proxy.conninfo)
        if shape.is_lent:
            source = lambda: contextlib.nullcontext(self.owner)  # noqa: E731
        if self.way == "form":
            return PostgresProcessor(source, insert(shape))
        return PostgresProcessor.insert_into(
            source,
            shape.table,
            shape.columns,
            returning=shape.returning,
            strategy=self.way,  # type: ignore[arg-type]
        )

    def can_be_had(self) -> bool:
        try:
            self.processor.open()
        except ValueError as error:
            if self.way in ("keys", "merge") and "cannot be had" in str(error):
                return False
            raise
        return True

    def outcomes(self, jobs: list[list[tuple[Any, ...]]]) -> list[Any]:
        first, middle, last = jobs
        retry = RetryPolicy(backoff=0.01, backoff_max=0.05)
        with MicroBatcher(self.processor, retry=retry, delivery_timeout=DEADLINE) as batcher:
            found = self.written(batcher, first)
            if not self.is_ended(found):
                return []
            self.since = self.owner.execute("SELECT clock_timestamp()").fetchone()[0]  # type: ignore[index]
            make = HARMS[self.harm]
            plan = self.world.proxy.plan = make() if make else None
            found += self.written(batcher, middle)
            self.world.proxy.plan = None
            if plan is not None and not plan.fired.is_set():
                self.wrong.append("the harm was not done")
            if not self.is_ended(found):
                return []
            found += self.written(batcher, last)
        return found

    def is_ended(self, outcomes: Sequence[Any]) -> bool:
        """Whether each job has an end that it can have; what takes all of its time is not tried with more of them."""
        endless = [each for each in outcomes if isinstance(each, (DeliveryTimeout, OutcomeUnknown))]
        if not endless or (self.shape.may_be_unknown and "lost" in self.harm):
            return True
        self.wrong.append(f"{len(endless)} jobs have no certain end, the first with {endless[0]!r}")
        return False

    def written(self, batcher: MicroBatcher[Any, Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        futures = batcher.submit_many(list(jobs))
        wait(futures, 20)
        return [future.exception(0) or future.result(0) for future in futures]

    def settle(self) -> None:
        """Wait until no transaction is open that may still change the tables."""
        give_up = time.monotonic() + 10
        others = (
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_xid IS NOT NULL"
        )
        while self.owner.execute(others).fetchone() is not None and time.monotonic() < give_up:
            time.sleep(0.005)

    def judge(self, jobs: list[tuple[Any, ...]], run: Run) -> None:
        plain = plainly(self.world, self.shape, "isolation" in self.harm)
        is_unsure = self.shape.may_be_unknown and "lost" in self.harm
        for job, outcome, wanted in zip(jobs, run.outcomes, plain.outcomes, strict=True):
            if not (is_unsure and isinstance(outcome, OutcomeUnknown)):
                self.judge_job(job, outcome, wanted, run.rows[-1])
        whole = [result for result in run.outcomes if isinstance(result, dict)]
        if self.shape.masked and self.shape.returning == "*" and len(set(map(repr, whole))) != len(whole):
            self.wrong.append("two jobs have one row")
        for table, got, wanted in zip(self.shape.tables, run.rows, plain.rows, strict=False):
            self.judge_table(table, self.masked(got), self.masked(wanted), is_unsure)

    def judge_job(self, job: tuple[Any, ...], outcome: Any, wanted: Any, rows: list[dict[str, Any]]) -> None:
        if isinstance(wanted, Exception) or isinstance(outcome, Exception):
            state, wished = (getattr(each, "sqlstate", each) for each in (outcome, wanted))
            if state != wished or not isinstance(outcome, Exception):
                self.wrong.append(f"{job} ends with {outcome!r}, alone with {wanted!r}")
        elif (outcome is None) is not (wanted is None):
            self.wrong.append(f"{job} gives {outcome!r}, alone {wanted!r}")
        elif outcome is not None:
            if self.masked([outcome]) != self.masked([wanted]):
                self.wrong.append(f"{job} gives {outcome!r}, alone {wanted!r}")
            names = [name for name in outcome if not self.shape.is_rewritten or name in self.shape.masked]
            if not any(all(repr(row[name]) == repr(outcome[name]) for name in names) for row in rows):
                self.wrong.append(f"{job} gives {outcome!r}, which is no row of the table")

    def judge_table(self, table: str, got: Counter[str], wanted: Counter[str], is_unsure: bool) -> None:
        lost, doubled = wanted - got, got - wanted
        if doubled or (lost and not is_unsure):
            self.wrong.append(f"{table}: lost {dict(lost)}, too many {dict(doubled)}")

    def masked(self, rows: list[dict[str, Any]]) -> Counter[str]:
        masked = self.shape.masked
        return Counter(repr({name: value for name, value in row.items() if name not in masked}) for row in rows)

    def look_for_wrong_rows(self) -> None:
        if self.shape.wrong:
            found = self.owner.execute(self.shape.wrong.encode(), {"since": self.since}).fetchall()
            if found:
                self.wrong.append(f"rows that must not be: {found}")


def trials() -> list[tuple[str, str, str]]:
    """Every shape by every way with every harm; in the ordinary run each pair of them."""
    chosen = []
    for number, shape in enumerate(SHAPES):
        for place, way in enumerate(shape.ways):
            for harm in shape.faults:
                if FULL or way == "auto" or harm == shape.faults[(number + place) % len(shape.faults)]:
                    chosen.append((shape.name, way, harm))
    return chosen


@pytest.mark.parametrize(("name", "way", "harm"), trials())
def test_P4_a_table_of_any_shape_ends_as_single_inserts_leave_it(world: World, name: str, way: str, harm: str) -> None:
    shape = BY_NAME[name]
    if world.control.info.server_version < shape.since:
        pytest.skip(f"PostgreSQL {shape.since // 10000} has it first")
    if shape.needs and shape.needs not in world.extensions:
        pytest.skip(f"this server has no {shape.needs}")

    wrong = Trial(world, shape, way, harm).run()

    if wrong is None:
        pytest.skip("this way cannot be had")
    assert not wrong, "\n".join(wrong)
