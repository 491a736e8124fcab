"""What a level found, the table of all of them, and the evidence of one that failed."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .verdict import COLUMNS, Key, Outcome, Verdict


@dataclass
class Evidence:
    """The sets that were compared, kept in case they do not agree."""

    accepted: Mapping[Key, str | None] = field(default_factory=dict)
    rows: Iterable[tuple[Any, Key]] = ()
    outcomes: Mapping[Key, Outcome] = field(default_factory=dict)


@dataclass
class Finding:
    """One line of the table.

    Attributes:
        name: level and case.
        faults: how many were injected.
        problems: what is wrong beside the verdict, such as faults that never came.
        unknown_at_most, expired_at_most: the bounds of what is allowed and told.
        is_control: a way that breaks the promises on purpose: its verdict must have a violation.
    """

    name: str
    verdict: Verdict
    faults: int = 0
    seconds: float = 0.0
    note: str = ""
    unknown_at_most: int = 0
    expired_at_most: int = 0
    is_control: bool = False
    problems: list[str] = field(default_factory=list)
    fault_log: Sequence[str] = ()
    evidence: Evidence = field(default_factory=Evidence)

    def complaints(self) -> list[str]:
        """Why it failed; empty when it passed."""
        found = list(self.problems)
        violations = self.verdict.violations()
        if self.is_control:
            return found if violations else [*found, "the control breaks no promise: the faults are too weak"]
        found += [f"{column}: {len(keys)} ({_some(keys)})" for column, keys in violations.items()]
        for column, most in (("unknown", self.unknown_at_most), ("expired", self.expired_at_most)):
            count = len(getattr(self.verdict, column))
            if count > most:
                found.append(f"{column}: {count}, and {most} is the bound")
        return found


def _some(keys: Sequence[Key]) -> str:
    return ", ".join(map(str, keys[:5])) + (", …" if len(keys) > 5 else "")


HEADS = ("level", "jobs", "faults", *(column.replace("_", " ") for column in COLUMNS), "seconds", "result")


def cells(finding: Finding) -> tuple[str, ...]:
    counts = finding.verdict.counts()
    result = "FAILED" if finding.complaints() else "breaks, as it must" if finding.is_control else "holds"
    return (
        finding.name,
        f"{finding.verdict.jobs:,}",
        f"{finding.faults:,}",
        *(f"{counts[column]:,}" for column in COLUMNS),
        f"{finding.seconds:.0f}",
        result,
    )


def table(findings: Sequence[Finding]) -> str:
    """In reStructuredText, which is as good to read on a terminal."""
    lines = [HEADS, *map(cells, findings)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEADS))]
    rule = " ".join("=" * width for width in widths)
    rows = [
        " ".join(cell.ljust(width) if n in (0, len(HEADS) - 1) else cell.rjust(width) for n, (cell, width) in columns)
        for columns in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(row.rstrip() for row in (rule, rows[0], rule, *rows[1:], rule))


def document(lines: Sequence[Sequence[str]], foot: str) -> str:
    """The same for the documents, whose lines are short: *lines* without the heads, and what stands below."""
    # A line may end inside quotes only.
    heads = ",".join(HEADS).replace("false failure", '"false\n            failure"')
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(lines)
    return "\n".join(
        [
            ".. csv-table::",
            f"   :header: {heads}",
            "",
            textwrap.indent(rows.getvalue(), "   "),
            *textwrap.wrap(foot, 119, break_on_hyphens=False),
            "",
        ]
    )


def footer(command: str, seed: int) -> str:
    """Where and when, with the load of the machine: the figures of a busy one are small."""
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return (
        f"``{command}`` with the seed {seed}; Python {platform.python_version()}, {os.cpu_count()} processors, "
        f"load averages at the end {load}."
    )


def keep(finding: Finding, seed: int, directory: Path) -> Path:
    """Write down everything about a failure; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{finding.name.replace(' ', '-').replace(',', '').replace('/', '-')}-{seed}.json"
    evidence = finding.evidence
    path.write_text(
        json.dumps(
            {
                "level": finding.name,
                "seed": seed,
                "complaints": finding.complaints(),
                "violations": finding.verdict.violations(),
                "faults": list(finding.fault_log),
                "accepted": {str(key): planted for key, planted in evidence.accepted.items()},
                "rows": [list(row) for row in evidence.rows],
                "outcomes": {
                    str(key): [outcome.kind.name, outcome.row, outcome.error]
                    for key, outcome in evidence.outcomes.items()
                },
            },
            indent=1,
            default=str,
        )
    )
    return path
