"""In somebody else's transaction deferred constraints are checked for the batch, and stay deferred for its owner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg.pq import TransactionStatus

from microbatch.errors import MicrobatchError
from microbatch.processors.postgres import PostgresProcessor
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

TABLES = """
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE item (
        id bigserial PRIMARY KEY,
        parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED,
        n int CONSTRAINT once UNIQUE DEFERRABLE INITIALLY DEFERRED CHECK (n >= 0));
    INSERT INTO parent VALUES (1)"""
INSERT = "INSERT INTO item (parent, n) VALUES (%(parent)s, %(n)s) RETURNING *"
WAYS: dict[str, Callable[..., PostgresProcessor]] = {
    "statement": lambda source, **options: PostgresProcessor(source, INSERT, **options),
    "insert_into": lambda source, **options: PostgresProcessor.insert_into(source, "item", ["parent", "n"], **options),
    "portable": lambda source, **options: PostgresProcessor(source, INSERT, **options),
}


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    with psycopg.connect(shared_database, autocommit=True) as control:
        control.execute(TABLES)
    yield shared_database
    empty(shared_database)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def owner(database: str, way: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection inside a transaction."""
    factory = psycopg.ClientCursor if way == "portable" else psycopg.Cursor
    with contextlib.closing(psycopg.connect(database, cursor_factory=factory)) as connection:
        connection.execute("SELECT 1")
        yield connection


def processed(way: str, owner: psycopg.Connection[Any], jobs: list[Any], **options: Any) -> list[Any]:
    processor = WAYS[way](lambda: contextlib.nullcontext(owner), **options)
    results = processor.process(Batch(jobs, id="b1"))
    assert owner.info.transaction_status == TransactionStatus.INTRANS
    return results


def job(n: int, parent: int = 1) -> dict[str, int]:
    return {"parent": parent, "n": n}


def rows(owner: psycopg.Connection[Any]) -> dict[int, int]:
    return dict(owner.execute("SELECT id, n FROM item").fetchall())


def told(result: Any) -> Any:
    return (type(result), result.diag.constraint_name) if isinstance(result, psycopg.Error) else result["n"]


def test_P3_a_deferred_violation_fails_its_job_alone_inside_a_transaction(
    way: str, owner: psycopg.Connection[Any]
) -> None:
    jobs = [job(n, parent=7 if n % 30 == 5 else 1) for n in range(100)]
    jobs += [job(3), {"parent": 1, "n": -1}]
    results = processed(way, owner, jobs)

    foreign = (psycopg.errors.ForeignKeyViolation, "item_parent_fkey")
    assert [told(result) for result in results] == [
        *(foreign if n % 30 == 5 else n for n in range(100)),
        (psycopg.errors.UniqueViolation, "once"),
        (psycopg.errors.CheckViolation, "item_n_check"),
    ]
    # What is handed out is what is there, not what was undone.
    assert rows(owner) == {result["id"]: result["n"] for result in results if isinstance(result, dict)}
    owner.commit()


def test_P3_a_lone_job_meets_its_deferred_violation(way: str, owner: psycopg.Connection[Any]) -> None:
    [result] = processed(way, owner, [job(1, parent=7)])

    assert isinstance(result, psycopg.errors.ForeignKeyViolation)
    owner.commit()


def test_a_whole_batch_fails_for_a_deferred_violation(way: str, owner: psycopg.Connection[Any]) -> None:
    batch = [job(1), job(2, parent=7), job(3)]
    with contextlib.suppress(psycopg.errors.ForeignKeyViolation):
        results = processed(way, owner, batch, on_job_error="fail_batch")
        assert [isinstance(result, (psycopg.Error, MicrobatchError)) for result in results] == [True] * 3

    assert rows(owner) == {}
    owner.commit()


@pytest.mark.parametrize("jobs", [[job(1)], [job(1), job(2, parent=7)]], ids=["all right", "one wrong"])
def test_what_the_owner_has_deferred_stays_deferred(way: str, owner: psycopg.Connection[Any], jobs: list[Any]) -> None:
    processed(way, owner, jobs)
    owner.execute("INSERT INTO item (parent, n) VALUES (8, 8)")
    owner.execute("INSERT INTO parent VALUES (8)")
    owner.commit()

    assert sorted(rows(owner).values()) == [1, 8]


def test_what_the_owner_has_made_immediate_stays_immediate(way: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("SET CONSTRAINTS ALL IMMEDIATE")
    good, bad = processed(way, owner, [job(1), job(2, parent=7)])

    assert good["n"] == 1
    assert isinstance(bad, psycopg.errors.ForeignKeyViolation)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        owner.execute("INSERT INTO item (parent, n) VALUES (8, 8)")


def test_a_violation_of_the_owners_own_is_not_blamed_on_a_job(way: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("INSERT INTO item (parent, n) VALUES (9, 9)")
    results = processed(way, owner, [job(1), job(-1), job(2, parent=7)])

    assert [told(result) for result in results] == [1, (psycopg.errors.CheckViolation, "item_n_check"), 2]
    owner.execute("INSERT INTO parent VALUES (7), (9)")
    owner.commit()


def test_a_deferred_trigger_of_the_owner_fires_once(way: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("CREATE TABLE seen (n int)")
    owner.execute(
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO seen VALUES (NEW.n); RETURN NULL; END $$"
    )
    owner.execute(
        "CREATE CONSTRAINT TRIGGER see AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION see()"
    )
    owner.execute("INSERT INTO item (parent, n) VALUES (1, 10)")
    processed(way, owner, [job(11), job(12)])
    assert owner.execute("SELECT count(*) FROM seen").fetchone() == (0,)
    owner.commit()

    assert sorted(owner.execute("SELECT n FROM seen").fetchall()) == [(10,), (11,), (12,)]


def test_nothing_is_written_twice_where_nothing_can_be_deferred(way: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("DROP TABLE item")
    owner.execute("CREATE TABLE item (id bigserial PRIMARY KEY, parent int, n int)")
    results = processed(way, owner, [job(1), job(2)])

    assert [result["id"] for result in results] == [1, 2]
