"""Foreign tables: what a transaction writes to another server is committed there first, and on its own.

So a COMMIT that was not carried out here may have been carried out there. Committed here means committed there;
aborted here tells nothing, and neither does most of what a COMMIT is refused with. A transaction keeps a lock on each
table that it writes to, through whatever view, rule, partition or trigger: that is how it is seen which servers it
reached. What is written past foreign tables (dblink) is not seen.
"""

from __future__ import annotations

import psycopg

from .session import Session

REACHED = (
    b"SELECT count(DISTINCT f.ftserver) FROM pg_locks l JOIN pg_foreign_table f ON f.ftrelid = l.relation"
    b" WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode <> 'AccessShareLock'"
    b" AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_IN_REACH = b"SELECT count(*) FROM pg_foreign_server"


def reached(session: Session) -> int:
    """How many foreign servers the open transaction has written to."""
    return int(session.ask(REACHED).get_value(0, 0) or 0)


def in_reach(session: Session) -> int:
    """How many there are, where it was not asked in time."""
    return int(session.ask(_IN_REACH).get_value(0, 0) or 0)


def is_refused(error: psycopg.Error, servers: int | None) -> bool:
    """Whether a COMMIT that the server answered with *error* has left nothing elsewhere either."""
    # What one other server says of its own rows, it has undone. Of several the first may be committed already.
    return not servers or (servers == 1 and (error.sqlstate or "").startswith("23"))
