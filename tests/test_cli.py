"""The command line, mostly as a user runs it: `python -m microbatch …` in a process of its own."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from microbatch import _rows
from microbatch._rows import BadInput, BadRow, CsvRows, JsonRows, Lines, Row, looks_like_json
from microbatch._terminal import Stopped, StopSignals, table
from microbatch.cli import main
from microbatch.processors.postgres import PostgresProcessor
from microbatch.processors.postgres.guard import DDL

PATIENCE = 60.0  # seconds; a guard, not a measure
ENVIRONMENT = {name: text for name, text in os.environ.items() if name != "MICROBATCH_DSN"}
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


# Rules: how a text becomes rows.


def csv_rows(text: str, null: str = "") -> list[tuple[str | None, ...] | str]:
    source = CsvRows(Lines(io.StringIO(text, newline="\n")), null)
    return [row.values if isinstance(row, Row) else row.reason for row in source.read(())]


def json_rows(text: str, columns: tuple[str, ...] | None = None, json_columns: tuple[str, ...] = ()) -> list[Any]:
    source = JsonRows(Lines(io.StringIO(text, newline="\n")), columns)
    return [row.values if isinstance(row, Row) else row.reason for row in source.read(json_columns)]


@pytest.mark.parametrize(
    ("record", "values"),
    [
        ("1,2", ("1", "2")),
        (",", (None, None)),
        ('"",', ("", None)),
        (',""', (None, "")),
        ('"a,b",c', ("a,b", "c")),
        ('"say ""hi""",x', ('say "hi"', "x")),
        ('"""",""""""', ('"', '""')),
        ('"two\nlines",x', ("two\nlines", "x")),
        ('"two\r\nlines",x\r', ("two\r\nlines", "x")),
        (" a ,b\t", (" a ", "b\t")),
        ("größe,日本", ("größe", "日本")),
        (r"\N,\.", (r"\N", r"\.")),
    ],
)
def test_a_csv_record_is_split_as_copy_does(record: str, values: tuple[str | None, ...]) -> None:
    assert csv_rows(f"a,b\n{record}\n") == [values]
    assert csv_rows(f"a,b\n{record}") == [values]


def test_the_null_text_counts_only_unquoted() -> None:
    assert csv_rows('a,b\nNA,"NA"\n,NA\n', null="NA") == [(None, "NA"), ("", None)]


def test_an_empty_line_is_skipped_unless_it_is_the_null_of_a_single_column() -> None:
    assert csv_rows("a,b\n\n1,2\n\r\n\n") == [("1", "2")]
    assert csv_rows("a\n1\n\n2\n") == [("1",), (None,), ("2",)]


def test_the_wrong_number_of_fields_is_a_bad_row_of_its_own() -> None:
    assert csv_rows('a,b\n1\n1,2\n1,2,3\n"x\ny"\n3,4\n') == [
        "1 field where the header has 2",
        ("1", "2"),
        "3 fields where the header has 2",
        "1 field where the header has 2",
        ("3", "4"),
    ]


@pytest.mark.parametrize("stray", ['1,5" pipe', '1,"a"b', '1,3" by 5"', '1,a"'])
def test_a_stray_quote_costs_its_own_line_only(stray: str) -> None:
    rows = csv_rows(f'a,b\n0,0\n{stray}\n2,"two"\n3,3\n{stray}\n4,"4"\n')

    assert [row for row in rows if isinstance(row, tuple)] == [
        ("0", "0"),
        ("2", "two"),
        ("3", "3"),
        ("4", "4"),
    ]
    assert len(rows) == 6


def test_line_numbers_are_those_of_the_file() -> None:
    source = CsvRows(Lines(io.StringIO('\na,b\n"1\n\n",2\n\n3\n4,5\n')))

    places = [(row.first_line, row.last_line, type(row)) for row in source.read(())]

    assert places == [(3, 5, Row), (7, 7, BadRow), (8, 8, Row)]


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_line_without_an_end_is_refused_without_being_kept(quote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "MAX_RECORD", 100)

    rows = csv_rows(f"a,b\n{quote}{'x' * 1000}{quote}\n1,2\n")

    assert rows == ["longer than 100 characters", ("1", "2")]


INSIDE = "attacker,owns\n" * 50

INJECTIONS = {
    "as it should be": f'1,"{INSIDE}"',
    "behind a stray quote": f'5" pipe,"{INSIDE}"',
    "before a stray quote": f'"{INSIDE}",5" pipe',
    "with a doubled quote": f'"a""{INSIDE}""b",2',
    "reopened behind its end": f'1,"a"b"{INSIDE}"',
    "with a field too many": f'1,2,"{INSIDE}"',
    "with a NUL": f'1,"\0{INSIDE}"',
    "with bytes that are no text": f'1,"\udcff{INSIDE}"',
    "opened behind a long field": f'{"x" * 300},"{INSIDE}"',
    "opened in a long line": f'1,"{"x" * 300}{INSIDE}"',
    "closed in a long line": f'1,"{INSIDE}{"x" * 300}"',
    "with a quote where a piece of a long line ends": f'1,"{"x" * 97}""{INSIDE}"',
}


@pytest.mark.parametrize("limit", [100, 101, 102, 1 << 20])
@pytest.mark.parametrize("record", INJECTIONS.values(), ids=INJECTIONS.keys())
def test_nothing_inside_a_quoted_field_is_a_row(record: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "MAX_RECORD", limit)

    first, last = csv_rows(f"a,b\n{record}\n3,3\n")

    assert isinstance(first, str) or INSIDE in "".join(filter(None, first))
    assert last == ("3", "3")


@given(
    st.lists(st.tuples(*[st.text('",\n ax', max_size=9)] * 2), min_size=1),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([7, 20, 1 << 20]),
)
def test_what_a_csv_writer_writes_is_read_or_refused(
    rows: list[tuple[str, str]], quoting: Any, end: str, limit: int
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=quoting, lineterminator=end).writerows(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "MAX_RECORD", limit)
        read = csv_rows("a,b\n" + file.getvalue(), null="\n")

    assert len(read) == len(rows)
    assert all(isinstance(found, str) or found == row for found, row in zip(read, rows, strict=True))
    assert limit < 1 << 20 or read == rows


@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_an_input_that_ends_inside_a_quoted_field_gives_no_row_of_it(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "MAX_RECORD", limit)
    source = CsvRows(Lines(io.StringIO(f'a,b\n0,0\n1,"open\n{INSIDE}')))

    _, refused = source.read()

    assert isinstance(refused, BadRow)
    assert (refused.first_line, refused.last_line, refused.text) == (3, 53, '1,"open')
    assert "not closed" in refused.reason


def test_a_record_that_is_too_long_is_refused_with_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "MAX_RECORD", 100)
    source = CsvRows(Lines(io.StringIO(f'a,b\n1,"{INSIDE}"\n2,2\n')))

    refused, kept = source.read()

    assert (refused.first_line, refused.last_line, kept.first_line) == (2, 52, 53)
    assert isinstance(refused, BadRow)
    assert refused.reason == "longer than 100 characters"
    assert len(refused.text) <= 101


def test_bytes_that_are_no_text_cost_their_own_row_only() -> None:
    text = b'a,b\n1,\xff\n2,2\n"\xfe\n3",3\n4,4\n5,\0\n'.decode("utf-8", "surrogateescape")

    first, second, third, fourth, fifth = csv_rows(text)

    assert (second, fourth) == (("2", "2"), ("4", "4"))
    assert "encoding" in first
    assert "encoding" in third
    assert "NUL" in fifth


def test_a_csv_without_a_header_cannot_be_loaded() -> None:
    with pytest.raises(BadInput, match="header"):
        CsvRows(Lines(io.StringIO("\n \n")))


def test_json_numbers_keep_their_text() -> None:
    line = '{"a": 100.00, "b": 12345678901234567890123456789, "c": [1.50, {"d": 1e5}]}'

    assert json_rows(line) == [("100.00", "12345678901234567890123456789", '[1.50, {"d": 1e5}]')]


def test_json_values_become_text() -> None:
    line = '{"a": null, "b": true, "c": "x\\ny", "d": "", "e": {}}'

    assert json_rows(line) == [(None, "true", "x\ny", "", "{}")]


def test_values_of_json_columns_stay_json() -> None:
    line = '{"a": "x", "b": 1.0, "c": null, "d": "y"}'

    assert json_rows(line, json_columns=("a", "b", "c")) == [('"x"', "1.0", None, "y")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": 1}', "missing key 'b'"),
        ('{"a": 1, "b": 2, "c": 3}', "unknown key 'c'"),
        ('{"a": 1, "c": 3}', "unknown key 'c'; missing key 'b'"),
        ('{"a": 1, "a": 2, "b": 3}', "key 'a' stands twice"),
        ("[1, 2]", "not a JSON object"),
        ('{"a": 1, "b":', "not JSON: Expecting value"),
        ("[" * 100_000, "recursion"),
        ('{"a": 1, "b": ' + "[" * 3000 + "]" * 3000 + "}", "nested too deep"),
    ],
)
def test_a_json_line_that_does_not_fit_is_a_bad_row(line: str, reason: str) -> None:
    first, bad, last = json_rows(f'{{"a": 1, "b": 2}}\n{line}\n\n{{"b": 4, "a": 3}}\n')

    assert (first, last) == (("1", "2"), ("3", "4"))
    assert reason in bad


@pytest.mark.parametrize("depth", range(100, 1200, 50))
def test_json_is_nested_as_deep_as_it_goes_and_then_refused(depth: int) -> None:
    nested = "[" * depth + "]" * depth

    first, second, third = json_rows(f'{{"a": 1}}\n{{"a": {nested}}}\n{{"a": 3}}\n', json_columns=("a",))

    assert (first, third) == (("1",), ("3",))
    assert second == (nested,) or "nested too deep" in second


def test_the_first_object_names_the_columns_unless_they_are_given() -> None:
    lines = '{"b": 1, "a": 2}\n'

    assert JsonRows(Lines(io.StringIO(lines))).columns == ("b", "a")
    assert json_rows(lines, columns=("a", "b")) == [("2", "1")]
    with pytest.raises(BadInput, match="--columns"):
        JsonRows(Lines(io.StringIO("oops\n")))


@pytest.mark.parametrize(("text", "expected"), [('\n  {"a": 1}', True), ("a,b\n", False), ("", False)])
def test_the_first_character_tells_json_from_csv(text: str, expected: bool) -> None:
    assert looks_like_json(Lines(io.StringIO(text))) is expected


# Rules: the terminal.


def test_a_table_is_aligned() -> None:
    assert table([("", "a", "b"), ("rows", "1", "1,000")]) == "         a       b\n  rows   1   1,000"


def test_a_signal_ends_the_reading_between_two_items() -> None:
    with StopSignals(patience=1) as stop:
        items = stop.until_stopped(iter([1, 2, 3]))
        assert next(items) == 1
        os.kill(os.getpid(), signal.SIGINT)

        assert list(items) == []
        with pytest.raises(Stopped):
            stop.check()


def test_a_signal_ends_the_wait_for_an_item() -> None:
    def silent_pipe() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)

    with StopSignals(patience=1) as stop:
        assert list(stop.until_stopped(silent_pipe())) == [1]
        assert stop.number == signal.SIGTERM


def test_no_signal_between_two_rows_is_lost() -> None:
    """Wherever it comes, nothing is read after it: that might block."""
    points = itertools.takewhile(ends_after_a_signal_at, itertools.count())
    assert sum(1 for _ in points) > 5


def ends_after_a_signal_at(point: int) -> bool:
    """Whether there is such a point on the way from one row to the next."""
    stop, left = StopSignals(patience=9), point

    def read() -> Iterator[str]:
        while not stop.count:
            yield "row"
        raise AssertionError("read after the signal")

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == -1:
                stop._handle(signal.SIGINT, frame)
        return trace

    rows = stop.until_stopped(read())
    next(rows)
    frame = rows.gi_frame  # type: ignore[attr-defined]
    frame.f_trace, frame.f_trace_opcodes = trace, True
    outer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        list(itertools.islice(rows, 1))
    finally:
        sys.settrace(outer)
    if stop.count:
        assert list(rows) == []
    return bool(stop.count)


# The program.


def test_help_needs_no_driver() -> None:
    program = "import sys; sys.modules['psycopg'] = None; from microbatch.cli import main; main(['--help'])"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (0, "")
    assert "demo" in done.stdout
    assert "load" in done.stdout
    assert "init-db" in done.stdout


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])

    assert stopped.value.code in (0, None)
    assert capsys.readouterr().out == f"microbatch {version('microbatch')}\n"


@pytest.mark.parametrize("arguments", [["demo"], ["load", "x.csv", "--table", "t"], ["init-db"]])
def test_a_missing_driver_is_one_line_with_the_cure(arguments: list[str]) -> None:
    program = f"import sys; sys.modules['psycopg'] = None; from microbatch.cli import main; exit(main({arguments}))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)

    assert_one_line(done, "psycopg")


@pytest.mark.parametrize(
    "arguments",
    [[], ["lo"], ["load"], ["load", "x", "--table", "t", "--workers", "0"], ["demo", "--seconds", "nan"]],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://anna:geheim@127.0.0.1:1/nowhere",
        "postgresql://anna:geh@eim@127.0.0.1:1/nowhere",
        "postgresql://anna:geheim/@127.0.0.1:1/nowhere",
        "postgresql//anna:geheim@127.0.0.1",
        "host=127.0.0.1 port=1 password=geheim connect_timeout=5",
    ],
)
@pytest.mark.parametrize("command", ["load", "demo", "init-db"])
def test_an_unreachable_server_is_one_line_without_the_password(dsn: str, command: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a\n1\n")
    arguments = {"load": [file, "--table", "t"], "demo": [], "init-db": ["--apply"]}[command]

    done = run(command, *arguments, "--dsn", dsn)

    assert_one_line(done, "conn")
    assert "geh" not in done.stderr
    assert "eim" not in done.stderr


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert_one_line(run("load", str(tmp_path / "none.csv"), "--table", "t"), "No such file")
    assert_one_line(run("load", str(tmp_path), "--table", "t"), "directory")


def test_options_of_the_other_format_are_refused(tmp_path: Path) -> None:
    csv, lines = write(tmp_path / "a.csv", "a\n1\n"), write(tmp_path / "a.ndjson", '{"a": 1}\n')

    assert_one_line(run("load", csv, "--table", "t", "--columns", "a"), "--columns")
    assert_one_line(run("load", lines, "--table", "t", "--null", "NA"), "--null")
    assert_one_line(run("load", csv, "--table", "t", "--encoding", "klingon"), "klingon")


# Loading.


@pytest.fixture
def payments(database: str) -> str:
    """A database with a table to load into."""
    execute(
        database,
        """CREATE TABLE payments (
            id int GENERATED ALWAYS AS IDENTITY,
            user_id int NOT NULL CHECK (user_id > 0),
            amount numeric(10,2),
            status varchar(50),
            at timestamptz DEFAULT now(),
            data jsonb
        )""",
    )
    return database


@pytest.mark.database
def test_csv_rows_arrive_with_their_nulls(payments: str, tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.csv",
        '\ufeffuser_id,amount,status,data\r\n1,100.00,"",\r\n2,,"a ""quoted"", text\nof two lines","{""a"": [1]}"\r\n',
    )

    done = run("load", file, "--table", "payments", "--dsn", payments)

    assert (done.returncode, done.stderr) == (0, "")
    assert counts(done) == {"rows read": 2, "committed": 2, "failed": 0, "unknown": 0, "refused": 0}
    assert fetch(payments, "SELECT user_id, amount::text, status, data, at IS NULL FROM payments ORDER BY id") == [
        (1, "100.00", "", None, False),
        (2, None, 'a "quoted", text\nof two lines', {"a": [1]}, False),
    ]


@pytest.mark.database
def test_json_lines_arrive(payments: str, tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        '{"user_id": 1, "amount": 0.10, "status": "ü", "data": {"n": 1.50}}\n'
        '{"data": "text", "status": null, "amount": null, "user_id": "2"}\n',
    )

    done = run("load", file, "--table", "payments", "--dsn", payments)

    assert done.returncode == 0
    assert fetch(payments, "SELECT user_id, amount::text, status, data::text FROM payments ORDER BY id") == [
        (1, "0.10", "ü", '{"n": 1.50}'),
        (2, None, None, '"text"'),
    ]


@pytest.mark.database
@pytest.mark.parametrize(
    "text", ["user_id,status\n1,a\n2,b\n", '{"user_id": 1, "status": "a"}\n{"user_id": 2, "status": "b"}']
)
def test_standard_input_is_looked_at_and_the_environment_names_the_server(payments: str, text: str) -> None:
    done = run("load", "-", "--table", "payments", stdin=text, MICROBATCH_DSN=payments)

    assert (done.returncode, done.stderr) == (0, "")
    assert fetch(payments, "SELECT user_id, status FROM payments ORDER BY id") == [(1, "a"), (2, "b")]


@pytest.mark.database
def test_names_are_those_of_sql(database: str, tmp_path: Path) -> None:
    execute(database, 'CREATE SCHEMA "My Shop"')
    execute(database, 'CREATE TABLE "My Shop"."Or""der" ("50% ""off""" int, "select" text, "%s" text)')
    file = write(tmp_path / "o.csv", '"50% ""off""",select,%s\n7,x,y\n')

    done = run("load", file, "--table", '"My Shop"."Or""der"', "--dsn", database)

    assert (done.returncode, done.stderr) == (0, "")
    assert fetch(database, 'SELECT * FROM "My Shop"."Or""der"') == [(7, "x", "y")]


@pytest.mark.database
def test_an_unquoted_name_is_folded_and_qualified(payments: str, tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", "user_id\n1\n")

    assert run("load", file, "--table", "Public.Payments", "--dsn", payments).returncode == 0
    assert count(payments) == 1


@pytest.mark.database
@pytest.mark.parametrize(
    ("header", "name", "complaint"),
    [
        ("user_id", "nowhere", "no table nowhere"),
        ("user_id", '"Payments"', 'no table "Payments"'),
        ("user_id", "a..b", "a..b"),
        ("user_id", "payments_key", "is no table"),
        (
            "user_id,stat",
            "payments",
            "no column 'stat'; its columns are id, user_id, amount, status, at, data",
        ),
        ("user_id,status,status", "payments", "'status' named more than once"),
        ("id,user_id", "payments", "'id'"),
        ("status,amount", "payments", "lacks column 'user_id'"),
    ],
)
def test_what_does_not_fit_the_table_is_said_before_the_first_row(
    payments: str, tmp_path: Path, header: str, name: str, complaint: str
) -> None:
    execute(payments, "CREATE INDEX payments_key ON payments (user_id)")
    file = write(tmp_path / "p.csv", f"{header}\n")

    assert_one_line(run("load", file, "--table", name, "--dsn", payments), complaint)


@pytest.mark.database
def test_a_trigger_may_fill_in_what_must_not_be_null(payments: str, tmp_path: Path) -> None:
    before_insert(payments, "NEW.user_id = 7")
    file = write(tmp_path / "p.csv", "status\nx\n")

    assert run("load", file, "--table", "payments", "--dsn", payments).returncode == 0
    assert fetch(payments, "SELECT user_id, status FROM payments") == [(7, "x")]


@pytest.mark.database
def test_every_row_is_committed_or_among_the_rejects(payments: str, tmp_path: Path) -> None:
    lines = [f"{n},{n}.50,ok" for n in range(1, 2001)]
    lines[99], lines[499], lines[999], lines[1499] = "100,x,ok", "500,1", "-1000,1.00,ok", '1500,1,5" pipe'
    file = write(tmp_path / "p.csv", "user_id,amount,status\n" + "\n".join(lines) + "\n")
    rejects = tmp_path / "rejects.jsonl"

    done = run(
        "load",
        file,
        "--table",
        "payments",
        "--dsn",
        payments,
        "--rejects",
        str(rejects),
        "--max-batch-size",
        "50",
    )

    entries = {entry["line"]: entry for entry in map(json.loads, rejects.read_text().splitlines())}
    tally = counts(done)
    written = {row[0] for row in fetch(payments, "SELECT user_id FROM payments")}
    rejected = {int(str(line_of(entry)).split(",")[0]) for entry in entries.values()}
    assert done.returncode == 1
    assert tally == {"rows read": 2000, "committed": 1996, "failed": 2, "unknown": 0, "refused": 2}
    assert rejected == {100, 500, -1000, 1500}
    assert written == {*range(1, 2001)} - {100, 500, 1000, 1500}
    assert (entries[101]["error"], entries[101]["sqlstate"]) == ("InvalidTextRepresentation", "22P02")
    assert entries[101]["row"] == {"user_id": "100", "amount": "x", "status": "ok"}
    assert (entries[1001]["error"], entries[1001]["sqlstate"]) == ("CheckViolation", "23514")
    assert (entries[501]["error"], entries[501]["row"]) == ("BadRow", "500,1")
    assert "2 fields" in entries[501]["message"]
    assert "quote" in entries[1501]["message"]
    assert "first error: line " in done.stderr


BAD_ROWS: list[tuple[str, str | None, str | None]] = [
    ("x,1.00,ok,,1", "22P02", None),
    ("1,99999999999.00,ok,,1", "22003", None),
    (f"1,1.00,{'x' * 51},,1", "22001", None),
    ("1,1.00,ok,2024-13-01,1", "22008", None),
    ("1,1.00,ok,some day,1", "22007", None),
    (",1.00,ok,,1", "23502", None),
    ("-1,1.00,ok,,1", "23514", "payments_user_id_check"),
    ("1,1.00,ok,,99", "23503", "payments_shop_fkey"),
    ("1,1.00,taken,,1", "23505", "payments_status_key"),
    ("1,666.00,ok,,1", "P0001", None),
    ("1,1.00,ok", None, None),
    ("1,1.00,a\0b,,1", None, None),
]


@pytest.mark.database
def test_a_bad_row_fails_alone_with_an_error_of_its_own(payments: str, tmp_path: Path) -> None:
    execute(payments, "CREATE TABLE shops (id int PRIMARY KEY); INSERT INTO shops VALUES (1)")
    execute(payments, "ALTER TABLE payments ADD shop int REFERENCES shops")
    execute(payments, "CREATE UNIQUE INDEX payments_status_key ON payments (status) WHERE status <> 'ok'")
    before_insert(payments, "IF NEW.amount = 666 THEN RAISE ''beastly''; END IF")
    execute(payments, "INSERT INTO payments (user_id, status) VALUES (1, 'taken')")
    lines = [f"{n},{n}.50,ok,2024-01-01,1" for n in range(1, 1001)]
    bad = {37 * n: row for n, row in enumerate(BAD_ROWS, 1)}
    for n, (line, _, _) in bad.items():
        lines[n] = line
    file = write(tmp_path / "p.csv", "user_id,amount,status,at,shop\n" + "\n".join(lines) + "\n")
    rejects = tmp_path / "rejects.jsonl"

    done = run("load", file, "--table", "payments", "--dsn", payments, "--rejects", str(rejects))

    entries = list(map(json.loads, rejects.read_text().splitlines()))
    found = {entry["line"]: (entry["sqlstate"], entry["constraint"]) for entry in entries}
    written = {row[0] for row in fetch(payments, "SELECT user_id FROM payments WHERE amount IS NOT NULL")}
    assert done.returncode == 1
    assert counts(done) == {"rows read": 1000, "committed": 988, "failed": 10, "unknown": 0, "refused": 2}
    assert found == {n + 2: (sqlstate, constraint) for n, (_, sqlstate, constraint) in bad.items()}
    assert len(entries) == len(found)
    names = ["user_id", "amount", "status", "at", "at", "user_id", "user_id", "shop", "status", None, None, None]
    assert [entry["column"] for entry in sorted(entries, key=lambda entry: entry["line"])] == names[: len(entries)]
    assert all(entry["column"] in entry["message"] for entry in entries if entry["column"])
    assert written == {n + 1 for n in range(1000) if n not in bad}
    assert {entry["error"] for entry in entries if entry["sqlstate"] is None} == {"BadRow"}


@pytest.mark.database
def test_json_lines_that_do_not_fit_are_refused(payments: str) -> None:
    text = '{"user_id": 1}\n{"user_id": 2, "x": 1}\nnonsense\n[]\n{"user_id": 3}\n'

    done = run("load", "-", "--table", "payments", "--dsn", payments, stdin=text)

    assert done.returncode == 1
    assert counts(done) == {"rows read": 5, "committed": 2, "failed": 0, "unknown": 0, "refused": 3}
    assert "line 2: unknown key 'x'" in done.stderr


@pytest.mark.database
def test_the_encoding_is_known_and_bytes_outside_it_cost_their_own_row(payments: str, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_bytes("\ufeffuser_id,status\n1,ü\n".encode() + b"2,\xff\n3,ok\n")

    done = run("load", str(file), "--table", "payments", "--dsn", payments, "--rejects", str(tmp_path / "r"))

    assert (done.returncode, counts(done)["committed"], counts(done)["refused"]) == (1, 2, 1)
    assert json.loads((tmp_path / "r").read_text("utf-8"))["row"] == "2,\udcff"
    file.write_bytes("user_id,status\n4,ü\n".encode("utf-16"))
    done = run("load", str(file), "--table", "payments", "--dsn", payments, "--encoding", "UTF_16")
    assert done.returncode == 0
    assert fetch(payments, "SELECT user_id, status FROM payments ORDER BY id") == [(1, "ü"), (3, "ok"), (4, "ü")]


@pytest.mark.database
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_rejects_and_not_the_counts(payments: str) -> None:
    text = "user_id\n1\nx,x\n2\n"

    done = run("load", "-", "--table", "payments", "--dsn", payments, "--rejects", "/dev/full", stdin=text)

    assert (done.returncode, counts(done)["committed"], counts(done)["refused"]) == (1, 2, 1)
    assert "the rejects file is incomplete: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.database
@pytest.mark.parametrize("bad", ["", "x,1.00,ok\n"], ids=["all committed", "one failed"])
@pytest.mark.parametrize("output", ["1>/dev/full", "1>&-", "2>&-", "2>/dev/full", ">/dev/full 2>&1", "| true"])
def test_output_that_cannot_be_written_changes_nothing(payments: str, output: str, bad: str, tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", f"user_id,amount,status\n1,1.00,ok\n{bad}")
    command = f"{sys.executable} -m microbatch load {file} --table payments --dsn '{payments}'"

    done = subprocess.run(
        ["bash", "-c", f"{command} {output}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=ENVIRONMENT,
    )

    assert fetch(payments, "SELECT user_id FROM payments") == [(1,)]
    assert done.returncode == (1 if bad else 0)
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    if output == "1>/dev/full":
        assert "committed     1" in done.stderr


@pytest.mark.database
@pytest.mark.parametrize("end", [b"", b"\n2,2.00"], ids=["between two rows", "inside a row"])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(payments: str, end: bytes, tmp_path: Path) -> None:
    rows = b"".join(b"%d,1.00,ok\n" % n for n in range(1, 200_001))
    file = tmp_path / "p.csv"
    file.write_bytes(b"user_id,amount,status\n" + rows)
    with psycopg.connect(payments) as locking:
        locking.execute("LOCK TABLE payments")
        with loading(payments, file=str(file)) as process:
            waits = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND relation = 'payments'::regclass"
            wait_until(lambda: bool(fetch(payments, waits)[0][0]))
            with file.open("r+b") as cut:
                cut.truncate(1_000_000)
                cut.seek(0, os.SEEK_END)
                cut.write(end)
            locking.rollback()
            output, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 1, output
    assert "shorter" in errors
    assert fetch(payments, "SELECT count(*) FROM payments WHERE amount <> 1 OR status <> 'ok'") == [(0,)]


@pytest.mark.database
def test_the_input_is_never_overwritten_by_the_rejects(payments: str, tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", "user_id\n1\n")

    done = run("load", file, "--table", "payments", "--dsn", payments, "--rejects", file)

    assert_one_line(done, "--rejects")
    assert Path(file).read_text() == "user_id\n1\n"


@pytest.mark.database
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_reading_and_drains(payments: str, number: int, status: int) -> None:
    with loading(payments) as process:
        feed(process, "user_id\n" + "".join(f"{n}\n" for n in range(1, 5001)))
        wait_until(lambda: count(payments) == 5000)
        process.send_signal(number)
        done = finish(process)

    assert done.returncode == status
    assert counts(done) == {"rows read": 5000, "committed": 5000, "failed": 0, "unknown": 0, "refused": 0}
    assert "up to line 5001," in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.database
def test_a_second_signal_gives_up_what_is_under_way(payments: str) -> None:
    before_insert(payments, "PERFORM pg_sleep(0.2)")
    with loading(payments, "--max-batch-size", "5") as process:
        feed(process, "user_id\n" + "".join(f"{n}\n" for n in range(1, 1001)))
        wait_until(lambda: count(payments) >= 10)  # the first five are told by then
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        done = finish(process)

    tally = counts(done)
    settle(payments)
    assert time.monotonic() - started < 10
    assert done.returncode == 130
    assert tally["rows read"] == sum(tally[name] for name in ("committed", "failed", "unknown", "refused"))
    assert tally["failed"] > 0
    assert 5 <= tally["committed"] <= count(payments) <= tally["committed"] + tally["unknown"]
    assert f"up to line {tally['rows read'] + 1}," in done.stderr


@pytest.mark.database
def test_a_load_that_gets_nowhere_gives_up(payments: str) -> None:
    text = "user_id\n" + "".join(f"{n}\n" for n in range(1, 1001))
    with psycopg.connect(payments) as connection:
        connection.execute("LOCK TABLE payments")
        options = ["--delivery-timeout", "1", "--max-batch-size", "10"]
        done = run("load", "-", "--table", "payments", "--dsn", payments, *options, stdin=text)

    tally = counts(done)
    assert done.returncode == 1
    assert 30 <= tally["rows read"] < 1000
    assert tally["committed"] == 0
    assert tally["rows read"] == tally["failed"] + tally["unknown"]
    assert "gave up" in done.stderr


@pytest.mark.database
def test_a_signal_before_the_first_line_ends_at_once(payments: str) -> None:
    with loading(payments) as process:
        wait_until(lambda: catches(process.pid, signal.SIGINT))
        time.sleep(0.2)  # Python's handler of a signal that comes just before a read waits for its end
        process.send_signal(signal.SIGINT)
        done = finish(process)

    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


@pytest.mark.database
@needs_proc
def test_memory_does_not_grow_with_the_file(payments: str) -> None:
    rows = [f"{n},{'x' * 40}\n" for n in range(1, 100_001)]

    with loading(payments) as process:
        feed(process, "user_id,status\n" + "".join(rows[:20_000]))
        wait_until(lambda: count(payments) == 20_000)
        early = peak_memory(process.pid)
        feed(process, "".join(rows[20_000:]))
        wait_until(lambda: count(payments) == 100_000)
        late = peak_memory(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        done = finish(process)

    assert (done.returncode, counts(done)["committed"]) == (0, 100_000)
    assert late - early < 20_000, "kB"


# Preparing a database.


def test_the_ledgers_ddl_is_printed_without_a_server() -> None:
    done = run("init-db", PGHOST="/nowhere")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{DDL};\n-- ")


def test_a_dsn_alone_applies_nothing_and_says_so() -> None:
    done = run("init-db", "--dsn", "host=/nowhere")

    assert (done.returncode, done.stdout) == (0, run("init-db").stdout)
    assert done.stderr == "microbatch init-db: nothing was applied: that takes --apply\n"


@pytest.mark.database
def test_the_ledger_is_created_once(database: str) -> None:
    first = run("init-db", "--apply", "--dsn", database)
    execute(database, "INSERT INTO microbatch_ledger VALUES ('b1946ac9-2449-4c1a-9d2f-3f0c9c7f7b10', 7)")
    second = run("init-db", "--apply", MICROBATCH_DSN=database)

    assert (first.returncode, first.stderr, second.returncode, second.stderr) == (0, "", 0, "")
    assert first.stdout.startswith("created public.microbatch_ledger; ")
    assert second.stdout == "public.microbatch_ledger is there already; nothing was changed\n"
    assert fetch(database, "SELECT batch FROM microbatch_ledger") == [(7,)]


@pytest.mark.database
def test_the_printed_ddl_is_what_apply_looks_for(database: str) -> None:
    execute(database, "CREATE SCHEMA shop")
    execute(database, "SET search_path = shop; " + run("init-db").stdout)
    dsn = make_conninfo(database, options="-c search_path=public,shop")

    done = run("init-db", "--apply", "--dsn", dsn)

    assert done.stdout == "shop.microbatch_ledger is there already; nothing was changed\n"


@pytest.mark.database
def test_two_that_create_the_ledger_at_once_get_along(database: str) -> None:
    processes = [start("init-db", "--apply", "--dsn", database) for _ in range(3)]

    ended = [process.communicate(timeout=PATIENCE) for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(stdout.split()[0] for stdout, _ in ended) == [
        "created",
        "public.microbatch_ledger",
        "public.microbatch_ledger",
    ]


@pytest.mark.database
@pytest.mark.parametrize(
    ("preparation", "options", "complaint"),
    [
        ("SELECT 1", "-c search_path=nowhere", "no schema has been selected"),
        ("SELECT 1", "-c default_transaction_read_only=on", "read-only"),
        ("CREATE TABLE microbatch_ledger (lane text)", "", "public.microbatch_ledger is not microbatch's table"),
    ],
)
def test_why_the_ledger_cannot_be_made_is_one_line(
    database: str, preparation: str, options: str, complaint: str
) -> None:
    execute(database, preparation)

    done = run("init-db", "--apply", "--dsn", make_conninfo(database, options=options))

    assert_one_line(done, complaint)


@pytest.mark.database
def test_a_processor_finds_the_ledger_that_was_made(database: str) -> None:
    assert run("init-db", "--apply", "--dsn", database).returncode == 0
    processor = PostgresProcessor(database, "SELECT 1", commit_guard="ledger")

    processor.open()
    processor.close()


# The demo.


@pytest.mark.database
@pytest.mark.usefixtures("binaries")
def test_the_demo_compares_and_counts_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)  # as root, the server runs as another user
        done = run("demo", "--seconds", "1", "--threads", "4", TMPDIR=directory)
        left = os.listdir(directory)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"rows/s +[\d,]+ +[\d,]+ +\d+\.\d\d x", done.stdout)
    assert "fsync on" in done.stdout
    assert "4 threads" in done.stdout
    assert "Every row was counted in the table" in done.stdout
    assert "\r" not in done.stdout
    assert left == []


@pytest.mark.database
def test_the_demo_on_another_server_drops_its_table(database: str) -> None:
    done = run("demo", "--seconds", "0.5", "--threads", "4", "--dsn", database)

    assert (done.returncode, done.stderr) == (0, "")
    assert fetch(database, "SELECT relname FROM pg_class WHERE relname LIKE 'microbatch_demo%'") == []


@pytest.mark.database
def test_ctrl_c_ends_the_demo_without_a_trace(database: str) -> None:
    process = start("demo", "--threads", "4", "--dsn", database)
    assert process.stdout is not None
    while "turn 1 of" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)

    assert done.returncode == 130
    assert done.stderr.splitlines() == ["microbatch demo: stopped by Ctrl-C"]
    assert fetch(database, "SELECT relname FROM pg_class WHERE relname LIKE 'microbatch_demo%'") == []


# Helpers.


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "microbatch", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
        env={**ENVIRONMENT, **environment},
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "microbatch", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


class loading:  # noqa: N801
    """A load that reads a pipe, or *file*; killed at the end if it still runs."""

    def __init__(self, dsn: str, *options: str, file: str = "-") -> None:
        self.process = start("load", file, "--table", "payments", "--dsn", dsn, *options)

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def feed(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for the end with standard input still open: a signal has to end it, not the end of the input."""
    process.wait(PATIENCE)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def assert_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    found = re.findall(r"^(rows read|committed|failed|unknown|refused) +(\d+)$", done.stdout, re.MULTILINE)
    assert len(found) == 5, done.stdout + done.stderr
    assert re.search(r"^rows/s +\d+$", done.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


def line_of(entry: dict[str, Any]) -> str:
    """The row of a reject as a line of the file."""
    row = entry["row"]
    return row if isinstance(row, str) else ",".join(row.values())


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def execute(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement.encode())


def fetch(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


def count(dsn: str) -> int:
    return int(fetch(dsn, "SELECT count(*) FROM payments")[0][0])


def settle(dsn: str) -> None:
    """Wait until nobody else is connected: a backend finishes its statement after its client has gone."""
    wait_until(lambda: fetch(dsn, OTHERS) == [(0,)])


def before_insert(dsn: str, statement: str) -> None:
    """Let a trigger run *statement* before each row of payments."""
    body = f"'BEGIN {statement}; RETURN NEW; END'"
    execute(dsn, f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS {body}")
    execute(dsn, "CREATE TRIGGER act BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION act()")


OTHERS = """SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def catches(pid: int, number: int) -> bool:
    """Whether the process has installed a handler of its own after Python's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(caught >> (number - 1) & 1) and bool(caught >> (signal.SIGTERM - 1) & 1)


def peak_memory(pid: int) -> int:
    """In kB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
