"""Who would notice that the numbers of a sequence were drawn beforehand.

`currval` and `lastval` tell what this session drew last, and a sequence's own `last_value` what anybody did. With
drawn keys that is the end of a block, and not the number of the row. Where code is run that may ask, the table takes
another way; what a trigger calls, and what that calls, is not followed: one reader in the database is enough.

Nor may a trigger take the rows away that it fires for, or give them other keys: a retry finds them by their keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from .session import Session

_BY_HAND = 16384  # what has a smaller number came with the server
_READS = r"'\m(currval|lastval|pg_sequence_last_value)\M|\mlast_value\M(?!\s*\()'"
# The first three, in the server's own form; three plain searches take a third of the time of a pattern.
_CALLS = " OR ".join(f"strpos(body, ':funcid {number} ') > 0" for number in (1575, 2559, 4032))
_SEEN = "('sql', 'plpgsql')"

# The table and its partitions, as an array.
_TREE = "(ARRAY(SELECT to_regclass($1)::oid UNION SELECT relid FROM pg_partition_tree(to_regclass($1))))"

# Cheap, and true of most tables: nothing runs but what came with the server, and that does not ask.
IS_PLAIN = f"""
NOT (EXISTS (SELECT FROM pg_event_trigger)
  OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = ANY {_TREE} AND NOT tgisinternal AND tgtype & 4 = 4)
  OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = ANY {_TREE} AND attnum > 0 AND atttypid >= {_BY_HAND})
  OR EXISTS (SELECT FROM pg_index WHERE indrelid = ANY {_TREE} AND (indexprs IS NOT NULL OR indpred IS NOT NULL))
  OR EXISTS (SELECT FROM (
      SELECT adbin::text FROM pg_attrdef WHERE adrelid = ANY {_TREE}
      UNION ALL SELECT conbin::text FROM pg_constraint WHERE conbin IS NOT NULL AND conrelid = ANY {_TREE}
    ) AS expressions(body) WHERE body ~ ':(op)?funcid ([0-9]{{5,}}|1575|2559|4032) '))"""

_QUESTION = rf"""
WITH RECURSIVE
tree AS MATERIALIZED (SELECT {_TREE} AS oids),
types AS (
    SELECT a.atttypid AS oid FROM tree JOIN pg_attribute a ON a.attrelid = ANY (tree.oids) AND a.attnum > 0
    UNION SELECT inner_type FROM types JOIN pg_type y ON y.oid = types.oid,
        unnest(ARRAY[y.typbasetype, y.typelem]) AS inner_type WHERE inner_type <> 0),
-- What is evaluated for a row, in the server's own form.
expressions(classid, oid, body) AS MATERIALIZED (
    SELECT 'pg_attrdef'::regclass, oid, adbin::text FROM pg_attrdef WHERE adrelid = ANY ((SELECT oids FROM tree)::oid[])
    UNION ALL SELECT 'pg_constraint'::regclass, oid, conbin::text FROM pg_constraint
        WHERE conbin IS NOT NULL AND conrelid = ANY ((SELECT oids FROM tree)::oid[])
    UNION ALL SELECT 'pg_constraint'::regclass, oid, conbin::text FROM pg_constraint
        WHERE conbin IS NOT NULL AND contypid IN (SELECT oid FROM types)
    UNION ALL SELECT 'pg_type'::regclass, oid, typdefaultbin::text FROM pg_type
        WHERE typdefaultbin IS NOT NULL AND oid IN (SELECT oid FROM types)
    UNION ALL SELECT 'pg_trigger'::regclass, oid, tgqual::text FROM pg_trigger
        WHERE tgqual IS NOT NULL AND NOT tgisinternal AND tgrelid = ANY ((SELECT oids FROM tree)::oid[])
    UNION ALL SELECT 'pg_class'::regclass, indexrelid, concat(indexprs, indpred) FROM pg_index
        WHERE (indexprs IS NOT NULL OR indpred IS NOT NULL) AND indrelid = ANY ((SELECT oids FROM tree)::oid[])),
-- Not those of an extension: what it brings for its types and operators draws nothing and asks nothing.
functions AS MATERIALIZED (
    SELECT p.oid, p.proname, l.lanname FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE p.oid IN (SELECT d.refobjid FROM pg_depend d JOIN expressions e ON e.classid = d.classid AND e.oid = d.objid
                    WHERE d.refclassid = 'pg_proc'::regclass)
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                      AND d.deptype = 'e')),
triggers AS MATERIALIZED (
    SELECT (t.tgtype & 3) = 3 AS is_before_row, p.proname, p.prosrc,
        p.oid >= {_BY_HAND} AND l.lanname NOT IN {_SEEN} AS is_hidden
    FROM tree JOIN pg_trigger t ON t.tgrelid = ANY (tree.oids) JOIN pg_proc p ON p.oid = t.tgfoid
    JOIN pg_language l ON l.oid = p.prolang WHERE NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgtype & 4 = 4),
-- Names as patterns: of the table and its partitions, and of the columns of its key.
names AS MATERIALIZED (
    SELECT (SELECT string_agg(regexp_replace(c.relname, '\W', '.', 'g'), '|')
            FROM pg_class c WHERE c.oid = ANY (tree.oids)) AS tables,
        (SELECT string_agg(regexp_replace(a.attname, '\W', '.', 'g'), '|')
         FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
         WHERE i.indrelid = to_regclass($1) AND i.indisprimary) AS key
    FROM tree),
-- One reader anywhere is enough, where code runs that may reach it. A body is made into text once: OFFSET 0.
readers(name) AS (
    SELECT name FROM (
        SELECT 'event trigger ' || e.evtname, p.prosrc, p.prosqlbody::text FROM pg_event_trigger e
            JOIN pg_proc p ON p.oid = e.evtfoid WHERE e.evtenabled <> 'D'
        UNION ALL SELECT 'function ' || proname, prosrc, prosqlbody::text FROM pg_proc WHERE oid >= {_BY_HAND}
            AND (EXISTS (SELECT FROM triggers) OR EXISTS (SELECT FROM functions)) OFFSET 0
      ) AS code(name, source, body) WHERE source ~* {_READS} OR {_CALLS}
    UNION ALL SELECT name FROM (
        SELECT 'the default of a column of ' || adrelid::regclass, adbin::text FROM pg_attrdef
            WHERE EXISTS (SELECT FROM triggers)
        UNION ALL SELECT 'constraint ' || conname, conbin::text FROM pg_constraint
            WHERE conbin IS NOT NULL AND EXISTS (SELECT FROM triggers)
        UNION ALL SELECT 'trigger ' || tgname, tgqual::text FROM pg_trigger
            WHERE tgqual IS NOT NULL AND EXISTS (SELECT FROM triggers)
        UNION ALL SELECT 'view ' || ev_class::regclass, ev_action::text FROM pg_rewrite WHERE oid >= {_BY_HAND}
            AND (EXISTS (SELECT FROM triggers) OR EXISTS (SELECT FROM functions)) OFFSET 0
      ) AS expressions(name, body) WHERE {_CALLS})
SELECT json_build_object(
    'expression', EXISTS (SELECT FROM expressions WHERE {_CALLS}),
    'hidden_function', (SELECT min(proname) FROM functions WHERE lanname NOT IN {_SEEN}),
    'hidden_trigger', (SELECT min(proname) FROM triggers WHERE is_hidden AND NOT is_before_row),
    'taker', (SELECT min(proname) FROM triggers, names WHERE NOT is_before_row
              AND prosrc ~* concat('\m(', tables, '|execute|tg_table_name|tg_relname|tg_relid)\M')
              AND prosrc ~* concat('\m(delete\s+from|truncate|merge\s+into)\M|\mset\s*\(',
                                   '|\mset\M((?!\mwhere\M)[^;])*\m(', key, ')\M["\s]*=')),
    'after_insert', EXISTS (SELECT FROM triggers WHERE NOT is_before_row),
    'reader', (SELECT min(name) FROM readers))"""


@dataclass(frozen=True, slots=True)
class Notice:
    """What runs when a row of the table is written, as far as it may ask for the number of the row.

    Attributes:
        expression: a default, a generated column, a check or the like of the table itself asks.
        hidden_function: one that such an expression calls, in a language whose code is not read here.
        hidden_trigger: the same of a trigger that fires behind the row, or once for all.
        taker: a trigger function that may take its row away or change its key.
        after_insert: there is a trigger that fires so.
        reader: one thing in the database that asks, and that may be reached.
    """

    expression: bool = False
    hidden_function: str | None = None
    hidden_trigger: str | None = None
    taker: str | None = None
    after_insert: bool = False
    reader: str | None = None

    def of_batches(self) -> str:
        """Who would see that several rows were written by one command; empty if nobody."""
        if self.hidden_trigger:
            return f"trigger function {self.hidden_trigger}, which may ask for the number of its row, cannot be read"
        if self.after_insert and self.reader:
            return f"a trigger may ask for the number of its row, as {self.reader} does"
        return ""

    def of_drawing(self) -> str:
        """Why keys are not drawn beforehand; empty where nobody would see it, and a retry would find its rows."""
        if self.expression:
            return "one of its expressions asks for the number of its row"
        if self.hidden_function:
            return f"function {self.hidden_function}, which may ask for the number of its row, cannot be read"
        if self.reader:
            return f"{self.reader} asks for the number of its row"
        if self.taker:
            return f"trigger function {self.taker} may take its row away, or change its key"
        return self.of_batches()


def ask_for_notice(session: Session, table: str) -> Notice:
    """What of *table* has to be looked at more closely."""
    return Notice(**session.ask_json(_QUESTION, table))
