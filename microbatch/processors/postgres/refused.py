"""What is said where a connection cannot be had: whether waiting may help, or the configuration alone is wrong.

libpq tells why as a text, and hides the SQLSTATE that came with it. Where a connection is our own, the code is asked
for; of other connections there is the text, in the language of the server (`lc_messages`), and English is read.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from typing import cast

import psycopg
from psycopg import pq
from psycopg.pq.abc import PGconn

# Classes and codes that no waiting cures: authorization, names, rights, parameters, a database closed to everybody.
_FOR_GOOD = ("28", "3D", "3F", "42", "22", "0A", "55000")
# Codes that poolers give for anything at all.
_ANYTHING = ("08P01", "XX000")
_SAID_FOR_GOOD = re.compile(
    # the server
    r"authentication failed"
    r"|(?:role|user|database) \".*\" does not exist"
    r"|no pg_hba\.conf entry|pg_hba\.conf rejects"
    r"|is not permitted to log in|is not currently accepting connections"
    r"|permission denied for database|User does not have CONNECT privilege"
    r"|requires a valid client certificate"
    r"|unrecognized configuration parameter|invalid value for parameter|permission denied to set parameter"
    r"|requires a value|invalid command-line argument|unsupported frontend protocol"
    # poolers
    r"|no such (?:database|user)|unsupported startup parameter|bouncer config error|Tenant or user not found"
    # libpq: passwords and methods
    r"|no password supplied|no password retrieved"
    r"|authentication method \S+ not supported|authentication method requirement|authentication is not supported"
    r"|[Cc]hannel binding (?:is )?required|[Cc]hannel binding not supported"
    # libpq: encryption
    r"|server does not support SSL|server does not support GSSAPI encryption|GSSAPI encryption required"
    r"|SSL error: .*(?:certificate|unknown ca|protocol|version number|handshake failure|no shared cipher)"
    r"|certificate verify failed|(?:root )?certificate file \".*\" does not exist|could not read root certificate"
    r"|could not read certificate file|certificate present, but not private key|could not load private key"
    r"|private key file \".*\" (?:has group|must be owned|is not a regular)|certificate does not match private key"
    r"|does not match host name|host name must be specified for a verified SSL connection"
    r"|sslmode value \".*\" invalid when SSL support is not compiled in|weak sslmode"
    # libpq: the connection string
    r"|invalid \S+ value: |definition of service \".*\" not found|syntax error in service file"
    r"|invalid port number|invalid integer value|could not match \d+|no PostgreSQL user name specified"
    r"|local user with ID \d+ does not exist"
)
_FOR_A_WHILE = re.compile(r"[Tt]oo many open files|[Cc]annot allocate memory|out of memory")
_MANY = "Multiple connection attempts failed. All failures were:\n"
_ONE_OF_MANY = re.compile(r"^- (host: .*?, port: .*?), hostaddr: .*?: ", re.MULTILINE)

_CODE = re.compile(r"(?<=:  )([0-9A-Z]{5}): ")
_LOCATION = re.compile(r"\n\S+:  \w+, [\w./\-]+:\d+(?=\n|$)")
_DEFAULT, _VERBOSE = 1, 2


def is_for_good(text: str, code: str | None) -> bool:
    """Whether a server that said so, or libpq in its place, says the same again however long one waits."""
    if code is not None and code not in _ANYTHING:
        return code.startswith(_FOR_GOOD)
    return bool(_SAID_FOR_GOOD.search(text)) and not _FOR_A_WHILE.search(text)


def tells_for_good(error: psycopg.OperationalError) -> bool:
    """The same of psycopg's own error, which has the text alone. Of several hosts none may be worth waiting for."""
    text = str(error)
    if not text.startswith(("connection failed: ", "connection is bad: ")):
        return False
    _, _, attempts = text.partition(_MANY)
    if not attempts:
        return is_for_good(text, None)
    hosts = _ONE_OF_MANY.split(attempts)[1:]
    return all_for_good([(host, is_for_good(said, None)) for host, said in zip(hosts[::2], hosts[1::2], strict=True)])


def all_for_good(attempts: Sequence[tuple[object, bool]]) -> bool:
    """Whether every host has refused for good, at one of its addresses at least: localhost has two."""
    return bool(attempts) and {host for host, _ in attempts} == {host for host, for_good in attempts if for_good}


def _verbosity() -> Callable[[int, int], object] | None:
    """libpq's PQsetErrorVerbosity, out of the very library that psycopg uses; None where it cannot be had."""
    try:
        if pq.__impl__ == "python":
            from psycopg.pq import _pq_ctypes

            library = _pq_ctypes.pq  # type: ignore[attr-defined]
        else:
            library = ctypes.CDLL(sys.modules[pq.PGconn.__module__].__file__)
        function = library.PQsetErrorVerbosity
    except Exception:
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int
    return cast(Callable[[int, int], object], function)


_set_verbosity = _verbosity()


def ask_for_code(pgconn: PGconn, asked: bool = True) -> None:
    """Have libpq tell the SQLSTATE of what goes wrong from here on inside the text, or, once more, not."""
    pointer: int | None = getattr(pgconn, "pgconn_ptr", None)
    if _set_verbosity is not None and pointer is not None:
        _set_verbosity(pointer, _VERBOSE if asked else _DEFAULT)


def read_code(told: str) -> tuple[str, str | None]:
    """The text as it is without the code, and the code; of several the last one."""
    codes = _CODE.findall(told)
    return _CODE.sub("", _LOCATION.sub("", told)), codes[-1] if codes else None
