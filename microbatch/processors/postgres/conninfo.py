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
}


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
    defaults = dict(DEFAULTS)
    if "PGCONNECT_TIMEOUT" in os.environ:
        del defaults["connect_timeout"]
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
