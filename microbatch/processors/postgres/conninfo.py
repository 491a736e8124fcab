"""Read a connection string, and never show it: it may hold a password."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

# A server that is gone is noticed while a batch is being sent (tcp_user_timeout, milliseconds), while its
# answer is awaited (keep-alives, seconds) and while connecting; each of the three misses what the others see.
DEFAULTS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    # Weaker than application_name and PGAPPNAME, so that whoever names the session wins.
    "fallback_application_name": "microbatch",
    # The server's own encoding need not have every character of a str, and SQL_ASCII is none.
    "client_encoding": "UTF8",
}
_FROM_ENVIRONMENT = {"connect_timeout": "PGCONNECT_TIMEOUT", "client_encoding": "PGCLIENTENCODING"}


# What people and frameworks write in front of a URL, and behind a plus sign in SQLAlchemy's.
_NAMES = ("postgresql", "postgres", "postgis", "pgsql", "psql")
_DRIVERS = ("", "psycopg", "psycopg2", "psycopg_async", "psycopg2cffi")
# Options that psycopg takes beside libpq's, and that make no difference here.
_PSYCOPGS = (
    "autocommit",
    "prepare_threshold",
    "connection_factory",
    "cursor_factory",
    "row_factory",
    "async",
    "async_",
)
# Options of other clients, which libpq refuses; a name that is not among them may be a piece of a password.
_FOREIGN = (
    "pgbouncer", "schema", "connection_limit", "pool_timeout", "socket_timeout", "statement_cache_size", "sslaccept",
    "prepared_statements", "prepared_statement_cache_size", "charset", "encoding", "ssl", "conn_max_age", "pool_size",
    "max_overflow", "pool_recycle", "pool_pre_ping", "echo", "server_settings", "command_timeout", "currentSchema",
    "supa", "workaround", "reserve_connection",
)  # fmt: skip
_EXAMPLES = "pass 'postgresql://user@host/database' or 'host=… dbname=…'"

_SCHEME = re.compile(r"([A-Za-z][\w.+-]*)://")
_URL = re.compile(
    r"(?:(?P<user>[^:/@]*)(?::(?P<password>[^@]*))?@)?(?:\[(?P<ipv6>[^/?\]]+)\]|(?P<host>[^/:?]+))?(?::(?P<port>[^/?]*))?"
    r"(?:/(?P<database>[^?]*))?(?:\?(?P<query>.*))?",
    re.DOTALL,
)
_HOST_AND_PORT = re.compile(r"([^:/\[\]]*):(\d*)")


def connection_parameters(conninfo: Any) -> dict[str, Any]:
    """The keywords of *conninfo*, a string or a `sqlalchemy.URL`, over `DEFAULTS`.

    Raises:
        ValueError: it is malformed, or another database's or driver's. The string is not shown.
    """
    given = _given(conninfo)
    defaults = {key: value for key, value in DEFAULTS.items() if _FROM_ENVIRONMENT.get(key, "") not in os.environ}
    if "client_encoding" in str(given.get("options", os.environ.get("PGOPTIONS", ""))):
        defaults.pop("client_encoding", None)
    return {**defaults, **given}


def is_url(value: object) -> bool:
    """Whether it is a URL of SQLAlchemy's, which nothing here imports."""
    return all(hasattr(value, name) for name in ("drivername", "username", "host", "database", "query"))


def _given(conninfo: Any) -> dict[str, Any]:
    if is_url(conninfo):
        _check_name(conninfo.drivername, "URL")
        password = None if conninfo.password is None else str(conninfo.password)
        query = [(key, each) for key, value in conninfo.query.items() for each in _several(value)]
        host, port, database = conninfo.host, conninfo.port, conninfo.database
        return _sound(_keywords(conninfo.username, password, host, port, database, query), str(conninfo.query))
    text = conninfo.strip()
    if text.startswith("jdbc:"):
        raise ValueError(f"conninfo is a URL of JDBC's; {_EXAMPLES}")
    scheme = _SCHEME.match(text)
    if scheme is None:
        if text and "=" not in text:
            raise ValueError(f"conninfo is neither a URL nor a list of keywords (not shown); {_EXAMPLES}")
        return _sound(text, "")
    driver = _check_name(scheme[1], "connection string")
    rest = text[scheme.end() :]
    if driver or _has_ports_in_query(rest):
        return _sound(_from_sqlalchemy(rest), rest)
    return _sound("postgresql://" + rest, rest)


def _several(value: Any) -> Iterable[str]:
    return [value] if isinstance(value, str) else value


def _check_name(scheme: str, what: str) -> str:
    """The driver that *scheme* names, empty for none."""
    name, _, driver = scheme.lower().partition("+")
    if name not in _NAMES:
        raise ValueError(f"conninfo is a {what} for {name!r}, not for PostgreSQL; {_EXAMPLES}")
    if driver not in _DRIVERS:
        raise ValueError(
            f"conninfo is a {what} of SQLAlchemy's for the driver {driver!r}, and this processor runs on psycopg;"
            " write postgresql+psycopg:// or postgresql://, with libpq's options"
        )
    return driver


def _has_ports_in_query(rest: str) -> bool:
    """Whether hosts stand in the query as SQLAlchemy writes several; libpq knows only one there."""
    hosts = [value for key, value in parse_qsl(rest.partition("?")[2]) if key == "host"]
    return len(hosts) > 1 or any(_HOST_AND_PORT.fullmatch(each) for host in hosts for each in host.split(","))


def _from_sqlalchemy(rest: str) -> dict[str, Any] | str:
    """As `sqlalchemy.make_url` reads it."""
    url = _URL.fullmatch(rest)
    if url is None:
        return "?"  # malformed in every way of reading
    user, password, database = (
        None if url[key] is None else unquote(url[key]) for key in ("user", "password", "database")
    )
    return _keywords(user, password, url["ipv6"] or url["host"], url["port"], database, parse_qsl(url["query"] or ""))


def _keywords(
    user: str | None,
    password: str | None,
    host: str | None,
    port: Any,
    database: str | None,
    query: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """libpq's keywords for the parts of a URL of SQLAlchemy's; what stands in the query wins."""
    given = {"user": user, "password": password, "host": host, "port": port, "dbname": database}
    hosts: list[str] = []
    for key, value in query:
        if key == "host":
            hosts += value.split(",")
        elif key not in _PSYCOPGS:
            given[key] = value
    if hosts:
        pairs = [_HOST_AND_PORT.fullmatch(each) for each in hosts]
        given["host"] = ",".join(each if pair is None else pair[1] for each, pair in zip(hosts, pairs, strict=True))
        if any(pairs):
            given["port"] = ",".join("" if pair is None else pair[2] for pair in pairs)
    return {key: str(value) for key, value in given.items() if value not in (None, "")}


def _sound(given: Mapping[str, Any] | str, query: str) -> dict[str, Any]:
    """*given* as libpq reads it, if it does."""
    parsed = _parsed(given)
    # Outside any handler: an error's context would carry psycopg's message, which quotes the string.
    if parsed is not None and not _is_torn(parsed):
        return parsed
    names = re.findall(r"[?&](\w+)=", query) if isinstance(given, str) else given
    if foreign := [name for name in names if name in _FOREIGN]:
        raise ValueError(
            f"conninfo has the option {foreign[0]!r}, which another client knows and libpq does not; take it out"
        )
    raise ValueError(
        f"conninfo is no valid connection string (not shown: it may hold a password); {_EXAMPLES};"
        " in the first form / @ : % in a password must be percent-encoded, and options must be libpq's"
    )


def _parsed(given: Mapping[str, Any] | str) -> dict[str, Any] | None:
    try:
        return conninfo_to_dict(given if isinstance(given, str) else make_conninfo("", **given))
    except (psycopg.Error, UnicodeError):
        return None


def _is_torn(given: dict[str, Any]) -> bool:
    """Whether a raw @ or / in a password ended up in the host or the port, which libpq's errors quote."""
    hosts = str(given.get("host", "")).split(",")
    ports = str(given.get("port", "")).split(",")
    return any("@" in host[1:] for host in hosts) or not all(port.isdigit() for port in ports if port)
