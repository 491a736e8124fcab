"""What the server stores every form returns: as Python's value, and as text where Python has none."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg.conninfo import make_conninfo

from microbatch.processors.postgres import PostgresProcessor, writer
from microbatch.protocols import Batch

pytestmark = pytest.mark.database

Make = Callable[..., PostgresProcessor]
FORMS = ("keys", "merge", "rows", "statement", "portable")


@pytest.fixture
def control(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        yield connection
    empty(shared_database)


@pytest.fixture
def make(shared_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds processors that write column `v` of `item` in one form, in sessions with *settings*."""
    with contextlib.ExitStack() as stack:

        def build(form: str, settings: str = "", **options: Any) -> PostgresProcessor:
            conninfo = make_conninfo(shared_database, options=settings)
            if form == "portable":
                monkeypatch.setattr(writer, "is_supported", lambda connection: False)
            if form in ("statement", "portable"):
                processor = PostgresProcessor(conninfo, "INSERT INTO item (v) VALUES (%s) RETURNING *", **options)
            else:
                way: Any = {"rows": "statement"}.get(form, form)
                processor = PostgresProcessor.insert_into(conninfo, "item", ["v"], strategy=way, **options)
            stack.callback(processor.close)
            return processor

        yield build


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, control: psycopg.Connection[Any]) -> str:
    if request.param == "merge" and control.info.server_version < 170000:
        pytest.skip("MERGE … RETURNING needs PostgreSQL 17")
    return str(request.param)


def a_batch(values: list[Any], id: str = "b1") -> Batch[Any]:
    return Batch([(value,) for value in values], id=id)


# Of each type a value that Python has, and what it has not.
VALUES: dict[str, tuple[Any, list[str]]] = {
    "date": (dt.date(2026, 1, 2), ["infinity", "-infinity", "10000-01-01", "0044-03-15 BC"]),
    "timestamp": (dt.datetime(2026, 1, 2, 3, 4), ["infinity", "10000-01-01 00:00:00", "0044-03-15 00:00:00 BC"]),
    "timestamptz": (
        dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.timezone.utc),
        ["infinity", "-infinity", "10000-01-01 00:00:00+00", "0044-03-15 00:00:00+00 BC"],
    ),
    "time": (dt.time(1, 2), ["24:00:00"]),
    "date[]": ([dt.date(2026, 1, 2)], ["{2026-01-02,infinity,NULL}"]),
    "daterange": (psycopg.types.range.Range(dt.date(2026, 1, 2), None, "[)"), ["[2026-01-02,infinity)"]),
    "jsonb": (psycopg.types.json.Jsonb([1]), ["1" * 5000]),
}


@pytest.mark.parametrize("type", VALUES)
@pytest.mark.parametrize("on_job_error", ["isolate", "fail_batch"])
def test_what_python_has_no_value_for_is_written_and_comes_back_as_text(
    make: Make, control: psycopg.Connection[Any], form: str, type: str, on_job_error: Any
) -> None:
    control.execute(f"CREATE TABLE item (id bigserial PRIMARY KEY, v {type}, note text DEFAULT 'n')".encode())
    good, texts = VALUES[type]
    processor = make(form, "-cTimeZone=UTC", on_job_error=on_job_error)

    rows = processor.process(a_batch([good, *texts, None, good]))
    alone = [row for i, text in enumerate(texts) for row in processor.process(a_batch([text], f"alone {i}"))]

    loaded = good.obj if isinstance(good, psycopg.types.json.Jsonb) else good
    assert [row["v"] for row in rows] == [loaded, *texts, None, loaded]
    assert [row["v"] for row in alone] == texts
    assert {row["note"] for row in rows + alone} == {"n"}
    assert all(isinstance(row["id"], int) for row in rows + alone)
    assert control.execute("SELECT count(*) FROM item").fetchone() == (len(rows) + len(alone),)


STYLES: dict[str, tuple[str, Any, Any]] = {
    "-cDateStyle=German": ("timestamptz", "2026-01-02 03:04:05+00", "02.01.2026 03:04:05 UTC"),
    "-cDateStyle=SQL,DMY": ("timestamptz", "2026-01-02 03:04:05+00", "02/01/2026 03:04:05 UTC"),
    "-cDateStyle=SQL,MDY": ("date", dt.date(2026, 1, 2), dt.date(2026, 1, 2)),
    "-cDateStyle=SQL,DMY ": ("date", dt.date(2026, 1, 2), dt.date(2026, 1, 2)),
    "-cDateStyle=Postgres,MDY": ("timestamptz", "2026-01-02 03:04:05+00", "Fri Jan 02 03:04:05 2026 UTC"),
    "-cIntervalStyle=iso_8601": ("interval", dt.timedelta(days=-1, seconds=3600), "P-1DT1H"),
    "-cIntervalStyle=sql_standard": ("interval", dt.timedelta(days=-1, seconds=3600), "+0-0 -1 +1:00:00"),
    "-cIntervalStyle=postgres_verbose": ("interval", dt.timedelta(days=-1, seconds=3600), "@ 1 day -1 hours ago"),
    "-cIntervalStyle=postgres": ("interval", dt.timedelta(days=-1, seconds=3600), dt.timedelta(days=-1, seconds=3600)),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_style_that_psycopg_does_not_read_is_no_error(
    make: Make, control: psycopg.Connection[Any], form: str, style: str
) -> None:
    kind, value, back = STYLES[style]
    control.execute(f"CREATE TABLE item (id bigserial PRIMARY KEY, v {kind})".encode())
    control.execute("SET TimeZone = 'UTC'")

    rows = make(form, f"{style.strip().replace(', ', ',')} -cTimeZone=UTC").process(a_batch([value, value]))

    assert [row["v"] for row in rows] == [back, back]
    expected = control.execute("SELECT count(*) FROM item WHERE v = %s", [value]).fetchone()
    assert expected == (2,)


def test_a_loader_of_the_users_that_fails_costs_the_job_nothing(
    make: Make, control: psycopg.Connection[Any], shared_database: str, form: str
) -> None:
    class Loader(psycopg.adapt.Loader):
        def load(self, data: Any) -> Any:
            raise LookupError(bytes(data))

    control.execute("CREATE TABLE item (id bigserial PRIMARY KEY, v text)")
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.adapters.register_loader("text", Loader)
        if form in ("statement", "portable"):
            make(form)
            insert = "INSERT INTO item (v) VALUES (%s) RETURNING *"
            processor = PostgresProcessor(lambda: contextlib.nullcontext(connection), insert)
        else:
            way: Any = {"rows": "statement"}.get(form, form)
            processor = PostgresProcessor.insert_into(
                lambda: contextlib.nullcontext(connection), "item", ["v"], strategy=way
            )
        assert [row["v"] for row in processor.process(a_batch(["a", "ü"]))] == ["a", "ü"]
    assert control.execute("SELECT count(*) FROM item").fetchone() == (2,)
