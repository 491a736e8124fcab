"""The command `microbatch`.

A command imports what it needs when it runs: `microbatch --help` needs no driver and no server.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from microbatch._terminal import CommandError, Stopped

_DSN_HELP = "the server (default: $MICROBATCH_DSN, else libpq's PGHOST, PGDATABASE, ...)"
_LOAD_HELP = """\
Every row becomes a job of one INSERT statement, and rows are committed batch by
batch: a load that stops half-way has written what it says it has.

CSV has a header line that names the columns. Quoting is that of PostgreSQL's
COPY: an unquoted empty field is NULL, "" is the empty string, and a quote inside
a quoted field is doubled; a field is quoted as a whole or not at all. JSON lines
hold one object each, all with the same keys: null is NULL, objects and arrays
become JSON text. Rows that do not fit are refused, and the load goes on; a CSV
record that is badly quoted or longer than a million characters is refused to its
very end, so that nothing inside a quoted field is taken for a row. A row that
the server does not take fails alone; the rest of its batch is committed.

--rejects gets a JSON object for each row that was not committed: "line", "row",
"error" (its class), "sqlstate", "constraint" (the violated one), "message".

Exit status: 0 when every row was committed, 1 when some were not or the input
could not be read to its end, 2 when the load could not start, 130 after Ctrl-C.
The first Ctrl-C (or SIGTERM) stops reading and waits for the rows already handed
over, the second one gives them up.
"""
_INIT_DB_HELP = """\
A worker whose COMMIT is not answered has to find out whether it was carried out.
With this table it can, after a crash and a failover of the server too; without
it the server's own memory of transactions is asked, which a crash spoils. New
connections of the processor use it if it is on the search path of their role,
with SELECT, INSERT and UPDATE; DELETE lets them clean up. It holds a row per worker.

Without --apply the DDL is printed, for a migration of yours; no server is needed.
"""


_SERVE_HELP = """\
Every option is an environment variable, too: --max-batch-size 500 is
MICROBATCH_MAX_BATCH_SIZE=500. What has none on the command line is
MICROBATCH_TOKEN, which every request then has to show, MICROBATCH_ADMIN_TOKEN,
which POST /shutdown wants (without it one is made and printed), and
MICROBATCH_SECRET, which signs job ids (without it the database keeps one).

  curl -X POST http://localhost:3000/submit-job -H "Content-Type: application/json" \\
       -d '{"user_id": 1, "amount": 100.00, "status": "pending"}'

The first SIGTERM or Ctrl-C refuses new jobs, finishes those there are, and ends.
"""
_SERVE_NUMBERS = {"MICROBATCH_PORT": 3000, "MICROBATCH_THREADS": 32, "MICROBATCH_READ_TIMEOUT": 30}
_SERVE_OPTIONS = {
    "service": (
        ("--host", "ADDRESS", "where to listen (default: 127.0.0.1); another machine's way in takes a token"),
        ("--port", "N", "0 takes a free one (default: 3000)"),
        ("--threads", "N", "requests at a time, those that wait included (default: 32)"),
        ("--read-timeout", "S", "whole seconds in which a request has to be here (default: 30)"),
        ("--allowed-hosts", "A,B", "names that requests may call the service by, besides localhost; * for any"),
        ("--insecure", "", "without a token, answer other machines as well"),
        ("--max-client-jobs", "N", "outstanding jobs of one client address (default: half of --max-outstanding)"),
    ),
    "database": (
        ("--dsn", "DSN", "the server (default: one of its own, which keeps nothing)"),
        ("--table", "T", "written as in SQL (default: payment_transactions, created where it is missing)"),
        ("--columns", "A,B", "what a job gives (default: the columns that have no default)"),
        ("--store", "KIND", "where outcomes are kept: postgres (default), or memory"),
        ("--status-ttl", "S", "seconds for which an outcome is kept (default: 3600)"),
    ),
    "batches": (
        ("--max-batch-size", "N", "most jobs in a batch (default: 100)"),
        ("--linger", "S", "seconds that the oldest queued job waits for company (default: 0)"),
        ("--max-concurrent-batches", "N", "worker threads, a connection each (default: 1)"),
        ("--max-outstanding", "N", "accepted jobs without an outcome (default: 10000)"),
        ("--when-full", "WHAT", "block or raise (default here: raise)"),
        ("--submit-timeout", "S", "seconds that a full submit blocks (default: 5)"),
        ("--delivery-timeout", "S", "seconds from submit to outcome (default: 20)"),
        ("--retry", "none", "never try again"),
        ("--retry-max-attempts", "N", "attempts (default: none, the deadline bounds them)"),
        ("--retry-backoff", "S", "seconds, doubled each time (default: 0.05)"),
        ("--retry-backoff-max", "S", "seconds, the longest (default: 2)"),
        ("--history", "N", "finished jobs that this process remembers (default: 10000)"),
        ("--history-ttl", "S", "and for how many seconds (default: 300)"),
        ("--name", "NAME", "of threads and in logs (default: microbatch)"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv* (without the program's name) and return the exit status."""
    arguments = _parser().parse_args(argv)
    # psycopg warns of every pipeline that an error ends; what became of its rows is in the report.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    try:
        return int(arguments.run(arguments))
    except (CommandError, Stopped) as error:
        text = f"stopped by {error}" if isinstance(error, Stopped) else str(error)
        return _complain(arguments.command, text, error.status)
    except ImportError as error:
        return _complain(arguments.command, " ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _complain(arguments.command, "stopped by Ctrl-C", 130)


def _demo(arguments: argparse.Namespace) -> int:
    from microbatch.demo import demo

    return demo(dsn=arguments.dsn, threads=arguments.threads, seconds=arguments.seconds)


def _load(arguments: argparse.Namespace) -> int:
    from microbatch.load import LoadOptions, load

    options = vars(arguments).copy()
    del options["command"], options["run"]
    return load(LoadOptions(**options))


def _init_db(arguments: argparse.Namespace) -> int:
    from microbatch._database import conninfo_of, ledger_ddl, make_ledger

    if arguments.service:
        from microbatch.service.server import make_store, store_ddl

        print(make_store(conninfo_of(arguments.dsn)) if arguments.apply else store_ddl())
    else:
        print(make_ledger(conninfo_of(arguments.dsn)) if arguments.apply else ledger_ddl())
    if arguments.dsn is not None and not arguments.apply:
        return _complain(arguments.command, "nothing was applied: that takes --apply", 0)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from microbatch.service.server import serve, settings_of

    environ = {**os.environ}
    for name, value in vars(arguments).items():
        if name.startswith("MICROBATCH_") and value is not None:
            environ[name] = value
    host = environ.get("MICROBATCH_HOST") or "127.0.0.1"
    port, threads, timeout = (_whole(environ, name, default) for name, default in _SERVE_NUMBERS.items())
    return serve(host, port, max(1, threads), max(1, timeout), settings_of(environ))


def _whole(environ: dict[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or not int(text) <= 65535:
        raise CommandError(f"{name}={text!r} is not a whole number up to 65535")
    return int(text)


def _complain(command: str, text: str, status: int) -> int:
    print(f"microbatch {command}: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="microbatch",
        description="Micro-batching for PostgreSQL: try it, load a file, serve it, prepare a database.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="the version of microbatch, and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_demo(commands)
    _add_load(commands)
    _add_serve(commands)
    _add_init_db(commands)
    return parser


class _Version(argparse.Action):
    """Looks it up when it is asked for: the metadata of packages take long to read."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"microbatch {metadata.version('microbatch')}")
        parser.exit()


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="compare one INSERT per request with microbatch",
        description="Compare one INSERT per request with microbatch, on a server of its own. Takes about 20 seconds.",
    )
    demo.set_defaults(run=_demo)
    option = demo.add_argument
    option("--dsn", help="use this server instead, and a table that is dropped in the end")
    option("--threads", type=_count, default=32, metavar="N", help="threads that submit (default: 32)")
    option("--seconds", type=_seconds, default=5.0, metavar="S", help="measured time per side (default: 5)")


def _add_load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    load = commands.add_parser(
        "load",
        help="load CSV or JSON lines into a table",
        description="Load CSV or JSON lines into a table.",
        epilog=_LOAD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load.set_defaults(run=_load)
    option = load.add_argument
    option("file", metavar="FILE", help="what to read; - is standard input")
    option("--table", required=True, metavar="T", help="written as in SQL: orders, sales.orders, '\"Orders\"'")
    option("--dsn", help=_DSN_HELP)
    option("--rejects", metavar="FILE", help="gets every row that was not committed, with its error (JSON lines)")
    _add_input_options(load.add_argument_group("input"))
    _add_batch_options(load.add_argument_group("batches"))


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--format", choices=("csv", "jsonl"), help="default: by extension, else by the first character")
    option("--null", metavar="TEXT", help="CSV: the unquoted field that is NULL (default: the empty one)")
    option("--columns", type=_names, metavar="A,B", help="JSON: the keys (default: those of the first object)")
    option("--encoding", default="utf-8", metavar="NAME", help="of FILE (default: utf-8)")


def _add_batch_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--max-batch-size", type=_count, default=1000, metavar="N", help="rows a transaction (default: 1000)")
    option("--workers", type=_count, default=1, metavar="N", help="transactions at a time (default: 1)")
    option(
        "--delivery-timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds until a row gives up, retries included (default: 60)",
    )


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve jobs over HTTP",
        description="Take jobs over HTTP, and write them in batches.",
        epilog=_SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(run=_serve)
    for title, options in _SERVE_OPTIONS.items():
        group = serve.add_argument_group(title)
        for flag, metavar, text in options:
            name = "MICROBATCH_" + flag.strip("-").upper().replace("-", "_")
            if metavar:
                group.add_argument(flag, dest=name, metavar=metavar, help=text)
            else:
                group.add_argument(flag, dest=name, action="store_const", const="1", help=text)


def _add_init_db(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init_db = commands.add_parser(
        "init-db",
        help="print or create the table of the commit guard",
        description="Print or create the table in which batches leave word of their commit.",
        epilog=_INIT_DB_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init_db.set_defaults(run=_init_db)
    option = init_db.add_argument
    option("--dsn", help=_DSN_HELP)
    option("--apply", action="store_true", help="create the table, if it is not there, instead of printing the DDL")
    option("--service", action="store_true", help="the tables of `microbatch serve` in place of the commit guard's")


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
