"""Run a batch as one PostgreSQL transaction; `PostgresProcessor` is all there is to import.

The files, in the order a batch meets them: `processor` (the class), `parameters` (a job becomes what psycopg
takes), `connections` (ours, per process) or `borrowed` (the user's), `transaction` (commit, honestly),
`statement` (one result per job), `splitting` (a batch that broke its link comes back in halves). `conninfo` and
`sqlstate` decide; they touch no connection.
"""

from __future__ import annotations

from microbatch.errors import MissingExtra

try:
    import psycopg  # noqa: F401
    import psycopg_pool  # noqa: F401
except ImportError as error:
    # psycopg without a libpq to load fails like psycopg that is not there: the same command cures both.
    raise MissingExtra('pip install "psycopg[binary]" psycopg-pool') from error

from .errors import BatchRolledBack, CommitUnknown
from .processor import PostgresProcessor

__all__ = ["BatchRolledBack", "CommitUnknown", "PostgresProcessor"]
