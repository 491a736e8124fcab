"""The pages on PostgreSQL: their code runs, and their tables are those of the code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import psycopg
import pytest
from docutils import nodes
from test_readme import README, ROOT, Names, as_uri, blocks, parsed, run_blocks

from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.guard import DDL
from microbatch.processors.postgres.sqlstate import TABLE
from microbatch.stats import Stats

POSTGRES = ROOT / "docs" / "postgres.rst"
RUNBOOK = ROOT / "docs" / "runbook.rst"


@pytest.fixture
def uri(database: str) -> str:
    return as_uri(database)


def rows(path: Path, header: str) -> Iterator[list[str]]:
    """The rows of the table whose first heading is *header*."""
    for table in parsed(path).findall(nodes.table):
        heading = next(table.findall(nodes.thead))
        if next(heading.findall(nodes.entry)).astext() == header:
            for row in next(table.findall(nodes.tbody)).findall(nodes.row):
                yield [" ".join(entry.astext().split()) for entry in row.findall(nodes.entry)]
            return
    raise AssertionError(f"no table {header}")


def test_the_table_of_sqlstates_is_the_one_that_decides() -> None:
    assert list(rows(POSTGRES, "SQLSTATE")) == [[entry.code, entry.meaning, entry.kind.value] for entry in TABLE]


def test_the_table_of_guards_is_complete() -> None:
    guards = get_args(get_type_hints(PostgresProcessor.__init__)["commit_guard"])

    assert sorted(name.strip('"') for name, _, _ in rows(POSTGRES, "guard")) == sorted(guards)


def test_the_readmes_table_of_the_processors_options_is_true() -> None:
    said = {option: default for option, default, _ in rows(README, "PostgresProcessor")}
    parameters = inspect.signature(PostgresProcessor).parameters.values()
    options = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    assert {name: default.strip('"') for name, default in said.items()} == {
        option.name: str(option.default) for option in options
    }


def test_the_ledger_on_the_page_is_the_one_that_is_made() -> None:
    assert DDL + ";" in [block.text for block in blocks(POSTGRES, "sql")]


def test_the_runbooks_numbers_exist() -> None:
    said = {word for names, _ in rows(RUNBOOK, "number") for word in names.replace(",", " ").replace("/", " ").split()}

    assert said <= set(Stats.__dataclass_fields__)


@pytest.mark.database
def test_the_page_runs(uri: str) -> None:
    def check_unknown(names: Names) -> None:
        error = RuntimeError()
        error.__cause__ = cause = RuntimeError()
        cause.lookup = "SELECT 1"  # type: ignore[attr-defined]
        assert names["lookup"](error) == "SELECT 1"

    run_blocks(POSTGRES, uri, {"When the answer to COMMIT is missing": check_unknown})


@pytest.mark.database
def test_the_runbooks_queries_run(database: str) -> None:
    queries = [block.text for block in blocks(RUNBOOK, "sql")]

    assert queries
    with psycopg.connect(database) as connection:
        for query in queries:
            connection.execute(query.encode())
