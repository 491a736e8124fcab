"""schemathesis against the running service: what `/openapi.json` says is what it does.

python -m tests.service.schemas                 at least 5,000 cases
python -m tests.service.schemas --cases 500     fewer
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from .serving import serving

CONFIGURATION = Path(__file__).parent / "schemathesis.toml"
SECONDS = 540.0
EXAMPLES = 600  # of an operation in one run; a run with them has about 3,000 cases


def check(port: int, examples: int, seed: int, directory: Path | None = None) -> int:
    """One run of all its checks; how many cases it had. `AssertionError` with its report if one of them failed."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION), "run"]
    command += [f"http://127.0.0.1:{port}/openapi.json", "--checks", "all", "--max-examples", str(examples)]
    command += ["--seed", str(seed), "--generation-database", "none", "--suppress-health-check", "all", "--no-color"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=directory,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"([0-9]+) generated", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.service.schemas", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    cases, seed = 0, given.seed
    with serving() as service:
        while cases < given.cases:
            cases += check(service.port, min(EXAMPLES, given.cases), seed)
            seed += 1
        assert service.ask("GET", "/readyz")[0] == 200
        assert service.end() == 0
    print(f"{cases} cases: no 500, nothing that /openapi.json does not say")
    return 0


if __name__ == "__main__":
    sys.exit(main())
