"""Bodies that mean harm, against the running service: each gets a 4xx, and its memory stays flat.

python -m tests.service.hostile                 10,000 bodies
python -m tests.service.hostile --bodies 500    fewer
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from .serving import PATIENCE, serving

WARM_UP = 0.2  # of the bodies, before memory is looked at
GROWTH = 24 * 1024  # KiB; of 10,000 bodies 64 KiB each would be 640 MiB

JOB = {"user_id": 1, "amount": 100.0, "status": "pending"}
_NUMBERS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e400", "01", "0x10", "1_000", "+1", ".5", "5.", "1e", "--1"),
    *("2147483648", "-2147483649", "1.5", "1e-5", "\u0663"),
)

Body = tuple[bytes, dict[str, str]]


def _job(**values: Any) -> bytes:
    return json.dumps({**JOB, **values}).encode()


def _raw(text: str) -> bytes:
    return f'{{"user_id": {text}, "amount": 1, "status": "x"}}'.encode()


def depth(rng: random.Random) -> bytes:
    levels = rng.choice([33, 34, 100, 5_000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    text = opening * levels + "1" + (closing * levels if rng.random() < 0.5 else "")
    return (f'{{"user_id": 1, "amount": 1, "status": {text}}}' if rng.random() < 0.5 else text).encode()[: 256 * 1024]


def size(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return b" " * (256 * 1024 + rng.randrange(1, 500_000))
    if kind == 1:
        return json.dumps([JOB] * rng.randrange(1001, 3000)).encode()
    if kind == 2:
        return json.dumps({**JOB, **dict.fromkeys(map(str, range(rng.randrange(1, 5000))))}).encode()
    return _job(status="x" * rng.randrange(51, 200_000))


def text(rng: random.Random) -> bytes:
    bad = rng.choice(["\\u0000", "\\ud800", "\\udfff", "\\udc00\\ud800", "\x00", "\x1f", "\\x", "\\u12", "\n"])
    where = rng.choice(['"user_id": 1, "amount": 1, "status": "%s"', '"%s": 1', '"user_id": "%s"'])
    return ("{" + where % (rng.choice("aé漢") * rng.randrange(30) + bad) + "}").encode()


def encoding(rng: random.Random) -> bytes:
    good = json.dumps({**JOB, "status": "é漢😀"}, ensure_ascii=False)
    kind = rng.randrange(5)
    if kind == 0:
        return good.encode(rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-8-sig"]))
    if kind == 1:
        data = bytearray(good.encode())
        data[rng.randrange(len(data))] = rng.choice([0xFF, 0xC0, 0xFE])
        return bytes(data)
    if kind == 2:
        return rng.randbytes(rng.randrange(1, 2000))
    return good.encode()[: rng.randrange(1, len(good))]


def number(rng: random.Random) -> bytes:
    digits = "9" * rng.choice([11, 19, 400, 4_000, 5_000, 100_000])
    return _raw(rng.choice([*_NUMBERS, digits, "-" + digits, "1." + digits]))


def kind(rng: random.Random) -> bytes:
    wrong: list[Any] = [None, True, [], {}, "", "x", "1; DROP TABLE payment_transactions", [1], {"a": 1}, 1.5]
    name = rng.choice(list(JOB))
    value = rng.choice([each for each in wrong if not (name == "status" and isinstance(each, str))])
    if name == "amount" and value == 1.5:
        value = "1.5e0"
    return rng.choice(
        [
            _job(**{name: value}),
            json.dumps(value).encode() if value else b"null",
            json.dumps([[JOB]]).encode(),
            json.dumps({key: JOB[key] for key in JOB if key != name}).encode(),
            _job(**{rng.choice(["id", "transaction_date", 'x"; --', "__proto__", "constructor", "%s", ""]): 1}),
            b'{"user_id": 1, "user_id": 2, "amount": 1, "status": "x"}',
            b"",
            b"[]",
        ]
    )


def header(rng: random.Random) -> Body:
    """A good body, with a header that makes it a bad request."""
    headers = rng.choice(
        [
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": ""},
            {"Content-Encoding": "gzip"},
            {"Idempotency-Key": ""},
            {"Idempotency-Key": "x" * 300},
            {"Host": "evil.example"},
            {"Origin": "https://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
        ]
    )
    return _job(), headers


MAKERS: tuple[Callable[[random.Random], bytes], ...] = (depth, size, text, encoding, number, kind)


def bodies(count: int, seed: int = 0) -> Iterator[Body]:
    """So many of them, the same each time."""
    rng = random.Random(seed)
    for index in range(count):
        if index % 12 == 11:
            yield header(rng)
        else:
            yield MAKERS[index % len(MAKERS)](rng), {}


def attack(port: int, pid: int, count: int, seed: int = 0) -> tuple[Counter[int], int]:
    """Send them; the answers by code, and by how many KiB the service grew after a fifth of them."""
    codes: Counter[int] = Counter()
    before = 0
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        for index, (body, headers) in enumerate(bodies(count, seed)):
            if index == int(count * WARM_UP):
                before = resident(pid)
            code = _send(connection, body, headers)
            codes[code] += 1
            assert 400 <= code < 500, f"{code} for body {index} of seed {seed}: {headers} {body[:200]!r}"
    return codes, resident(pid) - before


def _send(connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> int:
    connection.request("POST", "/submit-job", body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    told = response.read()
    if response.headers.get("Connection") == "close":
        connection.close()
    if response.status >= 400:
        assert response.headers["Content-Type"] == "application/problem+json"
        assert json.loads(told)["status"] == response.status
    return response.status


def resident(pid: int) -> int:
    """KiB of memory that the process has."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.service.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with serving() as service:
        codes, growth = attack(service.port, service.process.pid, given.bodies, given.seed)
        assert service.end() == 0
    print(f"{sum(codes.values())} bodies: {dict(codes)}; memory grew by {growth} KiB")
    assert growth < GROWTH, "the service grows with bad bodies"
    return 0


if __name__ == "__main__":
    sys.exit(main())
