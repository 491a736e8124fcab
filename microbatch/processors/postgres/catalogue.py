"""What the catalogue says about a table: one question, asked once per connection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from .notice import IS_PLAIN, Notice, ask_for_notice
from .session import Session

# Without type modifiers, which would cut a value silently in a cast; `full_type` has them.
_QUESTION = f"""
WITH tree AS MATERIALIZED (
    SELECT to_regclass($1)::oid AS oid UNION SELECT relid FROM pg_partition_tree(to_regclass($1)))
SELECT json_build_object(
  'oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname, 'kind', c.relkind,
  'row_security', row_security_active(c.oid),
  'has_foreign_partition', EXISTS (SELECT FROM pg_class f
      WHERE f.relkind = 'f' AND f.oid = ANY (ARRAY(SELECT oid FROM tree))),
  'has_rule', EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid AND w.ev_type <> '1'),
  'insert_rule', EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid AND w.ev_type = '3'
                         AND w.ev_enabled <> 'D'),
  'before_row_insert', EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid IN (SELECT oid FROM tree)
                               AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND (t.tgtype & 7) = 7),
  'may_reach_elsewhere', EXISTS (SELECT FROM pg_foreign_server) AND EXISTS (SELECT FROM pg_trigger t
      WHERE t.tgrelid IN (SELECT oid FROM tree) AND NOT t.tgisinternal AND t.tgenabled <> 'D'),
  'deferred', EXISTS (SELECT FROM pg_constraint k WHERE k.condeferrable AND k.conrelid IN (SELECT oid FROM tree)),
  'may_draw_durably', (SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE')) FROM pg_proc p
      WHERE p.proname = 'pg_logical_emit_message' AND p.pronamespace = 'pg_catalog'::regnamespace),
  'is_plain', {IS_PLAIN},
  'key_index', i.indexrelid::int8,
  'key_constraint', (SELECT relname FROM pg_class WHERE oid = i.indexrelid),
  'constraints', (SELECT json_agg(json_build_array(k.conname, a.attname) ORDER BY k.conname)
      FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = k.conkey[1]
      WHERE k.conrelid = c.oid AND cardinality(k.conkey) = 1),
  'usable_key', coalesce(i.indimmediate AND i.indisvalid AND NOT i.indisexclusion AND NOT EXISTS (
      SELECT FROM pg_index x WHERE x.indrelid = c.oid AND x.indisunique AND NOT x.indimmediate AND x.indexprs IS NULL
          AND (x.indkey::int2[])[0:x.indnkeyatts - 1]
              OPERATOR(pg_catalog.@>) (i.indkey::int2[])[0:i.indnkeyatts - 1]
          AND (x.indkey::int2[])[0:x.indnkeyatts - 1]
              OPERATOR(pg_catalog.<@) (i.indkey::int2[])[0:i.indnkeyatts - 1]), false),
  'columns', (SELECT json_agg(json_build_object(
      'name', a.attname, 'type', format_type(a.atttypid, -1), 'full_type', format_type(a.atttypid, a.atttypmod),
      'base', format('%I.%I', bn.nspname, b.typname),
      'element', quote_ident(en.nspname) || '.' || quote_ident(e.typname),
      'is_json', b.oid IN ('pg_catalog.json'::regtype, 'pg_catalog.jsonb'::regtype),
      'array', CASE WHEN below.has_modifier OR EXISTS (
          -- A cast from text that is more than the type's input function: by its own function, or by none at all.
          SELECT FROM pg_cast k JOIN pg_proc p ON p.oid = b.typinput
          WHERE k.castsource = 'pg_catalog.text'::regtype AND k.casttarget = b.oid
            AND (k.oid >= 16384 AND (k.castmethod = 'f' OR k.castmethod = 'b' AND p.prosrc <> 'textin')
                 OR b.oid = 'pg_catalog.regclass'::regtype))
        THEN (SELECT format('%I.%I', n.nspname, t.typname) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
              WHERE t.oid = y.typarray) END,
      'category', y.typcategory,
      'identity', a.attidentity, 'generated', a.attgenerated <> '',
      'default', pg_get_expr(d.adbin, d.adrelid),
      'is_built_in', NOT EXISTS (SELECT FROM pg_depend p WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
                                 AND p.refclassid = 'pg_proc'::regclass),
      'sequences', s.oids, 'may_draw', s.may_draw, 'is_logged', coalesce(s.is_logged, true),
      'may_insert', has_column_privilege(c.oid, a.attnum, 'INSERT'),
      'may_select', has_column_privilege(c.oid, a.attnum, 'SELECT'),
      'in_key', coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)) ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
    CROSS JOIN LATERAL (
        WITH RECURSIVE domains AS (
            SELECT y.oid, y.typtype, y.typbasetype, y.typtypmod, false AS has_modifier
            UNION ALL SELECT t.oid, t.typtype, t.typbasetype, t.typtypmod, d.has_modifier OR d.typtypmod <> -1
            FROM domains d JOIN pg_type t ON d.typtype = 'd' AND t.oid = d.typbasetype)
        SELECT oid, has_modifier FROM domains WHERE typtype <> 'd') below
    JOIN pg_type b ON b.oid = below.oid JOIN pg_namespace bn ON bn.oid = b.typnamespace
    LEFT JOIN LATERAL (
        WITH RECURSIVE domains AS (
            SELECT t.oid, t.typtype, t.typbasetype, t.typname, t.typnamespace FROM pg_type t
            WHERE t.oid = b.typelem AND t.typarray = b.oid
            UNION ALL SELECT t.oid, t.typtype, t.typbasetype, t.typname, t.typnamespace
            FROM domains d JOIN pg_type t ON d.typtype = 'd' AND t.oid = d.typbasetype)
        SELECT typname, typnamespace FROM domains WHERE typtype <> 'd') e ON true
    LEFT JOIN pg_namespace en ON en.oid = e.typnamespace
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    CROSS JOIN LATERAL (
        SELECT json_agg(s.oid::int8) AS oids, bool_and(has_sequence_privilege(s.oid, 'USAGE')) AS may_draw,
            bool_and(s.relpersistence = 'p') AS is_logged
        FROM pg_class s WHERE s.relkind = 'S' AND s.oid IN (
            SELECT p.refobjid FROM pg_depend p WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
            UNION SELECT p.objid FROM pg_depend p WHERE a.attidentity <> '' AND p.classid = 'pg_class'::regclass
                AND p.refclassid = 'pg_class'::regclass AND p.refobjid = a.attrelid AND p.refobjsubid = a.attnum
                AND p.deptype = 'i')) s
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary
WHERE c.oid = to_regclass($1)"""

# As the server writes defaults down: a cast around one of them would show, the implicit one to integer does not.
_NEXT_NUMBER = re.compile(r"(pg_catalog\.)?nextval\(E?'([^']|'')*'::(pg_catalog\.)?regclass\)")
_RANDOM_UUID = re.compile(r"(pg_catalog\.)?gen_random_uuid\(\)")
_NUMBERS = ("integer", "bigint")  # not smallint: a few blocks would use it up


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    *type* and *full_type* are for readers; *base* is the type behind all domains, without its modifier, as SQL that no
    search path changes, and *element* that of an array's elements. *array* is set where a cast to *base* would not read
    text as the column's own type does: the array type of that, whose input does.
    """

    name: str
    type: str
    full_type: str
    base: str
    element: str | None
    array: str | None
    category: str
    is_json: bool
    identity: str
    generated: bool
    default: str | None
    is_built_in: bool
    sequences: tuple[int, ...]
    may_draw: bool
    is_logged: bool
    may_insert: bool
    may_select: bool
    in_key: bool

    @property
    def is_random_uuid(self) -> bool:
        """Whether its default is a random uuid, which can be made anywhere."""
        return self.type == "uuid" and self._defaults_to(_RANDOM_UUID)

    @property
    def is_drawn(self) -> bool:
        """Whether its values can be had before the row is, and are what the row itself would get."""
        if not (self.may_insert and self.may_select):
            return False
        if self.is_random_uuid:
            return True
        is_next = bool(self.identity) or self._defaults_to(_NEXT_NUMBER)
        return self.type in _NUMBERS and is_next and len(self.sequences) == 1 and self.may_draw

    @property
    def is_cut(self) -> bool:
        """Whether a cast to its type may cut a value that the table refuses."""
        return self.category in "SVA" and self.type != self.full_type

    @property
    def shows_cuts(self) -> bool:
        """Whether such a cut can be seen, against the value without the modifier."""
        return self.category in "SV"

    def _defaults_to(self, pattern: re.Pattern[str]) -> bool:
        return self.is_built_in and self.default is not None and pattern.fullmatch(self.default) is not None


@dataclass(frozen=True, slots=True)
class Table:
    """A table as `insert_into` sees it; *kind* is `relkind`."""

    oid: int
    schema: str
    name: str
    kind: str
    row_security: bool
    has_foreign_partition: bool
    has_rule: bool
    insert_rule: bool
    before_row_insert: bool
    may_reach_elsewhere: bool
    deferred: bool
    may_draw_durably: bool
    notice: Notice
    key_index: int | None
    key_constraint: str | None
    usable_key: bool
    constraints: tuple[tuple[str, str], ...]  # those about one column, with that
    columns: tuple[Column, ...]

    @property
    def key(self) -> tuple[Column, ...]:
        """The columns of the primary key."""
        return tuple(column for column in self.columns if column.in_key)

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def identifier(self) -> bytes:
        """Schema and name as SQL."""
        return quoted(self.schema, self.name)


def look_up(session: Session, name: str, columns: Sequence[str]) -> Table:
    """The table that *name* is on this session's search path, checked against *columns*.

    Raises:
        ValueError: there is no such table or column, or it takes no values; the message says which.
    """
    found = session.ask_json(_QUESTION, name)
    if found is None:
        hint = "" if name == name.lower() else "; a name with capitals is quoted, as in '\"Orders\"'"
        raise ValueError(f"there is no table {name} in this database, or not on the search path{hint}")
    found["notice"] = Notice() if found.pop("is_plain") else ask_for_notice(session, name)
    found["columns"] = tuple(_column(each) for each in found["columns"] or ())
    found["constraints"] = tuple(map(tuple, found["constraints"] or ()))
    table = Table(**found)
    _check(table, name, columns)
    return table


def quoted(*names: str) -> bytes:
    """*names* as one SQL identifier."""
    return sql.Identifier(*names).as_bytes(None)


def _column(found: dict[str, object]) -> Column:
    sequences = found.pop("sequences") or []
    may_draw = bool(found.pop("may_draw"))
    return Column(**found, sequences=tuple(sequences), may_draw=may_draw)  # type: ignore[arg-type]


def _check(table: Table, name: str, columns: Sequence[str]) -> None:
    if table.kind not in "rpvf":
        raise ValueError(f"{name} is no table")
    known = {column.name: column for column in table.columns}
    if unknown := [column for column in columns if column not in known]:
        raise ValueError(f"table {name} has no column {unknown[0]!r}; its columns are {', '.join(known)}")
    if generated := [column for column in columns if known[column].generated]:
        raise ValueError(f"table {name} generates column {generated[0]!r} itself and takes no values for it")
