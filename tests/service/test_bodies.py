"""Reading bodies: what is refused, and that refusing is cheap."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.service.bodies import BadBody, read_json

HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "two values": b"{} {}",
    "a comment": b"{/**/}",
    "not UTF-8": b'{"a": "\xff"}',
    "overlong UTF-8": b'"\xc0\x80"',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": '\ufeff{"a": 1}'.encode(),
    "33 levels": b"[" * 33 + b"]" * 33,
    "100,000 levels": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 40_000,
    "1001 keys": json.dumps(dict.fromkeys(map(str, range(1001)))).encode(),
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice below": b'[{"b": {"a": 1, "\\u0061": 2}}]',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "-1e999": b'{"a": -1E+999}',
    "19 digits": b'{"a": 1234567890123456789}',
    "4000 digits": b'{"a": ' + b"9" * 4000 + b"}",
    "a fraction of 5000 digits": b'{"a": 0.' + b"3" * 5000 + b"}",
    "NUL": b'{"a": "x\\u0000"}',
    "NUL in a key": b'{"\\u0000": 1}',
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "the other half": b'["\\udfff"]',
    "a control character": b'"\n"',
    "a leading zero": b"01",
    "an unfinished escape": b'"\\',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_body_is_refused(what: str) -> None:
    with pytest.raises(BadBody) as refused:
        read_json(HOSTILE[what])

    assert len(str(refused.value)) < 120, "it quotes nothing"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"user_id": 1, "amount": 100.00}', {"user_id": 1, "amount": Decimal("100.00")}),
        (b"[" * 32 + b"]" * 32, None),
        (b'"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["', "[" * 41),
        (b'["\\"[", "\\\\", "{"]', ['"[', "\\", "{"]),
        (b"-999999999999999999", -999999999999999999),
        (b"1e2", Decimal(100)),
        (b'"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        (b'{"a": null, "b": true}', {"a": None, "b": True}),
    ],
)
def test_what_is_well_formed_is_read(body: bytes, value: Any) -> None:
    read = read_json(body)
    if value is not None:
        assert read == value


def test_money_keeps_its_digits() -> None:
    assert str(read_json(b"0.10")) == "0.10"


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'"\\"', b'["', b'{"a":', b"[]", b'"\\\\'])
def test_the_scan_is_linear(piece: bytes) -> None:
    body = piece * (256 * 1024 // len(piece))
    begin = time.monotonic()
    try:
        read_json(body)
    except BadBody:
        pass
    # A scan that begins anew at every quote takes minutes.
    assert time.monotonic() - begin < 10


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**18) + 1, 10**18 - 1) | _TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
        max_leaves=20,
    )
)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\u0019eE+-.aNI \n', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        value = read_json(body)
    except BadBody:
        return
    assert json.loads(body.decode(), parse_float=Decimal) == value
