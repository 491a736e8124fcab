"""Lets everything loose on the library, level by level, and compares the sets.

    python -m tests.chaos                      every level
    python -m tests.chaos --level storm        one; give it again for several
    python -m tests.chaos --minutes 30         what lasts, lasts so long
    python -m tests.chaos --ci                 what fits into two minutes
    python -m tests.chaos --write              and writes the table that the documents show

It prints one table. A level that fails writes its seed, its faults and the sets into a file, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import random
import sys
import time
from pathlib import Path

# The tools of the tests are modules of their own, here as under pytest.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chaos.levels import LEVELS, SHORT, Settings
from chaos.report import Finding, cells, document, footer, keep, table

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "chaos_table.rst"
# A level that takes so much longer than what it lets last hangs: every thread's stack is told.
BOUND = 900.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--level", action="append", choices=LEVELS, help="only this one; may be given again")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long what lasts lasts (default %(default)g)")
    parser.add_argument("--seed", type=int, help="draw the same again; a simulated history is told step by step")
    parser.add_argument("--ci", action="store_true", help="what fits into two minutes")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name} for the documents")
    parser.add_argument("--failures", type=Path, default=Path("chaos-failures"), help="where evidence goes")
    given = parser.parse_args(argv)
    seed = random.randrange(10**6) if given.seed is None else given.seed
    settings = Settings(seed, given.minutes * 60, given.ci, given.seed is not None and given.level == ["simulator"])
    # What is planted here is logged with tracebacks, as it should be; here that is noise.
    logging.disable(logging.CRITICAL)
    findings = []
    for name in given.level or (SHORT if given.ci else LEVELS):
        findings += run(name, settings, given.failures)
    command = " ".join(["python -m tests.chaos", *(sys.argv[1:] if argv is None else argv)])
    text = f"{table(findings)}\n\n{footer(command, seed)}\n"
    print(f"\n{text}", flush=True)
    if given.write:
        DOCUMENT.write_text(document([cells(finding) for finding in findings], footer(command, seed)))
    return int(any(finding.complaints() for finding in findings))


def run(name: str, settings: Settings, failures: Path) -> list[Finding]:
    faulthandler.dump_traceback_later(BOUND + 4 * settings.seconds, exit=True, file=sys.__stderr__)
    began = time.monotonic()
    print(f"{name} (seed {settings.seed})", flush=True)
    findings = LEVELS[name](settings)
    faulthandler.cancel_dump_traceback_later()
    for finding in findings:
        if finding.note:
            print(f"  {finding.name}: {finding.note}", flush=True)
        for complaint in finding.complaints():
            print(f"  FAILED {finding.name}: {complaint}", flush=True)
        if finding.complaints():
            print(f"  its evidence: {keep(finding, settings.seed, failures)}", flush=True)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return findings


if __name__ == "__main__":
    sys.exit(main())
