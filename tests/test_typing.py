"""What a user's editor and a strict mypy make of the API."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_strict_mypy_agrees_with_every_use_and_refuses_every_misuse(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed; `.ci/run` checks the same file with the library itself")
    kept = getattr(pytestconfig, "cache", None)  # pytest may run without
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unreachable", "--config-file=", "tests/typing/use.py"]
    cache = tmp_path if kept is None else kept.mkdir("mypy")
    done = subprocess.run([*command, f"--cache-dir={cache}"], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "microbatch" / "py.typed").exists()
