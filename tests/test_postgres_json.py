"""One rule for JSON in every form: what a value means for json, jsonb, their arrays and domains over them."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import json
import types
import uuid
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from databases import empty
from psycopg.types.json import Json, Jsonb, JsonbDumper, set_json_dumps

from microbatch import MicroBatcher
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.documents import dumps
from microbatch.processors.postgres.session import Session
from microbatch.protocols import Batch

TABLE = """
    CREATE DOMAIN doc AS jsonb; CREATE DOMAIN paper AS doc CHECK (VALUE <> '"no"'); CREATE DOMAIN old AS json;
    CREATE DOMAIN docs AS jsonb[]; CREATE DOMAIN more AS docs;
    CREATE TABLE item (id bigserial PRIMARY KEY, n int, numbers int[],
        json json, jsonb jsonb, doc doc, paper paper, old old,
        jsons json[], jsonbs jsonb[], papers paper[], docs docs, more more)
"""
DOCUMENTS = ["json", "jsonb", "doc", "paper", "old"]
ARRAYS = ["jsons", "jsonbs", "papers", "docs", "more"]
UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")
WHEN = dt.datetime(2026, 1, 2, 3, 4, 5, 6, dt.timezone.utc)

FORMS: dict[str, Callable[[Any, str], PostgresProcessor]] = {
    "keys": lambda dsn, column: PostgresProcessor.insert_into(
        dsn, "item", ["n", column], returning=["n"], strategy="keys"
    ),
    "merge": lambda dsn, column: PostgresProcessor.insert_into(
        dsn, "item", ["n", column], returning=["n"], strategy="merge"
    ),
    "rows": lambda dsn, column: PostgresProcessor.insert_into(
        dsn, "item", ["n", column], returning=["n"], strategy="statement"
    ),
    "names": lambda dsn, column: PostgresProcessor(
        dsn, f"INSERT INTO item (n, {column}) VALUES (%(n)s, %({column})s) RETURNING n"
    ),
    "numbers": lambda dsn, column: PostgresProcessor(
        dsn, f"INSERT INTO item (n, {column}) VALUES (%s, %s) RETURNING n"
    ),
}


@pytest.fixture
def control(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(shared_database, autocommit=True) as connection:
        connection.execute(TABLE)
        yield connection
    empty(shared_database)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, control: psycopg.Connection[Any]) -> str:
    if request.param == "merge" and control.info.server_version < 170000:
        pytest.skip("MERGE … RETURNING came with PostgreSQL 17")
    return str(request.param)


def stored(control: psycopg.Connection[Any], column: str) -> list[Any]:
    """The texts of *column*, in the order of n."""
    texts = f"(SELECT array_agg(e::text) FROM unnest({column}) e)" if column in ARRAYS else f"{column}::text"
    return [text for (text,) in control.execute(f"SELECT {texts} FROM item ORDER BY n").fetchall()]


def written(form: str, conninfo: Any, column: str, values: list[Any]) -> list[Any]:
    """The results; the values go in as a batch, and before it the first one alone, if it is good, as number -1."""
    jobs: list[Any] = [(n, value) for n, value in enumerate(values)]
    if form != "numbers":
        jobs = [{"n": n, column: value} for n, value in jobs]
    with contextlib.closing(FORMS[form](conninfo, column)) as processor:
        return processor.process(Batch(jobs, id="b"))


# Value, and the JSON that it is; the numbers and spaces of jsonb are its own.
VALUES: list[tuple[Any, str | None]] = [
    ({}, "{}"),
    ([], "[]"),
    ({"a": [1, None, True]}, '{"a": [1, null, true]}'),
    ([1, "b", {"c": 2.5}], '[1, "b", {"c": 2.5}]'),
    ([{"a": 1}, {"b": 2}], '[{"a": 1}, {"b": 2}]'),
    ([None], "[null]"),
    ([[]], "[[]]"),
    (["a"], '["a"]'),
    ((1, "b"), '[1, "b"]'),
    (namedtuple("Point", ["x", "y"])(1, 2), "[1, 2]"),
    (True, "true"),
    (False, "false"),
    (7, "7"),
    (2**70, str(2**70)),
    (1.5, "1.5"),
    (Decimal("1.10"), "1.10"),
    (dt.date(2026, 1, 2), '"2026-01-02"'),
    (WHEN, '"2026-01-02T03:04:05.000006+00:00"'),
    (dt.time(3, 4), '"03:04:00"'),
    (UUID, f'"{UUID}"'),
    ({"d": dt.date(2026, 1, 2), "u": UUID, "n": Decimal("0.1000000000000000055511151231257827")},
     '{"d": "2026-01-02", "n": 0.1000000000000000055511151231257827, "u": "12345678-1234-5678-1234-567812345678"}'),
    (OrderedDict(a=1), '{"a": 1}'),
    (UserDict(a=1), '{"a": 1}'),
    (types.MappingProxyType({"a": {"b": types.MappingProxyType({})}}), '{"a": {"b": {}}}'),
    (enum.IntEnum("Size", "S M").M, "2"),
    ('{"a": "text"}', '{"a": "text"}'),
    ('"a string"', '"a string"'),
    ("null", "null"),
    (None, None),
    (Jsonb({"a": 1}), '{"a": 1}'),
    (Json(None), "null"),
    (Jsonb([1], dumps=lambda value: '"own"'), '"own"'),
    ({"nested": Jsonb([1])}, '{"nested": [1]}'),
    ({"text": 'quote " backslash \\ Ä'}, '{"text": "quote \\" backslash \\\\ Ä"}'),
]  # fmt: skip


def same(text: str | None, expected: str | None) -> bool:
    """Whether two JSON texts say the same, to the digit."""
    if text is None or expected is None:
        return text is expected
    return bool(json.loads(text, parse_float=Decimal) == json.loads(expected, parse_float=Decimal))


@pytest.mark.database
@pytest.mark.parametrize("column", DOCUMENTS)
def test_a_value_is_the_same_json_in_every_form(
    shared_database: str, control: psycopg.Connection[Any], form: str, column: str
) -> None:
    # Wrapped as jsonb, psycopg itself has no domain over json and no json for it.
    results = written(form, shared_database, column, [value for value, _ in VALUES])

    assert results == [{"n": n} for n in range(len(VALUES))]
    for (value, expected), text in zip(VALUES, stored(control, column), strict=True):
        assert same(text, expected), (value, text)


@pytest.mark.database
@pytest.mark.parametrize("number", range(len(VALUES)), ids=lambda number: repr(VALUES[number][0])[:20])
def test_a_value_alone_is_the_same_json(
    shared_database: str, control: psycopg.Connection[Any], form: str, number: int
) -> None:
    value, expected = VALUES[number]

    assert written(form, shared_database, "paper", [value]) == [{"n": 0}]
    assert same(stored(control, "paper")[0], expected)


@pytest.mark.database
@pytest.mark.parametrize("column", ARRAYS)
def test_a_list_for_an_array_is_a_list_of_documents(
    shared_database: str, control: psycopg.Connection[Any], form: str, column: str
) -> None:
    values = [
        [{"a": 1}, None, "true", False, 7, Decimal("1.10"), dt.date(2026, 1, 2), [1, [2]], Jsonb({"b": 2})],
        [{"text": 'quote " backslash \\ brace } NULL'}, "null"],
        [True, False],
        [1, 2],
        [None],
        [],
        None,
        '{"{\\"a\\": 1}"}',
        ({"a": 1},),
    ]

    assert written(form, shared_database, column, values) == [{"n": n} for n in range(len(values))]
    first, *others = stored(control, column)
    assert [json.loads(text, parse_float=Decimal) if text else None for text in first] == [
        {"a": 1}, None, True, False, 7, Decimal("1.10"), "2026-01-02", [1, [2]], {"b": 2}
    ]  # fmt: skip
    assert [[each and json.loads(each) for each in items] if items else items for items in others] == [
        [{"text": 'quote " backslash \\ brace } NULL'}, None],
        [True, False],
        [1, 2],
        [None],
        None,  # no items to put together
        None,
        [{"a": 1}],
        [{"a": 1}],
    ]
    lengths = control.execute(f"SELECT cardinality({column}) FROM item ORDER BY n").fetchall()
    assert [length for (length,) in lengths] == [9, 2, 2, 2, 1, 0, None, 1, 1]


@pytest.mark.database
def test_wrapped_items_say_where_the_dimensions_of_an_array_are(
    shared_database: str, control: psycopg.Connection[Any], form: str
) -> None:
    written(form, shared_database, "jsonbs", [[[Jsonb([1]), Jsonb(2)], [Jsonb(3), None]], [[1, 2], [3, 4]]])

    assert control.execute("SELECT array_dims(jsonbs), jsonbs[1]::text FROM item ORDER BY n").fetchall() == [
        ("[1:2][1:2]", None),
        ("[1:2]", "[1, 2]"),
    ]


@pytest.mark.database
@pytest.mark.parametrize("bad", [object(), {1, 2}, {"a": object()}, [b"x"], {"a": dt.timedelta(1)}, {(1, 2): 3}])
def test_what_has_no_form_in_json_fails_its_job_alone_and_names_the_column(
    shared_database: str, control: psycopg.Connection[Any], form: str, bad: Any
) -> None:
    column = "jsonb"
    results = written(form, shared_database, column, [{"a": 1}, bad, True])

    assert results[0] == {"n": 0}
    assert results[2] == {"n": 2}
    assert isinstance(results[1], TypeError)
    if form != "numbers":
        assert column in str(results[1])
    assert stored(control, column) == ['{"a": 1}', "true"]


@pytest.mark.database
@pytest.mark.parametrize("bad", ["{oops", "", {"a": float("nan")}, "a\0b", {"a": "\0"}, b"{}"])
def test_what_the_server_does_not_take_for_json_fails_its_job_alone(
    shared_database: str, control: psycopg.Connection[Any], form: str, bad: Any
) -> None:
    results = written(form, shared_database, "jsonb", [{"a": 1}, bad, True])

    assert isinstance(results[1], psycopg.Error)
    assert stored(control, "jsonb") == ['{"a": 1}', "true"]


@pytest.mark.database
def test_a_list_for_another_type_stays_what_it_is(
    shared_database: str, control: psycopg.Connection[Any], form: str
) -> None:
    assert len(written(form, shared_database, "numbers", [[1, 2], [], [None], None])) == 4
    assert control.execute("SELECT numbers FROM item ORDER BY n").fetchall() == [([1, 2],), ([],), ([None],), (None,)]


# What the user has registered


def lent(dsn: str, prepare: Callable[[psycopg.Connection[Any]], object]) -> Any:
    def connect() -> psycopg.Connection[Any]:
        connection = psycopg.connect(dsn)
        prepare(connection)
        return connection

    return connect


class Shouting(JsonbDumper):
    def dump(self, obj: Any) -> bytes:
        return json.dumps(str(obj).upper()).encode()


class Plain:
    pass


@pytest.mark.database
def test_a_dumper_of_the_user_wins(shared_database: str, control: psycopg.Connection[Any], form: str) -> None:
    def register(connection: psycopg.Connection[Any]) -> None:
        for kind in (dict, list, Plain):
            connection.adapters.register_dumper(kind, Shouting)

    written(form, lent(shared_database, register), "jsonb", [{"a": 1}, ["b"], True, Plain()])

    texts = stored(control, "jsonb")
    assert texts[:3] == ["\"{'A': 1}\"", "\"['B']\"", "true"]
    assert "PLAIN OBJECT" in texts[3]


@pytest.mark.database
def test_psycopg_s_own_json_dumper_for_dicts_wins(
    shared_database: str, control: psycopg.Connection[Any], form: str
) -> None:
    def register(connection: psycopg.Connection[Any]) -> None:
        connection.adapters.register_dumper(dict, JsonbDumper)

    results = written(form, lent(shared_database, register), "jsonb", [{"a": 1}, {"a": UUID}, [{"a": UUID}]])

    assert isinstance(results[1], TypeError)  # json.dumps knows no uuid
    assert [json.loads(text) for text in stored(control, "jsonb")] == [{"a": 1}, [{"a": str(UUID)}]]


@pytest.mark.database
def test_the_user_s_json_function_is_asked(shared_database: str, control: psycopg.Connection[Any], form: str) -> None:
    def register(connection: psycopg.Connection[Any]) -> None:
        set_json_dumps(lambda value: json.dumps({"own": repr(value)}).encode(), connection)

    written(form, lent(shared_database, register), "jsonb", [{"a": 1}, [True], Jsonb(2)])

    assert [json.loads(text) for text in stored(control, "jsonb")] == [
        {"own": "{'a': 1}"},
        {"own": "[True]"},
        {"own": "2"},
    ]


# What it costs, and when it is asked


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    asked: list[bytes] = []
    describe = Session.describe

    def counted(self: Session, command: bytes, types: tuple[int, ...] = ()) -> Any:
        asked.append(command)
        return describe(self, command, types)

    monkeypatch.setattr(Session, "describe", counted)
    return asked


@pytest.mark.database
@pytest.mark.parametrize(
    ("jobs", "count"),
    [
        ([{"n": 1, "jsonb": '{"a": 1}'}, {"n": 2, "jsonb": None}, {"n": 3, "jsonb": Jsonb(1)}], 0),
        ([{"n": 1, "jsonb": {"a": 1}}, {"n": 2, "jsonb": [1]}], 1),
        ([{"n": 1, "jsonb": True}, {"n": 2, "jsonb": 5}], 1),
    ],
    ids=["texts", "documents", "others"],
)
def test_the_server_is_asked_once_and_only_where_it_matters(
    shared_database: str, control: psycopg.Connection[Any], questions: list[bytes], jobs: list[Any], count: int
) -> None:
    with contextlib.closing(FORMS["names"](shared_database, "jsonb")) as processor:
        for number in range(3):
            assert processor.process(Batch(jobs, id=str(number))) == [{"n": job["n"]} for job in jobs]

    assert len(questions) == count


@pytest.mark.database
def test_a_statement_that_has_no_json_is_asked_about_once(
    shared_database: str, control: psycopg.Connection[Any], questions: list[bytes]
) -> None:
    statement = "INSERT INTO item (n, numbers) VALUES (%(n)s, %(numbers)s) RETURNING n"
    with contextlib.closing(PostgresProcessor(shared_database, statement)) as processor:
        for number in range(3):
            assert processor.process(Batch([{"n": 1, "numbers": [1]}], id=str(number))) == [{"n": 1}]
        assert len(questions) == 1
        good, bad = processor.process(Batch([{"n": 1, "numbers": [1]}, {"n": True, "numbers": [1]}], id="bad"))

    assert good == {"n": 1}
    assert isinstance(bad, psycopg.errors.DatatypeMismatch)
    assert len(questions) == 2  # whether it is JSON by now


@pytest.mark.database
@pytest.mark.parametrize(
    ("statement", "value", "expected"),
    [
        ("SELECT %(v)s::jsonb ->> 'a' AS a", {"a": "x"}, {"a": "x"}),
        ("SELECT %(v)s::jsonb AS a", True, {"a": True}),
        ("SELECT jsonb_set('{}', '{a}', %(v)s) AS a", dt.date(2026, 1, 2), {"a": {"a": "2026-01-02"}}),
        ("SELECT jsonb_set('{}', '{a}', %(v)s) AS a", [1], {"a": {"a": [1]}}),
        ("SELECT '{\"a\": 1}'::jsonb @> %(v)s AS a", {"a": 1}, {"a": True}),
        ("SELECT %(v)s::json AS a, %(w)s::int + %(w)s::int AS b", {"a": 1}, {"a": {"a": 1}, "b": 4}),
        ("SELECT %(v)s::json AS a, %(w)s + %(w)s AS b", {"a": 1}, {"a": {"a": 1}, "b": 4}),
        ("SELECT %(v)s AS a", [1, 2], {"a": [1, 2]}),
        ("SELECT jsonb_build_object('v', %(v)s) AS a", True, {"a": {"v": True}}),
        ("SELECT jsonb_build_object('v', %(v)s) AS a", [1, 2], {"a": {"v": [1, 2]}}),
        ("SELECT 1 = ANY (%(v)s) AS a", [1, 2], {"a": True}),
    ],
)
def test_what_a_parameter_is_goes_by_the_statement(
    shared_database: str, control: psycopg.Connection[Any], statement: str, value: Any, expected: Any
) -> None:
    with contextlib.closing(PostgresProcessor(shared_database, statement)) as processor:
        (result,) = processor.process(Batch([{"v": value, "w": 2}], id="b"))

    assert result == expected


@pytest.mark.database
def test_a_question_inside_the_owner_s_transaction_leaves_it_open(
    shared_database: str, control: psycopg.Connection[Any]
) -> None:
    with psycopg.connect(shared_database) as connection:
        connection.execute("INSERT INTO item (n) VALUES (0)")
        for statement in (
            "INSERT INTO item (n, jsonb) VALUES (%(n)s, %(j)s) RETURNING jsonb AS j",
            "SELECT jsonb_build_object('n', %(n)s, 'j', %(j)s) AS j",
        ):
            processor = PostgresProcessor(lambda: contextlib.nullcontext(connection), statement)
            (result,) = processor.process(Batch([{"n": 1, "j": [1, 2]}], id="b"))
            assert isinstance(result, dict)
        connection.commit()

    assert control.execute("SELECT count(*) FROM item").fetchone() == (2,)


@pytest.mark.database
@pytest.mark.parametrize(("before", "after"), [("jsonb", "int[]"), ("int[]", "jsonb"), ("jsonb", "json")])
def test_a_column_that_changes_its_type_is_asked_about_again(
    shared_database: str, control: psycopg.Connection[Any], before: str, after: str
) -> None:
    control.execute(f"CREATE TABLE changing (v {before})")
    statement = "INSERT INTO changing (v) VALUES (%(v)s) RETURNING v"
    with MicroBatcher(PostgresProcessor(shared_database, statement), delivery_timeout=10) as batcher:
        assert batcher.execute({"v": [1, 2]}) == {"v": [1, 2]}
        control.execute(f"TRUNCATE changing; ALTER TABLE changing DROP v, ADD v {after}")
        assert batcher.execute({"v": [1, 2]}) == {"v": [1, 2]}
        assert batcher.execute({"v": [3]}) == {"v": [3]}


# The function itself


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.10"), "1.10"),
        (Decimal("1E+5"), "1E+5"),
        (Decimal("-0"), "-0"),
        ([Decimal(n) for n in range(12)], "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]"),
        ({"a": Decimal("0.1"), "b": "0.1"}, '{"a": 0.1, "b": "0.1"}'),
        ({1: None, None: 2}, '{"1": null, "null": 2}'),
        ("ä", '"\\u00e4"'),
    ],
)
def test_numbers_keep_their_digits(value: Any, text: str) -> None:
    assert dumps(value) == text


@pytest.mark.parametrize("value", [object(), b"x", {1}, 1j, dt.timedelta(1), [Plain()]])
def test_what_has_no_form_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="has no form in JSON: make it a str"):
        dumps(value)
