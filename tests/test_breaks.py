"""The deliberate breaks fit the source as it is; `python -m tests.breaks` does them."""

from __future__ import annotations

from pathlib import Path

import breaks
import pytest


@pytest.mark.parametrize("broken", breaks.BREAKS, ids=lambda broken: broken.name)
def test_a_break_fits_its_file_and_names_tests_that_exist(broken: breaks.Break, tmp_path: Path) -> None:
    copy = tmp_path / "microbatch" / broken.file
    copy.parent.mkdir(parents=True)
    copy.write_text((breaks.ROOT / "microbatch" / broken.file).read_text())

    assert breaks.apply(broken, tmp_path) is None
    for test in broken.tests:
        file, _, name = test.partition("::")
        first = name.partition("[")[0].partition("::")[0]
        assert first in (breaks.ROOT / "tests" / file).read_text()
