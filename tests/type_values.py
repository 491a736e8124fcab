"""Values for every type of PostgreSQL that can be written, and the columns that hold them.

The types come from the catalogue of the server that is asked. What each of them takes and refuses, that server says
too: here are only the candidates, among them many that do not fit.
"""

from __future__ import annotations

import datetime as dt
import decimal
import ipaddress
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Json, Jsonb
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

UTC = dt.timezone.utc
EAST = dt.timezone(dt.timedelta(hours=5, minutes=45))
D = decimal.Decimal

EXTENSIONS = ("citext", "cube", "hstore", "intarray", "isn", "ltree", "seg", "vector")

# A domain and a composite that take anything of their kind, an enum with names that look like syntax, ranges of ours.
USER_TYPES = """
    CREATE TYPE mood AS ENUM ('happy', 'sad day', 'it''s', 'a,b', 'NULL', 'q"uote', 'back\\slash', '{x}', 'Ümlaut');
    CREATE TYPE pair AS (number integer, word text);
    CREATE DOMAIN code AS varchar(3);
    CREATE TYPE strict AS (short varchar(3), bits bit(2), coded code, amounts numeric(5,2)[]);
    CREATE TYPE "Odd ""Type%s" AS ENUM ('one', 'two');
    CREATE TYPE wordrange AS RANGE (subtype = text, collation = "C");
    CREATE TYPE floatrange AS RANGE (subtype = float8);
    CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
    CREATE DOMAIN always AS text NOT NULL;
    CREATE DOMAIN tags AS text[] CHECK (array_length(VALUE, 1) < 4);
    CREATE DOMAIN document AS jsonb CHECK (VALUE <> '"forbidden"');
    CREATE DOMAIN loose AS text COLLATE "C" CHECK (VALUE !~ '[A-Z]');
"""

# For any type, whatever it takes of them.
TEXTS: tuple[Any, ...] = (
    *(None, "", " ", "0", "1", "-1", "1.5", "a", "abcd", "10", "1010", "NULL", "null", "{}", "{1}", "{1,NULL}"),
    *(
        "it's",
        '"quoted"',
        "back\\slash",
        "\\",
        '\\"',
        "a,b",
        "a{b}",
        "(1,2)",
        "(1,abcdef)",
        "[1,2]",
        "line\nbreak\ttab",
    ),
    *("Ümläut ß", "🐘", "infinity", "-infinity", "2026-01-02", "t", "%s", "$1", "\\x00ff", "\\x4", "   a   "),
    *("x" * 3000, "E'a'", "nul\0", "\ud800", "true", "1e3", "::1", "a => b"),
)

OWN: dict[str, tuple[Any, ...]] = {
    "bool": (True, False, "yes", "off", " TRUE "),
    "int2": (0, -(2**15), 2**15 - 1, 2**15, " 7 ", "0x1F", "1_000"),
    "int4": (0, -(2**31), 2**31 - 1, 2**31, " 7 ", "0x1F", "1_000"),
    "int8": (0, -(2**63), 2**63 - 1, 2**63, " 7 ", "0b11"),
    "oid": (0, 2**32 - 1, 2**32, "-1"),
    "xid": ("7", "4294967295"),
    "xid8": ("7", "18446744073709551615"),
    "cid": ("7",),
    "tid": ("(0,1)", "(4294967295,65535)"),
    "float4": (0.1, -0.0, 1.5, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, 1e39, 1 / 3, 16777217, "-0", "1e-46"),
    "float8": (
        0.1,
        -0.0,
        math.nan,
        math.inf,
        -math.inf,
        5e-324,
        1.7976931348623157e308,
        1 / 3,
        "-0",
        "1e400",
        "1e-400",
    ),
    "numeric": (
        *(D("1.10"), D("NaN"), D("Infinity"), D("-Infinity"), D("1e-30"), 10**40, -0.0, 1.25, D("-0.00"), D("999.994")),
        *("1e-1000", "12345678901234567890.123456789012345678901234567890", "1e5", "Infinity", 99999, D("0.005")),
    ),
    "money": ("12.34", "$1,234.56", "-5", "(1.00)", "92233720368547758.07", "92233720368547758.08"),
    "text": ("E'\\n'", "‮rtl", "é", "\x7f", "--", ";", "/*"),
    "varchar": ("abc", "abc   ", "äöü", "äöüß", "🐘🐘🐘🐘"),
    "bpchar": ("abc", "abc   ", "ab ", "äöü", "äöüß", "ab\n"),
    "name": ("n" * 63, "n" * 64, "ü" * 40),
    "char": ("b", "ab", "\\101", "\\377"),
    "bytea": (
        b"",
        b"\x00\xff\\",
        b"\\x4142",
        bytes(range(256)),
        bytearray(b"a'b"),
        memoryview(b"x\0y"),
        "\\000\\\\",
        "abc",
    ),
    "date": (
        *(dt.date(2026, 1, 2), dt.date.min, dt.date.max, "0044-03-15 BC", "4714-11-24 BC", "5874897-12-31"),
        *("5874898-01-01", "10000-01-01", "2026-02-30", "20260102", "infinity", "2026-12-11"),
    ),
    "time": (dt.time(0, 0), dt.time(23, 59, 59, 999999), "24:00:00", "25:00", "04:05:06.789012", "23:59:59.9999999"),
    "timetz": (
        *(dt.time(1, 2, 3, tzinfo=UTC), dt.time(23, 59, 59, 999999, tzinfo=EAST), "24:00:00+00", "01:02:03+15:59:59"),
        *("01:02:03-08", "01:02+00:00:01", "12:00:00.55+00"),
    ),
    "timestamp": (
        *(dt.datetime(2026, 1, 2, 3, 4, 5, 678901), dt.datetime.min, dt.datetime.max, "0044-03-15 12:00 BC"),
        *("294276-12-31 23:59:59.999999", "294277-01-01", "4714-11-24 00:00:00 BC", "10000-01-01", "epoch"),
        *("infinity", "-infinity", "2026-12-11 10:09:08.5"),
    ),
    "timestamptz": (
        *(dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), dt.datetime(2026, 12, 11, tzinfo=EAST)),
        *(dt.datetime(1, 1, 2, tzinfo=UTC), dt.datetime(9999, 12, 30, tzinfo=EAST), dt.datetime(2026, 3, 29, 2, 30)),
        *("0044-03-15 12:00:00+00 BC", "294276-12-31 23:59:59+00", "10000-01-01 00:00:00+00", "1800-01-01 00:00:00+00"),
        *("infinity", "-infinity", "2026-12-11 10:09:08.5-03:30", "2026-06-01 00:00 Europe/Berlin"),
    ),
    "interval": (
        *(dt.timedelta(days=1, microseconds=5), dt.timedelta(days=-1, seconds=3), dt.timedelta.max, dt.timedelta(0)),
        *("1 mon 2 days", "-1 mon +2 days -03:04:05.6", "P1Y2M3DT4H5M6.7S", "178000000 years", "1 year 25 hours"),
        *("infinity", "-infinity", "1-2 3 4:05:06", "00:00:01.55", "-00:00:01"),
    ),
    "uuid": (uuid.UUID(int=5), "{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}", "a0eebc999c0b4ef8bb6d6bb9bd380a11"),
    "json": (
        *(Json({"a": [1, None, 'x"\\']}), Json(None), Json("text"), '{"b":1, "a":2,"b":3}', " [1 ] ", '"\\u0000"', "{"),
        *('"ü🐘"', "1e400"),
    ),
    "jsonb": (
        *(
            Jsonb({"a": [1, None, 'x"\\']}),
            Jsonb(None),
            Jsonb("text"),
            '{"b":1, "a":2,"b":3}',
            " [1 ] ",
            '"\\u0000"',
            "{",
        ),
        *('"ü🐘"', "1e400", '"forbidden"'),
    ),
    "jsonpath": ("$.a[*] ? (@ > 1)", "$", "strict $.a"),
    "xml": ("<a>b</a>", "plain text", "<a/><b/>", "<?xml version='1.0'?><a/>", "<a", "<!DOCTYPE a><a/>"),
    "inet": (
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_interface("10.0.0.1/8"),
        ipaddress.ip_address("::1"),
        "::/0",
    ),
    "cidr": (ipaddress.ip_network("10.0.0.0/8"), "10.1/16", "10.0.0.1/8", "2001:db8::/32"),
    "macaddr": ("08:00:2b:01:02:03", "08002b010203"),
    "macaddr8": ("08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03"),
    "bit": ("101", "1", "11", "1111", "x5", "102"),
    "varbit": ("101", "", "1", "1111", "xF", "x1F"),
    "point": ("(1,2)", "1.5,-0", "(infinity,nan)", "(1e-320,0.1)"),
    "line": ("{1,2,3}", "(0,0),(1,1)", "{0,0,1}"),
    "lseg": ("[(0,0),(1,1)]",),
    "box": ("(1,1),(0,0)", "(0.1,0.2),(0.3,0.4)"),
    "path": ("((0,0),(1,1))", "[(0,0),(1,1)]"),
    "polygon": ("((0,0),(1,1),(2,0))",),
    "circle": ("<(0,0),1.5>", "<(0,0),-1>"),
    "tsvector": ("a:1A b:2", "'it''s' b", "'\\\\':1", "ü"),
    "tsquery": ("a & b", "!a | b:*", "'it''s'", "a &"),
    "pg_lsn": ("16/B374D848", "0/0", "x/1"),
    "pg_snapshot": ("10:20:10,14", "1:1:", "2:1:"),
    "txid_snapshot": ("10:20:10,14", "1:1:"),
    "aclitem": ("=r/10", "=ar*/10"),
    "refcursor": ("a cursor", "<unnamed portal 1>"),
    "regclass": ("pg_class", "pg_catalog.pg_type", "no_such", "-", "1259"),
    "regproc": ("pg_catalog.now", "now"),
    "regprocedure": ("now()", "abs(integer)", "abs"),
    "regoper": ("pg_catalog.||/", "!~~*"),
    "regoperator": ("+(integer,integer)", "-(none,integer)"),
    "regtype": ("integer", "timestamp with time zone", "numeric", "mood"),
    "regrole": ("pg_monitor", "no_such"),
    "regnamespace": ("pg_catalog", "public"),
    "regconfig": ("simple", "pg_catalog.english"),
    "regdictionary": ("simple",),
    "regcollation": ('"C"', '"POSIX"'),
    "regdatabase": ("template1", "no_such"),
    "int2vector": ("1 2 3", "", "1 x"),
    "oidvector": ("1 2 3", ""),
    "int4range": (Range(1, 5), Range(1, 5, "(]"), Range(None, None), Range(empty=True), "[5,1)", "(,3]"),
    "int8range": (Range(1, 2**40), "[1,1]"),
    "numrange": (Range(D("1.10"), D("2")), "[1,NaN]", "(,)"),
    "tsrange": (Range(dt.datetime(2026, 1, 2), dt.datetime(2026, 1, 3)), '["2026-01-02 00:00",infinity)'),
    "tstzrange": (Range(dt.datetime(2026, 1, 2, tzinfo=UTC), None), '["2026-01-02 00:00+00","0044-03-15 BC"]'),
    "daterange": (Range(dt.date(2026, 1, 2), dt.date(2026, 12, 11), "[]"), "[-infinity,infinity)", "[0044-03-15 BC,)"),
    "int4multirange": (Multirange([Range(1, 3), Range(5, 7)]), "{[1,2],[2,5)}"),
    "int8multirange": (Multirange([]), "{[1,2]}"),
    "nummultirange": (Multirange([Range(D("1.1"), D("2.20"))]), "{(,1]}"),
    "tsmultirange": ("{[2026-01-02,2026-01-03)}",),
    "tstzmultirange": ("{[2026-01-02 00:00+00,)}",),
    "datemultirange": (Multirange([Range(dt.date(2026, 1, 2), dt.date(2026, 1, 5))]), "{[0044-03-15 BC,)}"),
    "mood": ("happy", "it's", "a,b", "NULL", 'q"uote', "back\\slash", "{x}", "Ümlaut", "angry"),
    "pair": (
        "(1,x)",
        '(2,"a,b")',
        "(,)",
        '(3,"q""uote\\\\")',
        "(x,y)",
        "(1,2,3)",
        (4, 'tuple, with "quotes" \\'),
        (None, None),
    ),
    "strict": (
        "(abc,10,x,{1.234})",
        "(abcd,10,x,{})",
        "(abc,101,x,{})",
        "(abc,10,toolong,{})",
        "(abc,10,x,{12345})",
        "(,,,)",
    ),
    'Odd "Type%s': ("one", "three"),
    "wordrange": (Range("a", "b"), '["a,b","q""uote")', "[b,a]", "(,)"),
    "wordmultirange": ('{["a,b",c)}',),
    "floatrange": (Range(0.1, 1.5), "[-0,1e-320]", "[NaN,NaN]"),
    "positive": (1, 0, "5"),
    "always": ("x",),
    "tags": (["a", None], ["a", "b", "c", "d"], "{NULL,'a'}"),
    "document": (Jsonb({"a": 1}), '"forbidden"', Jsonb("forbidden")),
    "loose": ("lower", "Upper"),
    "citext": ("MiXeD", "mixed"),
    "hstore": ('a=>1, "b c"=>NULL', '"q\\"uote"=>"back\\\\slash"', "a"),
    "ltree": ("Top.Science", "a..b"),
    "lquery": ("Top.*", "*.a|b.*"),
    "ltxtquery": ("Europe & Russia*@",),
    "query_int": ("1&(2|3)",),
    "cube": ("(1,2),(3,4)", "0.1"),
    "seg": ("1.5 .. 2.50", "~7", "<10"),
    "vector": ("[1,2.5,3]", "[NaN]"),
    "halfvec": ("[1,2.5,3]", "[65536]"),
    "sparsevec": ("{1:1.5,3:2}/5",),
    "ean13": ("9780306406157", "9780306406158"),
    "isbn": ("0306406152",),
}

MODIFIED = (
    *("char(3)", "varchar(3)", "bit(3)", "bit varying(3)", "numeric(5,2)", "numeric(3,0)", "time(0)", "timetz(2)"),
    *("timestamp(0)", "timestamptz(3)", "interval(0)", "interval day to second(2)", "interval year", "interval hour"),
    *("character", "bit"),
)
MODIFIED_SINCE_15 = ("numeric(3,-2)", "numeric(2,5)")


@dataclass(frozen=True)
class Column:
    """A type as a column has it: *base* names the candidates, *is_array* wraps them."""

    name: str
    base: str
    is_array: bool = False

    def candidates(self) -> list[Any]:
        """Values that may fit or not, each once."""
        own = OWN.get(self.base, ())
        return distinct([*own, *TEXTS, *(self._arrays(own) if self.is_array else ())])

    def _arrays(self, own: Sequence[Any]) -> list[Any]:
        # A list that is an element of JSON's type is JSON, and no second dimension.
        is_json = self.base in ("json", "jsonb", "document")
        return [each for each in arrays(own) if not (is_json and isinstance(each, list) and list in map(type, each))]


def distinct(values: Sequence[Any]) -> list[Any]:
    known: set[str] = set()
    kept = []
    for value in values:
        mark = f"{type(value).__name__} {value!r}"
        if mark not in known:
            known.add(mark)
            kept.append(value)
    return kept


def arrays(elements: Sequence[Any]) -> list[Any]:
    """Arrays of *elements*, as lists and as text."""
    texts = [element for element in elements if isinstance(element, str)]
    objects = [element for element in elements if not isinstance(element, str)]
    found: list[Any] = [[], "{}", "{NULL}", '{NULL,null,"NULL"}', "{{NULL,NULL}}", "{1", '{"a","b\\"c"}', [None]]
    for text in texts:
        found += [[text], [text, None, text], as_array(quoted(text))]
    if texts:
        found += [
            "[2:3]=" + as_array(quoted(texts[0]), quoted(texts[-1])),
            as_array(as_array(quoted(texts[0]), "NULL"), as_array("NULL", quoted(texts[0]))),
            [[texts[0], None], [None, texts[0]]],
        ]
    for element in objects:
        found += [[element], [element, None]]
    if objects:
        found += [[[objects[0]], [objects[0]]]]
    return found


def as_array(*texts: str) -> str:
    return "{" + ",".join(texts) + "}"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_TYPES = """
    SELECT t.typname, CASE WHEN t.typname IN ('bit', 'bpchar') THEN format('pg_catalog.%I', t.typname)
        ELSE t.oid::regtype::text END, t.typarray <> 0,
        EXISTS (SELECT FROM pg_depend d WHERE d.objid = t.oid AND d.classid = 'pg_type'::regclass AND d.deptype = 'e')
    FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
    WHERE t.typtype <> 'p' AND (t.typcategory <> 'A' OR t.typname IN ('int2vector', 'oidvector'))
        AND (t.typtype <> 'c' OR c.relkind = 'c')
        AND t.typnamespace IN ('pg_catalog'::regnamespace, 'public'::regnamespace)
    ORDER BY t.typname"""


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Types of our own, and those of the extensions that the server brings along."""
    connection.execute(USER_TYPES)
    available = {name for (name,) in connection.execute("SELECT name FROM pg_available_extensions").fetchall()}
    for name in EXTENSIONS:
        if name in available:
            connection.execute(sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(name)))


def columns(connection: psycopg.Connection[Any]) -> list[Column]:
    """Every type that can be written, its arrays, domains over it and over those, and what a modifier makes of it."""
    types = connection.execute(_TYPES).fetchall()
    modified = [*MODIFIED, *(MODIFIED_SINCE_15 if connection.info.server_version >= 150000 else ())]
    found: list[Column] = []
    for base, name, has_array, is_extra in types:
        if is_writable(connection, name, base):
            family = _family(connection, name, base, has_array)
            found += family[:2] if is_extra else family
    for name in modified:
        base = connection.execute(
            sql.SQL("SELECT typname FROM pg_type WHERE oid = {}::regtype").format(name)
        ).fetchone()
        found += _family(connection, name, base[0], True)
    return found


def _family(connection: psycopg.Connection[Any], name: str, base: str, has_array: bool) -> list[Column]:
    """The type, its array, a domain, a domain over that one and its array, and a domain over the array."""
    plain, checked, listed = (
        sql.Identifier(f"{what} {name}").as_string(connection)
        for what in ("domain over", "checked domain over", "list of")
    )
    own = [Column(name, base), Column(plain, base), Column(checked, base), Column(f"{checked}[]", base, True)]
    connection.execute(
        f"CREATE DOMAIN {plain} AS {name}; CREATE DOMAIN {checked} AS {plain} CHECK (VALUE::text <> 'q')"
    )
    if has_array:
        connection.execute(f"CREATE DOMAIN {listed} AS {name}[] CHECK (cardinality(VALUE) < 9)")
        own[1:1] = [Column(f"{name}[]", base, True), Column(listed, base, True)]
    return own


def is_writable(connection: psycopg.Connection[Any], name: str, base: str) -> bool:
    """Whether a column can have the type and any candidate goes in."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(f"CREATE TABLE probe (v {name})")
            return any(_goes_in(connection, value) for value in [*OWN.get(base, ()), *TEXTS[1:]])
    except psycopg.Error:
        return False


def _goes_in(connection: psycopg.Connection[Any], value: Any) -> bool:
    try:
        with connection.transaction():
            connection.execute("INSERT INTO probe VALUES (%s)", [value])
    except (psycopg.Error, UnicodeError):
        return False
    return True
