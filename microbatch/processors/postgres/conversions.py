"""What a session's settings do to bytes, and psycopg's conversions so that they mean the same under all of them.

psycopg asks the connection when it makes a converter, and keeps the answer: a converter belongs to the `settings_of`
the moment, and is made anew when they are others.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from datetime import timezone, tzinfo
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar
from zoneinfo import ZoneInfo

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext, Buffer, Query
from psycopg.adapt import AdaptersMap, Dumper, Loader, PyFormat
from psycopg.types.json import JsonbLoader, JsonLoader
from psycopg.types.string import ByteaLoader, BytesDumper, TextLoader

Error = TypeVar("Error", bound=BaseException)
Settings: TypeAlias = tuple[bytes | None, ...]

# What the server tells by itself whenever it changes; the search path since PostgreSQL 18.
_TOLD = (
    b"client_encoding",
    b"DateStyle",
    b"IntervalStyle",
    b"TimeZone",
    b"standard_conforming_strings",
    b"search_path",
)
_NO_ENCODING = "ascii"  # psycopg's word for SQL_ASCII: bytes, whatever they mean
_BYTES = (bytes, bytearray, memoryview)


def settings_of(connection: psycopg.Connection[Any]) -> Settings:
    """What text means on *connection* now; no round trip."""
    told = connection.pgconn.parameter_status
    return tuple([told(name) for name in _TOLD])


def encoding_of(connection: psycopg.Connection[Any]) -> str:
    """Python's name for the encoding of SQL and of text; a session in SQL_ASCII gets UTF-8, as from psycopg."""
    encoding = connection.info.encoding
    return "utf-8" if encoding == _NO_ENCODING else encoding


def zone_of(connection: psycopg.Connection[Any]) -> tzinfo | None:
    """The session's time zone; None if Python does not know it."""
    return _zone(connection.info.parameter_status("TimeZone") or "")


@lru_cache
def _zone(name: str) -> tzinfo | None:
    if name.upper() in ("UTC", "ETC/UTC", "GMT"):  # where Python has no time zones, too
        return timezone.utc
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        return None


def text_of(data: bytes, encoding: str) -> str | bytes:
    """*data* as text, and as it is where it is none: in SQL_ASCII anything may be stored."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data


def recoded(sql: bytes, connection: psycopg.Connection[Any]) -> bytes:
    """*sql*, which is UTF-8, as the session reads it. Raises `UnicodeEncodeError` where it has not got a character."""
    encoding = encoding_of(connection)
    try:
        return sql if encoding == "utf-8" else sql.decode().encode(encoding)
    except UnicodeEncodeError as error:
        raise named(error, connection) from None


@lru_cache
def settled(sql: str) -> str:
    """A question of our own, such that no setting reads it otherwise: its backslashes, and the types it names."""
    sql = re.sub(r"--.*", "", sql)
    sql = re.sub(r"'[^']*'", lambda found: _escaped(found[0]), sql)
    return re.sub(r"::(text|oid|reg\w+|int[248]|uuid|xid8?|timestamptz)\b", r"::pg_catalog.\1", sql)


def _escaped(literal: str) -> str:
    return "E" + literal.replace("\\", "\\\\") if "\\" in literal else literal


def sendable(statement: Query, connection: psycopg.Connection[Any]) -> Query:
    """*statement* for psycopg, which takes SQL_ASCII for ASCII."""
    is_text = isinstance(statement, str) and connection.info.encoding == _NO_ENCODING
    return statement.encode() if is_text else statement  # type: ignore[union-attr]


def named(error: Error, connection: psycopg.Connection[Any]) -> Error | UnicodeEncodeError:
    """*error*, with the session's encoding in it where a character does not fit: Python's says `charmap` for many."""
    if not isinstance(error, UnicodeEncodeError) or error.encoding == "utf-8":
        return error
    name = connection.info.parameter_status("client_encoding") or error.encoding
    reason = f"{error.reason}; the connection's client_encoding is {name}, and UTF8 has every character"
    return UnicodeEncodeError(name, error.object, error.start, error.end, reason)


@dataclass(frozen=True, slots=True)
class _Context:
    """What psycopg makes converters from."""

    adapters: AdaptersMap
    connection: psycopg.Connection[Any]


def context_of(connection: psycopg.Connection[Any], *, loads_bytes: bool = False) -> AdaptContext:
    """The connection itself, or what stands in for it where psycopg's own conversions would change a value.

    *loads_bytes*: arrays of bytea are among what is loaded.
    """
    is_standard = connection.pgconn.parameter_status(b"standard_conforming_strings") != b"off"
    if is_standard and connection.info.encoding == "utf-8" and not loads_bytes:
        return connection
    adapters = AdaptersMap(connection.adapters)
    adapt(adapters, connection, loads_bytes=loads_bytes)
    return _Context(adapters, connection)


def adapt(adapters: AdaptersMap, connection: psycopg.Connection[Any], *, loads_bytes: bool = True) -> None:
    """Put into *adapters* what means the same under the settings that *connection* has now."""
    if connection.pgconn.parameter_status(b"standard_conforming_strings") == b"off":
        _dump_bytes_for_parameters(adapters)
    if loads_bytes:
        _load(adapters, _BYTES_LOADERS, _BytesLoader)
    encoding = connection.info.encoding
    if encoding == _NO_ENCODING:
        _load(adapters, _TEXT_LOADERS, _LenientTextLoader)
    elif encoding != "utf-8":
        _load(adapters, (JsonLoader,), _JsonLoader)
        _load(adapters, (JsonbLoader,), _JsonbLoader)


class _HexDumper(Dumper):
    """bytea for a parameter. psycopg's own is for a literal: without standard_conforming_strings it doubles the
    backslash, which a parameter keeps."""

    oid = psycopg.adapters.types["bytea"].oid

    def dump(self, obj: Buffer) -> Buffer:
        return b"\\x" + binascii.hexlify(obj)


class _BytesLoader(ByteaLoader):
    """psycopg's faster one reads on behind an item of an array, where bytea_output is `escape`."""

    def load(self, data: Buffer) -> bytes:
        return super().load(bytes(data))


class _LenientTextLoader(Loader):
    """psycopg hands out bytes in SQL_ASCII, although it has sent UTF-8."""

    def load(self, data: Buffer) -> str | bytes:
        return text_of(bytes(data), "utf-8")


class _JsonLoader(JsonLoader):
    """psycopg's takes every encoding for UTF-8."""

    def load(self, data: Buffer) -> Any:
        return super().load(_as_utf8(data, self.connection))


class _JsonbLoader(JsonbLoader):
    def load(self, data: Buffer) -> Any:
        return super().load(_as_utf8(data, self.connection))


def _as_utf8(data: Buffer, connection: Any) -> bytes:
    return bytes(data).decode(connection.info.encoding).encode()


def _dump_bytes_for_parameters(adapters: AdaptersMap) -> None:
    for kind in _BYTES:
        automatic = adapters.get_dumper(kind, PyFormat.AUTO)
        if adapters.get_dumper(kind, PyFormat.TEXT) in _BYTES_DUMPERS:
            adapters.register_dumper(kind, _HexDumper)
            if automatic not in _BYTES_DUMPERS:
                adapters.register_dumper(kind, automatic)


def _load(adapters: AdaptersMap, ours: tuple[type, ...], loader: type[Loader]) -> None:
    """*loader* for every type that is loaded by one of *ours*; what the user has registered stays."""
    for oid in (0, *(info.oid for info in adapters.types)):
        if adapters.get_loader(oid, pq.Format.TEXT) in ours:
            adapters.register_loader(oid, loader)


def _faster(kind: type, dumper: type[Dumper]) -> Any:
    """What a psycopg with its C part takes in the place of *dumper*."""
    adapters = AdaptersMap()
    adapters.register_dumper(kind, dumper)
    return adapters.get_dumper(kind, PyFormat.TEXT)


def _faster_loader(loader: type[Loader]) -> Any:
    adapters = AdaptersMap()
    adapters.register_loader(0, loader)
    return adapters.get_loader(0, pq.Format.TEXT)


_BYTES_DUMPERS = (BytesDumper, _faster(bytes, BytesDumper))
_BYTES_LOADERS = (ByteaLoader, _faster_loader(ByteaLoader))
_TEXT_LOADERS = (TextLoader, _faster_loader(TextLoader))
