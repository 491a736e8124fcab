"""Names of test cases, the same in every run."""

from __future__ import annotations

import re


def named(value: object) -> str:
    """What it says of itself, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
