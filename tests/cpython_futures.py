"""Run CPython's own tests of `Future`, `wait`, `as_completed` and `ThreadPoolExecutor` on `JobFuture`.

    python tests/cpython_futures.py [--plain | --stock] [CASE ...]

`--plain` takes the guarded fall-back, `--stock` is the control: the interpreter's own `Future`. The last line of the
output is JSON: where the tests came from and how many ran. Exit status 0 all passed, 1 some failed, 3 no tests found.
Tests come with the interpreter, from Debian's `libpython3.x-testsuite`, or else from the nearest newer interpreter
that pyenv put beside this one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import logging
import sys
import unittest
from collections.abc import Sequence
from concurrent.futures import _base
from pathlib import Path
from types import ModuleType
from typing import Any

import microbatch.job
from microbatch.job import JobFuture

NO_TESTS = 3
MODULE = "test_concurrent_futures"
PARTS = ("test_future", "test_wait", "test_as_completed", "test_thread_pool")
CASES = ("FutureTests", "ThreadPoolWaitTests", "ThreadPoolAsCompletedTest", "ThreadPoolExecutorTest")
# One needs a pool of processes, one counts processors, and two have races of their own: a pool's thread says that it is
# idle, and lets go of the last references, after it has resolved the future (python/cpython#117344, #130957).
LEFT_OUT = (
    "test_hang_global_shutdown_lock",
    "test_default_workers",
    "test_idle_thread_reuse",
    "test_free_reference",
)

# Tests of 3.13 on 3.12 ask their helpers for these.
NEWER_HELPERS = {"Py_GIL_DISABLED": False, "requires_gil_enabled": lambda reason: lambda test: test}


def homes_of_tests() -> list[Path]:
    """Folders that may hold the tests of this minor version, then of newer ones."""
    version = sys.version_info[:2]
    homes = [Path("/usr/lib") / f"python{version[0]}.{version[1]}" / "test"]
    for home in sorted(Path(sys.base_prefix).parent.glob("3.*/lib/python3.*/test")):
        if tuple(map(int, home.parent.name[len("python") :].split("."))) >= version:
            homes.append(home)
    return [home for home in homes if list(home.glob(f"{MODULE}*"))]


def load_tests() -> list[ModuleType]:
    """The modules with the tests, imported after `Future` was replaced; empty if there are none."""
    try:
        import test.support
    except ImportError:
        return []
    for name, stand_in in NEWER_HELPERS.items():
        vars(test.support).setdefault(name, stand_in)
    # This interpreter's own helpers and tests come first.
    test.__path__ += map(str, homes_of_tests())
    try:
        found = importlib.import_module(f"test.{MODULE}")
    except ModuleNotFoundError:
        return []
    if not hasattr(found, "__path__"):
        return [found]
    return [importlib.import_module(f"{found.__name__}.{part}") for part in PARTS]


def replace_future(plain: bool) -> None:
    """Let everything in `concurrent.futures` that makes a `Future` make a `JobFuture`."""
    if plain:
        microbatch.job.use_plain_future()
    # The tests of `repr` want the name.
    future: Any = type("Future", (JobFuture,), {})
    assert ("_condition" in vars(future())) is plain, "this is not the future that was to be tested"
    _base.Future = concurrent.futures.Future = future  # type: ignore[misc]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert type(executor.submit(int)) is future


def select(modules: list[ModuleType], cases: Sequence[str]) -> unittest.TestSuite:
    suite = unittest.TestSuite()
    for module in modules:
        for name in cases:
            case = getattr(module, name, None)
            if case is not None and case.__module__ == module.__name__:
                for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
                    if not test.id().endswith(LEFT_OUT):
                        suite.addTest(test)
    return suite


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("cases", nargs="*", default=CASES)
    options = parser.parse_args()
    if not options.stock:
        replace_future(options.plain)
    modules = load_tests()
    if not modules:
        print(f"Python {sys.version.split()[0]} at {sys.base_prefix} comes without test.{MODULE}")
        return NO_TESTS
    logging.disable(logging.NOTSET)
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(select(modules, options.cases))
    facts = {"from": modules[0].__file__, "run": result.testsRun, "skipped": len(result.skipped)}
    print(json.dumps(facts))
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == "__main__":
    sys.exit(main())
