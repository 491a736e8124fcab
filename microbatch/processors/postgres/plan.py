"""Which way a table takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .catalogue import Column, Table

Strategy = Literal["keys", "merge", "statement"]

_MERGE_RETURNS_SINCE = 170000


@dataclass(frozen=True, slots=True)
class Plan:
    """How `insert_into` writes its table.

    Attributes:
        strategy: `"keys"`: one INSERT per batch, each row with a primary key drawn beforehand, which ties it to its
            job. `"merge"`: one MERGE per batch (PostgreSQL 17). `"statement"`: one INSERT per job, in one flight.
        reason: why it is this one.
        drawn: the columns of the key that are drawn.
    """

    strategy: Strategy
    reason: str
    drawn: tuple[str, ...] = ()


def plan_for(
    table: Table,
    columns: Sequence[str],
    version: int,
    has_on_conflict: bool,
    has_ledger: bool,
    refusal: str = "",
) -> Plan:
    """The fastest way whose results are exact and whose retry cannot double.

    *has_ledger*: it is pinned. *refusal*: why the server does not take drawn keys, as it has turned out.
    """
    if has_on_conflict:
        return Plan("statement", "on_conflict decides row by row")
    if obstacle := _obstacle_to_batches(table):
        return Plan("statement", obstacle)
    obstacle = "commit_guard='ledger' is pinned" if has_ledger else refusal or _obstacle_to_keys(table, columns)
    if not obstacle:
        drawn = tuple(column.name for column in drawn_columns(table, columns))
        return Plan("keys", f"each row's {', '.join(drawn)} is drawn beforehand", drawn)
    if version >= _MERGE_RETURNS_SINCE:
        return Plan("merge", obstacle)
    return Plan("statement", f"{obstacle}, and MERGE … RETURNING needs PostgreSQL 17")


def drawn_columns(table: Table, columns: Sequence[str]) -> list[Column]:
    """The columns of the key that no job gives."""
    return [column for column in table.key if column.name not in columns]


def _obstacle_to_batches(table: Table) -> str:
    if table.kind == "f":
        return "it is a foreign table"
    if table.has_foreign_partition:
        return "one of its partitions is a foreign table"
    if table.insert_rule:
        return "an INSERT rule rewrites what is sent"
    if table.has_rule:
        return "it has rules, which allow neither MERGE nor ON CONFLICT"
    if table.row_security:
        return "row security is active for this role"
    return table.notice.of_batches()


def _obstacle_to_keys(table: Table, columns: Sequence[str]) -> str:
    if table.kind == "v":
        return "it is a view"
    if table.before_row_insert:
        return "a BEFORE ROW INSERT trigger may change the key"
    if table.may_reach_elsewhere:
        return "a trigger may write to a foreign table, and would do so again in a retry"
    return _obstacle_in_key(table, columns) or table.notice.of_drawing()


def _obstacle_in_key(table: Table, columns: Sequence[str]) -> str:
    if not table.key:
        return "it has no primary key"
    if not table.usable_key:
        return "its primary key, or another constraint on the same columns, is deferrable or without overlaps"
    drawn = drawn_columns(table, columns)
    if not drawn:
        return "the jobs give the primary key themselves"
    if any(not (column.may_insert and column.may_select) for column in table.key):
        return "this role may not read and write the primary key"
    if undrawable := [column.name for column in drawn if not column.is_drawn]:
        return (
            f"key column {undrawable[0]} is no integer or bigint that is just the next value of a sequence which this"
            " role may use, and no gen_random_uuid()"
        )
    if not table.may_draw_durably and any(column.sequences for column in drawn):
        return "this role may not call pg_logical_emit_message"
    return _obstacle_to_overriding(table, columns, drawn) or _obstacle_to_lookups(table, columns)


def _obstacle_to_overriding(table: Table, columns: Sequence[str], drawn: Sequence[Column]) -> str:
    # OVERRIDING SYSTEM VALUE, for the key, would let in what the server refuses.
    always = [name for name in columns if table.column(name).identity == "a"]
    if always and any(column.identity == "a" for column in drawn):
        return f"column {always[0]} is GENERATED ALWAYS as well"
    return ""


def _obstacle_to_lookups(table: Table, columns: Sequence[str]) -> str:
    given = [column for column in table.key if column.name in columns]
    if cut := [column.name for column in given if column.is_cut and not column.shows_cuts]:
        return f"a value of key column {cut[0]} cannot be looked up without a cast that may cut it"
    return ""
