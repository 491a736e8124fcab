"""A PostgreSQL whose disk is slower: its binaries, with a library in front that makes each fdatasync wait first."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from microbatch.embedded import _copy_wheel, _find_binaries

SOURCE = Path(__file__).with_name("slow_fsync.c")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@contextmanager
def slow_fsync(milliseconds: float) -> Iterator[None]:
    """Servers that are started in here wait so long at each fdatasync. Needs a C compiler, and Linux."""
    with tempfile.TemporaryDirectory(prefix="microbatch-slow-") as directory:
        os.chmod(directory, 0o755)
        library = Path(directory, "slow_fsync.so")
        define = f"-DNANOSECONDS={round(milliseconds * 1_000_000)}L"
        subprocess.run(
            [str(compiler()), "-shared", "-fPIC", "-O1", define, "-o", str(library), str(SOURCE), "-ldl"], check=True
        )
        library.chmod(0o755)
        binaries = _copy_wheel(_find_binaries().directory, Path(directory, "server"))
        program = binaries / "postgres"
        program.rename(program.with_name("postgres.real"))
        program.write_text(f'#!/bin/sh\nLD_PRELOAD={library} exec {program}.real "$@"\n')
        program.chmod(0o755)
        with mock.patch.dict(os.environ, MICROBATCH_PG_BIN=str(binaries)):
            yield
