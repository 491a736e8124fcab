"""Read a connection string, and never show it: it may hold a password."""

from __future__ import annotations

import os
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

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


def connection_parameters(conninfo: str) -> dict[str, Any]:
    """The keywords of *conninfo* over `DEFAULTS`. Raises `ValueError`, without the string, if malformed."""
    given = _parsed(conninfo)
    # Outside any handler: an error's context would carry psycopg's message, which quotes the string.
    if given is None or _is_torn(given):
        raise ValueError(
            "conninfo is no valid connection string (not shown: it may hold a password);"
            " pass 'postgresql://user@host/database' or 'host=… dbname=…';"
            " in the first form / @ : % in a password must be percent-encoded"
        )
    defaults = {key: value for key, value in DEFAULTS.items() if _FROM_ENVIRONMENT.get(key, "") not in os.environ}
    if "client_encoding" in str(given.get("options", os.environ.get("PGOPTIONS", ""))):
        defaults.pop("client_encoding", None)
    return {**defaults, **given}


def _parsed(conninfo: str) -> dict[str, Any] | None:
    try:
        return conninfo_to_dict(conninfo)
    except psycopg.Error:
        return None


def _is_torn(given: dict[str, Any]) -> bool:
    """Whether a raw @ or / in a password ended up in the host or the port, which libpq's errors quote."""
    hosts = str(given.get("host", "")).split(",")
    ports = str(given.get("port", "")).split(",")
    return any("@" in host[1:] for host in hosts) or not all(port.isdigit() for port in ports if port)
