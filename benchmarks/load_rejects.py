"""What do bad rows cost a load?

`microbatch load` of a file in which one row in a hundred is refused by the server, for one of ten reasons, against a
clean file of the same size. Every row is accounted for: the table holds the good ones, the rejects file the bad ones,
each with the SQLSTATE it was made for. The bad rows lie so that every batch has some, and every batch is isolated.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import psycopg
from database import add_options, bench
from report import absolute, interleaved, keep, ratio

from microbatch.load import LoadOptions, load

TABLE = f"microbatch_benchmark_{secrets.token_hex(4)}"
CREATE = f"""
    CREATE TABLE {TABLE}_shops (id int PRIMARY KEY);
    INSERT INTO {TABLE}_shops VALUES (1);
    CREATE TABLE {TABLE} (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        user_id int NOT NULL CHECK (user_id > 0),
        amount numeric(10,2) NOT NULL,
        status varchar(50) NOT NULL,
        paid_at timestamptz,
        shop int REFERENCES {TABLE}_shops,
        reference text UNIQUE
    );
    CREATE FUNCTION {TABLE}_check() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN IF NEW.amount = 666 THEN RAISE ''refused''; END IF; RETURN NEW; END';
    CREATE TRIGGER refuse BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION {TABLE}_check()"""
START = f"TRUNCATE {TABLE}; INSERT INTO {TABLE} (user_id, amount, status, reference) VALUES (1, 1, 'first', 'taken')"
DROP = f"DROP TABLE {TABLE}, {TABLE}_shops; DROP FUNCTION {TABLE}_check()"
HEADER = "user_id,amount,status,paid_at,shop,reference"
BAD = [
    ("x,100.00,pending,2024-01-01,1,", "22P02"),
    ("1,99999999999.00,pending,2024-01-01,1,", "22003"),
    (f"1,100.00,{'x' * 51},2024-01-01,1,", "22001"),
    ("1,100.00,pending,2024-13-01,1,", "22008"),
    ("1,100.00,pending,some day,1,", "22007"),
    ("1,,pending,2024-01-01,1,", "23502"),
    ("-1,100.00,pending,2024-01-01,1,", "23514"),
    ("1,100.00,pending,2024-01-01,99,", "23503"),
    ("1,100.00,pending,2024-01-01,1,taken", "23505"),
    ("1,666.00,pending,2024-01-01,1,", "P0001"),
]


def lines(rows: int, bad: dict[int, str]) -> Iterator[str]:
    yield HEADER
    for number in range(1, rows + 1):
        yield bad.get(number) or f"{number},100.00,pending,2024-01-01,1,{number}"


def bad_rows(rows: int, one_in: int) -> tuple[dict[int, str], dict[int, str]]:
    """One row somewhere in each stretch: its text, and the SQLSTATE it will have, by number."""
    draw = random.Random(1)
    numbers = [draw.randint(first, first + one_in - 1) for first in range(1, rows + 1, one_in)]
    chosen = {number: BAD[i % len(BAD)] for i, number in enumerate(numbers)}
    return {n: text for n, (text, _) in chosen.items()}, {n: sqlstate for n, (_, sqlstate) in chosen.items()}


def loaded(dsn: str, file: Path, rows: int, expected: dict[int, str], size: int) -> float:
    """Seconds for the whole load, every row accounted for."""
    rejects = file.with_suffix(".rejects")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(START.encode())
        begin = time.perf_counter()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            load(LoadOptions(str(file), TABLE, dsn=dsn, rejects=str(rejects), max_batch_size=size))
        elapsed = time.perf_counter() - begin
        committed = connection.execute(f"SELECT user_id FROM {TABLE} WHERE status = 'pending'".encode()).fetchall()
    found = {entry["line"] - 1: entry["sqlstate"] for entry in map(json.loads, rejects.read_text().splitlines())}
    assert found == expected
    assert {number for (number,) in committed} == {*range(1, rows + 1)} - set(expected)
    assert len(committed) == rows - len(expected)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--one-in", type=int, default=100, help="rows, of which one is bad")
    parser.add_argument("--batch-size", type=int, default=1000)
    arguments = parser.parse_args()
    rows, size = arguments.rows, arguments.batch_size
    texts, expected = bad_rows(rows, arguments.one_in)

    with tempfile.TemporaryDirectory() as directory:
        clean, dirty = Path(directory, "clean.csv"), Path(directory, "dirty.csv")
        clean.write_text("\n".join(lines(rows, {})))
        dirty.write_text("\n".join(lines(rows, texts)))
        with bench("Loading a file with bad rows", CREATE, DROP, arguments) as dsn:
            seconds = interleaved(
                {
                    "clean": partial(loaded, dsn, clean, rows, {}, size),
                    "with bad rows": partial(loaded, dsn, dirty, rows, expected, size),
                },
                arguments.repetitions,
            )
    keep("load", seconds)
    print(f"{rows} rows, {len(expected)} of them bad: {rows - len(expected)} committed, {len(expected)} rejected")
    print("\n".join(absolute(name, values, "s") for name, values in seconds.items()))
    print(ratio("with bad rows to clean", seconds["with bad rows"], seconds["clean"]))
    pairs = zip(seconds["with bad rows"], seconds["clean"], strict=True)
    print(
        absolute("more, per row of an isolated batch", [(dirty - clean) / rows * 1e6 for dirty, clean in pairs], "µs")
    )


if __name__ == "__main__":
    main()
