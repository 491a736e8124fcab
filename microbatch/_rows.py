"""Rows out of a text stream: CSV as PostgreSQL's COPY understands it, or JSON lines. Standard library only.

Python's `csv` cannot tell `""` from an empty field, which are the empty string and NULL. So the splitting is
done here: a line without a quote is split at its commas, any other goes through one regular expression.

A record that is badly quoted or too long is read to its end all the same, and refused as a whole: what stands inside a
quoted field is never a row. Memory is bounded by `MAX_RECORD`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, Protocol, TextIO

MAX_RECORD = 1 << 20  # characters

Value = str | None

_TOO_LONG = "longer than {} characters"
_NOT_CLOSED = "a quoted field that is not closed before the input ends"
_TOO_DEEP = "JSON that is nested too deep (recursion)"
_STRAY_QUOTE = "a quote inside a field: the whole field goes in quotes, and a quote in it is written twice"
_TOKEN = re.compile('[",]|[^",]+')
_FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",]*))(,|\Z)')


class Row(NamedTuple):
    """One row: where it stands in the input and its values as text, in the order of the columns."""

    first_line: int
    last_line: int
    values: tuple[Value, ...]


class BadRow(NamedTuple):
    """A piece of the input that is no row, and why."""

    first_line: int
    last_line: int
    text: str
    reason: str


class BadInput(Exception):
    """The input as a whole cannot be loaded."""


class RowSource(Protocol):
    """Where rows come from: the columns are known first."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, empty when there are no rows."""

    def read(self, json_columns: Collection[str]) -> Iterator[Row | BadRow]:
        """The rows, once. *json_columns* are those whose type is json or jsonb."""


class Lines:
    """Numbered lines of *stream*; of an overlong one its beginning, and then `rest`.

    *check_end* is called where the stream ends, before a line that breaks off there is handed out.
    """

    def __init__(self, stream: TextIO, check_end: Callable[[], None] = lambda: None) -> None:
        self.number = 0  # of the latest line
        self._stream = stream
        self._check_end = check_end
        self._returned: tuple[int, str] | None = None
        self._is_partial = False

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        if self._returned is not None:
            line, self._returned = self._returned, None
            return line
        for _ in self.rest():
            pass
        piece = self._read()
        if not piece:
            raise StopIteration
        self.number += 1
        return self.number, piece

    def rest(self) -> Iterator[str]:
        """What is left of the latest line, in pieces; those that are not taken are skipped by the next line."""
        while self._is_partial:
            yield self._read()

    def peek(self) -> tuple[int, str] | None:
        """The first line that is not blank, which stays there; blank ones before it are gone."""
        for number, line in self:
            if line.strip():
                self._returned = number, line
                return self._returned
        return None

    def _read(self) -> str:
        piece = self._stream.readline(MAX_RECORD + 1)
        self._is_partial = is_overlong(piece)
        if not self._is_partial and not piece.endswith("\n"):
            self._check_end()
        return piece


def looks_like_json(lines: Lines) -> bool:
    """Whether the first character that is not blank opens an object."""
    first = lines.peek()
    return first is not None and first[1].lstrip().startswith("{")


class CsvRows:
    """CSV with a header line.

    An unquoted field equal to *null* is NULL. Where there are several columns, empty lines are skipped. A
    field is quoted as a whole or not at all: `5" pipe` is refused, as readers do not agree on its meaning.
    """

    def __init__(self, lines: Lines, null: str = "") -> None:
        self._lines = lines
        self._null = null
        self.columns = self._header()

    def read(self, json_columns: Collection[str] = ()) -> Iterator[Row | BadRow]:
        wanted = len(self.columns)
        for number, line in self._lines:
            row = self._record(number, line)
            if isinstance(row, BadRow) or len(row.values) == wanted:
                yield row
            elif wanted == 1 or line.rstrip("\r\n"):
                yield self._wrong_length(row, line)

    def _header(self) -> tuple[str, ...]:
        first = self._lines.peek()
        if first is None:
            raise BadInput("the input is empty: a CSV file starts with a header line that names the columns")
        null, self._null = self._null, "\n"  # a text that no field can be: names are never NULL
        row = self._record(*next(self._lines))
        self._null = null
        if isinstance(row, BadRow):
            raise BadInput(f"line {row.first_line}, the header: {row.reason}")
        return tuple(value or "" for value in row.values)

    def _record(self, number: int, line: str) -> Row | BadRow:
        if '"' in line or is_overlong(line):
            return self._quoted_record(number, line)
        if trouble := unreadable(line):
            return BadRow(number, number, stripped(line), trouble)
        null = self._null
        values = stripped(line).split(",")
        return Row(number, number, tuple([None if value == null else value for value in values]))

    def _quoted_record(self, number: int, line: str) -> Row | BadRow:
        if not is_overlong(line) and (values := self._split(stripped(line))) is not None:
            return self._readable(Row(number, number, values), stripped(line))
        kept, size = [], 0
        try:
            for piece in self._pieces(line):
                size += len(piece)
                if size <= MAX_RECORD + 1:
                    kept.append(piece)
        except EOFError:
            return BadRow(number, self._lines.number, stripped(line), _NOT_CLOSED)
        last, text = self._lines.number, stripped("".join(kept))
        if size > MAX_RECORD + 1:
            return BadRow(number, last, text, _TOO_LONG.format(MAX_RECORD))
        values = self._split(text)
        if values is None:
            return BadRow(number, last, text, _STRAY_QUOTE)
        return self._readable(Row(number, last, values), text)

    def _pieces(self, line: str) -> Iterator[str]:
        """The record that *line* begins, to its very end. Raises `EOFError` where it has none."""
        quoting = _Quoting()
        while True:
            for piece in itertools.chain([line], self._lines.rest()):
                quoting.follow(piece)
                yield piece
            if not quoting.is_open:
                return
            following = next(self._lines, None)
            if following is None:
                raise EOFError
            line = following[1]

    @staticmethod
    def _readable(row: Row, text: str) -> Row | BadRow:
        trouble = unreadable(text)
        return BadRow(row.first_line, row.last_line, text, trouble) if trouble else row

    def _split(self, text: str) -> tuple[Value, ...] | None:
        values: list[Value] = []
        position, comma = 0, ","
        while comma:
            match = _FIELD.match(text, position)
            if match is None:
                return None
            quoted, plain, comma = match.groups()
            if quoted is not None:
                values.append(quoted.replace('""', '"'))
            else:
                values.append(None if plain == self._null else plain)
            position = match.end()
        return tuple(values)

    def _wrong_length(self, row: Row, line: str) -> BadRow:
        one_line = row.first_line == row.last_line
        text = stripped(line) if one_line else json.dumps(row.values, ensure_ascii=False)
        reason = f"{plural(len(row.values), 'field')} where the header has {len(self.columns)}"
        return BadRow(row.first_line, row.last_line, text, reason)


class _Quoting:
    """Follows a record piece by piece: whether a line break here stands inside a quoted field.

    Only a field that begins with a quote is quoted. What COPY makes of a quote behind the closing one holds for a
    badly quoted field, too: it opens the field again.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._at_start = self._may_open = True

    def follow(self, piece: str) -> None:
        if self.is_open and '"' not in piece:
            return
        for token in _TOKEN.findall(piece):
            if token == '"':
                self.is_open = self._may_open and not self.is_open
                self._at_start = False
            elif self.is_open:
                continue
            elif token == ",":
                self._at_start = self._may_open = True
            elif self._at_start:
                self._at_start = self._may_open = False


class JsonNumber(str):
    """A number as it was written: no digit is lost on the way to the server."""

    __slots__ = ()


class JsonRows:
    """JSON lines: one object per line; blank lines are skipped.

    All objects have the same keys: *columns*, or those of the first object. `null` is NULL; objects and
    arrays go as JSON text, and so does every value of a json or jsonb column.
    """

    def __init__(self, lines: Lines, columns: tuple[str, ...] | None = None) -> None:
        self._lines = lines
        self.columns = self._keys_of_first() if columns is None else columns

    def read(self, json_columns: Collection[str] = ()) -> Iterator[Row | BadRow]:
        encoders = [(name, json_text if name in json_columns else plain_text) for name in self.columns]
        keys = frozenset(self.columns)
        for number, line in self._lines:
            if line.isspace():
                continue
            try:
                record = parse_object(line)
                if record.keys() != keys:
                    raise ValueError(self._key_difference(record))
                values = tuple([encode(record[name]) for name, encode in encoders])
            except ValueError as error:
                yield BadRow(number, number, stripped(line), str(error))
            except RecursionError:
                yield BadRow(number, number, stripped(line), _TOO_DEEP)
            else:
                yield Row(number, number, values)

    def _keys_of_first(self) -> tuple[str, ...]:
        first = self._lines.peek()
        if first is None:
            return ()
        try:
            record = parse_object(first[1])
        except (ValueError, RecursionError) as error:
            remedy = "the first line tells the columns; else name them with --columns"
            raise BadInput(f"line {first[0]}: {error}; {remedy}") from None
        if not record:
            raise BadInput(f"line {first[0]}: the first object has no keys; name the columns with --columns")
        return tuple(record)

    def _key_difference(self, record: dict[str, Any]) -> str:
        unknown = [key for key in record if key not in self.columns]
        missing = [name for name in self.columns if name not in record]
        parts = [("unknown key", unknown), ("missing key", missing)]
        return "; ".join(f"{what} {', '.join(map(repr, names))}" for what, names in parts if names)


def parse_object(line: str) -> dict[str, Any]:
    if trouble := unreadable(line):
        raise ValueError(trouble)
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object: every line holds one, as {...}")
    return value


def plain_text(value: Any) -> Value:
    if value is None:
        return None
    return str(value) if isinstance(value, str) else _dump(value)


def json_text(value: Any) -> Value:
    """*value* as JSON, numbers as they were written; a bare null is NULL."""
    return None if value is None else _dump(value)


def _dump(value: Any) -> str:
    if isinstance(value, JsonNumber):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_dump(key)}: {_dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return record


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_of, parse_int=JsonNumber, parse_float=JsonNumber, parse_constant=JsonNumber
)


def is_overlong(line: str) -> bool:
    """Whether *line* is only the beginning of one."""
    return len(line) > MAX_RECORD and not line.endswith("\n")


def unreadable(line: str) -> str | None:
    """Why *line* cannot be text for PostgreSQL, if so; the stream was decoded with `surrogateescape`."""
    if is_overlong(line):
        return _TOO_LONG.format(MAX_RECORD)
    if "\0" in line:
        return "a NUL character, which PostgreSQL's text cannot hold"
    if line.isascii():
        return None
    try:
        line.encode()
    except UnicodeEncodeError:
        return "bytes that the encoding does not have (see --encoding)"
    return None


def stripped(line: str) -> str:
    """*line* without its end, `\\n` or `\\r\\n`."""
    return line.removesuffix("\n").removesuffix("\r")


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
