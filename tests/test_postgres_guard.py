"""What became of a batch when its link, its server or its thread dies around COMMIT. The verdict compares sets.

`MICROBATCH_GUARD_TRIALS=20` repeats every fault so often, cuts at every message and interrupts at every point.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import psycopg
import pytest
from chaos.verdict import Verdict, id_and_key, judge, outcome_of
from databases import empty
from interrupts import Interrupt, interrupted_everywhere
from proxy import Harm, Message, Once, Proxy, at_nth, behind_commit, is_commit, is_committed, mentions
from psycopg import sql
from psycopg.conninfo import make_conninfo

from microbatch import MicroBatcher, RetryPolicy
from microbatch.embedded import EmbeddedPostgres
from microbatch.errors import DeliveryTimeout, OutcomeUnknown
from microbatch.processors.postgres import CommitUnknown, PostgresProcessor, flight, session
from microbatch.processors.postgres.errors import Undecided
from microbatch.processors.postgres.guard import DDL
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

TRIALS = int(os.environ.get("MICROBATCH_GUARD_TRIALS", "0"))
TABLE = "CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY, key text NOT NULL)"  # nothing that hides a double
INSERT = "INSERT INTO item (key) VALUES (%(key)s) RETURNING id, key"
KEYS = itertools.count(1)


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    prepare(shared_database)
    yield shared_database
    empty(shared_database)


def prepare(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(TABLE)
        connection.execute(DDL)


def new_keys(count: int) -> list[str]:
    return [f"k{next(KEYS)}" for _ in range(count)]


def judged(conninfo: str, futures: dict[str, Any], timeout: float = 30.0) -> Verdict:
    """Waits for all *futures*, by key, and compares them with the rows of the table."""
    wait(futures.values(), timeout)
    rows = stored(conninfo)
    return judge(dict.fromkeys(futures), rows, {key: outcome_of(futures[key], id_and_key) for key in futures})


def stored(conninfo: str) -> list[tuple[int, str]]:
    """The table, when no transaction is open that may still change it."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        deadline = time.monotonic() + 20
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND backend_xid IS NOT NULL"
        while connection.execute(query).fetchone() and time.monotonic() < deadline:
            time.sleep(0.01)
        return connection.execute("SELECT id, key FROM item").fetchall()


class Naive:
    """What anybody would write first: the batch once more after a lost connection."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo

    def process(self, batch: Batch[Any]) -> list[Any]:
        with psycopg.connect(self._conninfo, row_factory=psycopg.rows.dict_row) as connection:
            return [connection.execute(INSERT, job).fetchone() for job in batch]

    def is_retryable(self, error: BaseException) -> bool:
        return isinstance(error, psycopg.OperationalError)


def nth_row(number: int) -> Callable[[Message], bool]:
    left = [number]

    def is_it(message: Message) -> bool:
        left[0] -= not message.to_server and message.kind == "D"
        return left[0] == 0

    return is_it


MOMENTS: dict[str, Callable[[], Once]] = {
    "before the batch": lambda: Once(mentions("BEGIN"), Harm.CUT),
    "inside the rows": lambda: Once(nth_row(3), Harm.CUT),
    "before COMMIT": lambda: Once(is_commit, Harm.CUT),
    "behind COMMIT": lambda: Once(behind_commit(), Harm.CUT_BEHIND),
    "before its answer": lambda: Once(is_committed, Harm.CUT),
    "inside its answer": lambda: Once(is_committed, Harm.CUT_INSIDE),
    "COMMIT swallowed": lambda: Once(is_commit, Harm.STALL),
    "its answer swallowed": lambda: Once(is_committed, Harm.STALL),
}
UNDECIDED = [name for name in MOMENTS if "COMMIT" in name or "answer" in name]


@pytest.mark.parametrize("guard", ["ledger", "xid", "none"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_P4_a_link_that_breaks_loses_and_doubles_nothing(database: str, moment: str, guard: str) -> None:
    silent = "swallowed" in moment
    total, fired = Verdict(), 0
    with Proxy(database) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor, delivery_timeout=6.0 if silent else 20.0) as batcher:
            futures: dict[str, Any] = {}
            for trial in range(TRIALS or (1 if silent else 3)):
                # The second one finds everything prepared, the third isolates a bad job.
                proxy.plan = plan = MOMENTS[moment]()
                keys = new_keys(5)
                jobs: list[Any] = [{"key": key} for key in keys] + [{"key": None}] * (trial % 3 == 2)
                submitted = batcher.submit_many(jobs)
                futures |= dict(zip(keys, submitted, strict=False))
                wait(submitted, 30)
                fired += plan.fired.is_set()
                for bad in submitted[5:]:
                    assert isinstance(bad.exception(0), (psycopg.errors.NotNullViolation, OutcomeUnknown))
            total += judged(database, futures)

    assert fired == (TRIALS or (1 if silent else 3))
    assert not total.violations()
    assert len(total.unknown) == (len(futures) if guard == "none" and moment in UNDECIDED else 0)


def test_the_naive_retry_doubles_under_the_same_faults(database: str) -> None:
    """Or the faults are too weak."""
    moments = [MOMENTS[name] for name in ("behind COMMIT", "before its answer", "inside its answer")]

    assert doubled(database, Naive, moments) == 15


OTHERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


def doubled(database: str, make: Callable[[str], Any], moments: list[Callable[[], Once]]) -> int:
    """Of five jobs a moment, those that a processor without our care writes twice."""
    total = Verdict()
    for moment in moments:
        with Proxy(database, moment()) as proxy, MicroBatcher(make(proxy.conninfo)) as batcher:
            keys = new_keys(5)
            futures = dict(zip(keys, batcher.submit_many([{"key": key} for key in keys]), strict=True))
            wait(futures.values(), 30)
            with psycopg.connect(database, autocommit=True) as connection:
                give_up = time.monotonic() + 20
                # A backend that was cut off may not have read its last command yet.
                while connection.execute(OTHERS).fetchone() > (1,):
                    assert time.monotonic() < give_up
                    time.sleep(0.01)
                total += judged(database, futures)
                connection.execute("TRUNCATE item")
    return len(total.doubled)


@pytest.mark.parametrize("guard", ["ledger", "xid"])
@pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the client"])
def test_P4_a_cut_before_any_message_loses_and_doubles_nothing(database: str, guard: str, to_server: bool) -> None:
    futures: dict[str, Any] = {}
    harms = itertools.cycle([Harm.CUT, Harm.CUT_INSIDE, Harm.CUT_BEHIND])
    with Proxy(database) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor) as batcher:
            for number in itertools.count(1, 1 if TRIALS else 5):
                proxy.plan = plan = at_nth(number, to_server, next(harms))
                keys = new_keys(2)
                submitted = batcher.submit_many([{"key": key} for key in keys])
                futures |= dict(zip(keys, submitted, strict=True))
                wait(submitted, 30)
                if not plan.fired.is_set():
                    break
            verdict = judged(database, futures)

    assert number > 15
    assert not verdict.violations()
    assert not verdict.unknown


# Servers that die


@pytest.fixture(scope="module")
def own_server(binaries: None) -> Iterator[EmbeddedPostgres]:
    """Durable, for it is crashed."""
    with EmbeddedPostgres(shared_buffers="32MB") as server:
        prepare(server.dsn)
        yield server


@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.parametrize("guard", ["ledger", "xid"])
@pytest.mark.parametrize("is_it", [is_commit, is_committed], ids=["before COMMIT", "before its answer"])
def test_P4_a_server_that_restarts_around_commit(
    own_server: EmbeddedPostgres, is_it: Callable[[Message], bool], guard: str, mode: str
) -> None:
    restarted = threading.Event()

    def plan(message: Message) -> Harm | None:
        if restarted.is_set() or not is_it(message):
            return None
        restarted.set()
        own_server.restart(mode)
        return Harm.CUT

    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE item")
    with Proxy(own_server.dsn, plan) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor, delivery_timeout=30) as batcher:
            keys = new_keys(5)
            futures = dict(zip(keys, batcher.submit_many([{"key": key} for key in keys]), strict=True))
            verdict = judged(own_server.dsn, futures, 60)

    assert not verdict.violations()
    crashed_after_commit = mode == "immediate" and is_it is is_committed
    assert len(verdict.unknown) == (5 if guard == "xid" and crashed_after_commit else 0)


def test_P4_a_transaction_id_that_was_given_out_again_after_a_crash_proves_nothing(
    own_server: EmbeddedPostgres,
) -> None:
    """The log of the first attempt was not flushed, so its id comes again and is soon somebody else's commit."""
    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE item")
    batch = Batch([{"key": key} for key in new_keys(3)], id="b1")
    with Proxy(own_server.dsn, Once(is_commit, Harm.CUT)) as proxy:
        processor = PostgresProcessor(proxy.conninfo, INSERT, commit_guard="xid")
        with pytest.raises(Undecided) as caught:
            processor.process(batch)
        own_server.restart("immediate")
        xid = int(str(caught.value.lookup).split("'")[1])
        with psycopg.connect(own_server.dsn, autocommit=True) as connection:
            while connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() <= (xid,):  # type: ignore[operator]
                pass
        with contextlib.suppress(CommitUnknown):
            processor.process(batch)
        processor.close()

    assert max(Counter(key for _, key in stored(own_server.dsn)).values(), default=0) <= 1


@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.parametrize("guard", ["ledger", "xid"])
def test_P4_P5_a_server_that_restarts_while_jobs_flow(own_server: EmbeddedPostgres, guard: str, mode: str) -> None:
    with psycopg.connect(own_server.dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE item")
    processor = PostgresProcessor(own_server.dsn, INSERT, commit_guard=guard)  # type: ignore[arg-type]
    futures: dict[str, Any] = {}
    with MicroBatcher(processor, max_batch_size=20, delivery_timeout=20, max_concurrent_batches=2) as batcher:
        done = threading.Event()

        def submit() -> None:
            while not done.is_set():
                for key in new_keys(5):
                    futures[key] = batcher.submit({"key": key})
                done.wait(0.005)

        thread = threading.Thread(target=submit)
        thread.start()
        time.sleep(0.3)
        own_server.restart(mode)
        time.sleep(0.3)
        give_up = time.monotonic() + 20
        while len(futures) <= 100 and time.monotonic() < give_up:
            time.sleep(0.01)
        done.set()
        thread.join()
        verdict = judged(own_server.dsn, futures, 21)

    assert not verdict.violations()
    assert len(verdict.unknown) <= (40 if guard == "xid" and mode == "immediate" else 0)
    assert len(futures) > 100


def test_P4_killed_backends_lose_and_double_nothing(database: str) -> None:
    processor = PostgresProcessor(database, INSERT)
    futures: dict[str, Any] = {}
    kills = 0
    with (
        MicroBatcher(processor, max_batch_size=10, max_concurrent_batches=2) as batcher,
        psycopg.connect(database, autocommit=True) as control,
    ):
        deadline = time.monotonic() + (20 if TRIALS else 2)
        while time.monotonic() < deadline:
            for key in new_keys(40):
                futures[key] = batcher.submit({"key": key})
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'microbatch' AND pid <> pg_backend_pid()"
            )
            kills += len(control.execute(query).fetchall())
            time.sleep(0.01)
        verdict = judged(database, futures)

    assert kills > 10
    assert not verdict.violations()
    assert not verdict.unknown


# Servers that are there and of no use


def out_of_time(processor: PostgresProcessor, job: Any) -> DeliveryTimeout:
    """What becomes of a job whose next attempt would come after its deadline."""
    never = RetryPolicy(backoff=1e6, backoff_max=1e6)
    with MicroBatcher(processor, retry=never, delivery_timeout=2) as batcher:
        error = batcher.submit(job).exception(5)
    assert isinstance(error, DeliveryTimeout)
    return error


def test_P5_too_many_connections_are_waited_out(database: str) -> None:
    role = f"guest_{os.urandom(4).hex()}"
    with psycopg.connect(database, autocommit=True) as control:
        control.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x' CONNECTION LIMIT 1").format(sql.Identifier(role)))
        control.execute(sql.SQL("GRANT ALL ON item, microbatch_ledger TO {}").format(sql.Identifier(role)))
        control.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(sql.Identifier(role)))
        conninfo = make_conninfo(database, user=role, password="x")
        try:
            with MicroBatcher(PostgresProcessor(conninfo, INSERT)) as batcher:
                with psycopg.connect(conninfo):
                    future = batcher.submit({"key": "a"})
                    late = out_of_time(PostgresProcessor(conninfo, INSERT), {"key": "b"})
                    assert isinstance(late.__cause__, psycopg.OperationalError)
                    assert not future.done()
                assert future.result(10)["key"] == "a"
        finally:
            empty(database)
            control.close()
            with psycopg.connect(database, autocommit=True) as again:
                again.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
                again.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize("guard", ["ledger", "xid"])
def test_P5_a_server_that_takes_no_writes_is_waited_out(database: str, guard: str) -> None:
    def set_read_only(value: str) -> None:
        with psycopg.connect(database, autocommit=True) as control:
            name = sql.Identifier(control.info.dbname)
            control.execute("SET default_transaction_read_only = off")
            control.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(name, value))

    set_read_only("on")
    try:
        processor = PostgresProcessor(database, INSERT, commit_guard=guard)  # type: ignore[arg-type]
        with MicroBatcher(processor) as batcher:
            future = batcher.submit({"key": "a"})
            late = out_of_time(PostgresProcessor(database, INSERT, commit_guard=guard), {"key": "b"})  # type: ignore[arg-type]
            assert isinstance(late.__cause__, psycopg.Error)
            set_read_only("off")
            assert future.result(10)["key"] == "a"
    finally:
        set_read_only("off")


@pytest.mark.parametrize(
    "moment",
    [None, lambda: Once(mentions("BEGIN"), Harm.STALL), lambda: Once(nth_row(1), Harm.STALL), MOMENTS["before COMMIT"]],
    ids=["deaf", "before the batch", "inside the rows", "at every COMMIT"],
)
def test_P5_a_silent_server_holds_up_no_job_beyond_its_deadline_and_no_worker(database: str, moment: Any) -> None:
    with Proxy(database) as proxy:
        processor = PostgresProcessor(make_conninfo(proxy.conninfo, connect_timeout=2), INSERT)
        with MicroBatcher(processor, delivery_timeout=1.5) as batcher:
            if moment is None:
                proxy.is_deaf = True
            else:
                proxy.plan = lambda message: Harm.STALL if moment()(message) else None
            began = time.monotonic()
            keys = new_keys(5)
            futures = dict(zip(keys, batcher.submit_many([{"key": key} for key in keys]), strict=True))
            assert not wait(futures.values(), 10).not_done
            took = time.monotonic() - began
            proxy.is_deaf, proxy.plan = False, None
            assert batcher.submit({"key": "after"}, delivery_timeout=10).result(12)["key"] == "after"
            futures["after"] = batcher.submit({"key": "again"})
            with psycopg.connect(database, autocommit=True) as control:
                control.execute("DELETE FROM item WHERE key = 'after'")
            futures = {key: future for key, future in futures.items() if key in keys} | {"again": futures["after"]}
            verdict = judged(database, futures)

    assert took < 2.5
    assert not verdict.violations()
    if moment is MOMENTS["before COMMIT"]:
        # Those that a last attempt was made for are known not to be written.
        assert len(verdict.unknown) + len(verdict.expired) == 5


# Threads that are interrupted


class Told:
    """Calls the processor as the worker does, and remembers what it said of each batch."""

    def __init__(self, processor: PostgresProcessor) -> None:
        self.processor = processor
        self._outcomes: dict[str, BaseException | list[Any]] = {}

    def __call__(self, batch: Batch[Any]) -> None:
        # An interruption between the return of the one and of the other loses nothing.
        results: list[Any] = []
        try:
            results.extend(map(self.processor.process, (batch,)))
        except BaseException as error:
            self._outcomes[batch.id] = results[0] if results else error
            raise
        self._outcomes[batch.id] = results[0]

    def final(self, batch: Batch[Any], was_undecided: bool) -> BaseException | list[Any] | None:
        """After as many attempts as it takes until the cut-off backend is gone; None if the interruption was outside of
        the processor.
        """
        # Not kept: its traceback holds what was half connected.
        outcome = self._outcomes.pop(batch.id, None)
        # To the worker a batch that was undecided before an interruption is so after it.
        undecided = (Undecided, Interrupt) if was_undecided else Undecided
        give_up = time.monotonic() + 20
        while isinstance(outcome, undecided) and time.monotonic() < give_up:
            try:
                outcome = self.processor.process(batch)
            except Undecided:
                time.sleep(0.01)
        return outcome


def new_batch() -> Batch[Any]:
    return Batch([{"key": key} for key in new_keys(2)], id=str(next(KEYS)))


# An interruption between connecting and taking note of it leaves the connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("guard", ["ledger", "xid"])
@pytest.mark.parametrize("source", ["own", "borrowed"])
@pytest.mark.parametrize("before", ["nothing", "COMMIT lost", "its answer lost"])
def test_P4_an_interruption_at_any_point_tells_no_lie(
    database: str, monkeypatch: pytest.MonkeyPatch, before: str, source: str, guard: str
) -> None:
    connections: list[psycopg.Connection[Any]] = []

    def lend() -> Any:
        if not connections or connections[-1].closed:
            connections.append(psycopg.connect(database))
        return contextlib.nullcontext(connections[-1])

    conninfo = database if source == "own" else lend
    processor = PostgresProcessor(conninfo, INSERT, commit_guard=guard)  # type: ignore[arg-type]
    told = Told(processor)

    def prepared() -> Batch[Any]:
        batch = new_batch()
        if before != "nothing":
            with pytest.raises(Undecided), losing(monkeypatch, before):
                processor.process(batch)
        processor.process(new_batch())  # so that it is connected
        return batch

    points = 0
    with psycopg.connect(database, autocommit=True) as control:
        for where, batch in interrupted_everywhere(prepared, told, step=1 if TRIALS else 41):
            points += 1
            if points % 10 == 0:
                gc.collect()
            outcome = told.final(batch, before != "nothing")
            keys = [job["key"] for job in batch]
            found = control.execute("SELECT key FROM item WHERE key = ANY (%s) ORDER BY id", (keys,)).fetchall()
            if isinstance(outcome, list):
                assert [row["key"] for row in outcome] == keys, where
                assert found == [(key,) for key in keys], where
            elif outcome is not None:
                assert isinstance(outcome, Interrupt), (where, outcome)
                assert found == [], (where, outcome)
    processor.close()
    while connections:
        connections.pop().close()
    gc.collect()  # here, where its warnings are expected

    assert points > 3


@contextlib.contextmanager
def losing(monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    """The link breaks at the next COMMIT."""
    land = flight.Flight.land

    def breaking(self: flight.Flight) -> Any:
        if what == "COMMIT lost":
            self._connection.close()
        answers = land(self)
        self._connection.close()
        raise psycopg.OperationalError(f"lost {answers}")

    def choosing(self: Any, *, keep: bool = True, commits: bool = False) -> flight.Flight:
        made = fly(self, keep=keep, commits=commits)
        if commits:
            made.land = breaking.__get__(made)  # type: ignore[method-assign]
        return made

    fly = session.Session.flight
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "flight", choosing)
        yield


def test_P4_the_ledger_is_the_one_of_the_first_attempt(database: str) -> None:
    """Whatever schema the next connection looks into first: an empty ledger there would say "nothing"."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA tenant")
        connection.execute(DDL.replace("microbatch_ledger", "tenant.microbatch_ledger"))
        with Proxy(database, MOMENTS["before its answer"]()) as proxy:
            paths = iter(["public", "tenant,public", "tenant,public"])

            def source() -> psycopg.Connection[Any]:
                return psycopg.connect(proxy.conninfo, autocommit=True, options=f"-csearch_path={next(paths)}")

            processor = PostgresProcessor(source, INSERT)
            batch = Batch([{"key": key} for key in new_keys(3)], id="b1")
            with pytest.raises(Undecided) as caught:
                processor.process(batch)
            assert "public.microbatch_ledger" in str(caught.value.lookup)
            results = processor.process(batch)
        connection.execute("DROP SCHEMA tenant CASCADE")

    assert sorted(stored(database)) == sorted((row["id"], row["key"]) for row in results)
    assert len(results) == 3
