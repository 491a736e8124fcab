"""What `/openapi.json` says, and what the service does, are the same."""

from __future__ import annotations

import ast
import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microbatch import service
from microbatch.service.columns import BadJob, Column
from microbatch.service.failures import HTTP_STATUS
from service import clients, hostile, schemas
from service.answers import JOB
from service.serving import serving

COLUMNS = [
    Column("c", "smallint", "int2", is_nullable=False),
    Column("c", "integer", "int4", is_nullable=True),
    Column("c", "bigint", "int8", is_nullable=False),
    Column("c", "numeric", "numeric", is_nullable=False),
    Column("c", "numeric", "numeric", is_nullable=True, precision=10, scale=2),
    Column("c", "numeric", "numeric", is_nullable=False, precision=5, scale=0),
    Column("c", "numeric", "numeric", is_nullable=False, precision=2, scale=2),
    Column("c", "double precision", "float8", is_nullable=False),
    Column("c", "boolean", "bool", is_nullable=False),
    Column("c", "character varying", "varchar", is_nullable=False, length=5),
    Column("c", "text", "text", is_nullable=True),
    Column("c", "jsonb", "jsonb", is_nullable=False),
]

_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
_NUMBERS = (
    st.integers(-(10**18) + 1, 10**18 - 1)
    | st.integers(-40_000, 40_000)
    | st.decimals(-(10**9), 10**9, places=3)
    | st.sampled_from([Decimal("1.0"), Decimal("1E+2"), Decimal("0.99"), 32767, 32768, 2**31 - 1, 2**31])
)
_VALUES = (
    st.none() | st.booleans() | _NUMBERS | _TEXT | st.from_regex(r"\A-?[0-9]{1,9}(\.[0-9]{1,3})?\Z") | st.just([1])
)


@pytest.mark.parametrize(
    "column", COLUMNS, ids=lambda column: f"{column.type}-{column.precision or column.length or ''}"
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(value=_VALUES)
def test_a_columns_schema_takes_what_its_check_takes(column: Column, value: Any) -> None:
    try:
        column.text(value)
        taken = True
    except BadJob:
        taken = False
    as_json = float(value) if isinstance(value, Decimal) else value
    # Null is JSON, too; the check knows that it would be an SQL NULL.
    said = (
        value is not None
        if column.base == "jsonb"
        else jsonschema.Draft202012Validator(column.schema()).is_valid(as_json)
    )
    assert taken == said, value


def test_the_document_is_typed_and_closed(app: Flask) -> None:
    document = app.test_client().get("/openapi.json").get_json()

    def objects(node: Any) -> list[Any]:
        if isinstance(node, dict):
            here = [node] if node.get("type") == "object" and "properties" in node else []
            return here + [found for value in node.values() for found in objects(value)]
        return [found for value in node for found in objects(value)] if isinstance(node, list) else []

    found = objects(document)
    assert len(found) >= 8
    assert [node for node in found if node.get("additionalProperties") is not False] == []
    assert document["components"]["schemas"]["Job"]["required"] == list(JOB)
    assert set(document["paths"]["/submit-job"]["post"]["responses"]) >= {
        "200",
        "202",
        "400",
        "413",
        "415",
        "422",
        "503",
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                kinds = list(response["content"])
                assert kinds == ["application/json" if status < "300" else "application/problem+json"]


def test_answers_are_what_the_document_says(app: Flask) -> None:
    client = app.test_client()
    document = client.get("/openapi.json").get_json()

    def check(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    check("Accepted", client.post("/submit-job", json=JOB).get_json())
    check("AllAccepted", client.post("/submit-job", json=[JOB, JOB]).get_json())
    completed = client.post("/submit-job?wait=20", json=JOB).get_json()
    check("Status", completed)
    check("Row", completed["result"])
    check("Statuses", client.post("/submit-job?wait=20", json=[JOB, JOB]).get_json())
    check("Problem", client.post("/submit-job", json={}).get_json())


def kinds_in_the_code() -> set[str]:
    """The last part of every problem's type."""
    found = {"not-found", *HTTP_STATUS}
    for path in Path(service.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Problem", "unavailable"):
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                found |= {text for text in texts[:2] if isinstance(text, str) and " " not in text}
    return found


def test_the_page_has_every_problem_and_no_other() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "service.rst").read_text("utf-8")
    table = text[text.index("``type``  ") : text.index("A job without ``wait`` is answered")]
    lines = [line for line in table.splitlines()[2:] if re.match(r"\d{3} ", line)]
    said = {word for line in lines for word in re.findall(r"``([a-z-]+)``", line[:58])}

    assert said == kinds_in_the_code()


# The commands, shortened.


@pytest.mark.timeout(300)
def test_schemathesis_finds_nothing(shared_database: str, tmp_path: Path) -> None:
    with serving("--dsn", shared_database, lines=2) as service:
        assert schemas.check(service.port, examples=4, seed=3, directory=tmp_path) > 100
        assert service.end() == 0


@pytest.mark.timeout(300)
def test_hostile_bodies_are_refused_and_leave_no_memory_behind(shared_database: str) -> None:
    with serving("--dsn", shared_database, lines=2) as service:
        codes, growth = hostile.attack(service.port, service.process.pid, 600, seed=7)
        assert service.end() == 0
    assert sum(codes.values()) == 600
    assert set(codes) == {400, 403, 413, 415}
    assert growth < hostile.GROWTH


@pytest.mark.timeout(300)
def test_P6_under_gunicorn_what_was_answered_is_there(database: str, tmp_path: Path) -> None:
    said = clients.trial(database, workers=2, clients=6, seconds=0.8, directory=tmp_path, sample=10)
    assert len(said) == 3


def test_the_hostile_bodies_are_of_every_kind_and_the_same_each_time() -> None:
    made = list(hostile.bodies(240))
    assert made == list(hostile.bodies(240))
    assert sum(1 for _, headers in made if headers) == 20
    assert json.loads(hostile.header(random.Random(0))[0]) == JOB
