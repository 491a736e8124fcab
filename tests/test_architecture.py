"""The house: who may import whom, and what `import microbatch` costs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import microbatch

PACKAGE = Path(microbatch.__file__).parent

# From the ground up. A module imports only from lines above its own, never from its own line. What stands under
# `processors` is one driver each: free inside, without cycles.
LEVELS = [
    "errors interpreter logs",
    "foreign",
    "job events retry",
    "protocols",
    "queues registry returning stats calling",
    "options collector judge telling belongings mapping outage",
    "core",
    "acceptance flight owed",
    "worker supervisor",
    "life",
    "batcher",
    "testing embedded processors instrumentation",
    "processors.postgres instrumentation.measures",
    "_terminal _rows instrumentation.prometheus instrumentation.opentelemetry",
    "_database _outcomes",
    "load demo",
    "service.bodies service.failures service.ids service.known service.problems service.settings",
    "service.columns service.feed service.metrics service.security",
    "service.table",
    "service.openapi service.writer",
    "service.store",
    "service.jobs",
    "service.routes service.dashboard",
    "service.app",
    "service service.server",
    "cli",
    "__main__",
    "microbatch",
]
LEVEL = {name: number for number, line in enumerate(LEVELS) for name in line.split()}


def modules() -> dict[str, Path]:
    """Dotted names below the package, to their files; the package itself is `microbatch`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts) or "microbatch"] = path
    return found


MODULES = modules()


def unit(module: str) -> str:
    """What the table speaks of: a module, or a driver as a whole."""
    return ".".join(module.split(".")[:2])


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of ours that *module* imports anywhere: in functions, for types only, by name at run time."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [] if module == "microbatch" else package
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["microbatch", *package[: len(package) - node.level + 1]] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        for name in names:
            if name.split(".")[0] == "microbatch":
                yield resolved(name), getattr(node, "lineno", 0)


def resolved(name: str) -> str:
    """The module that `microbatch.a.b` is, or that `b` is a name in."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "microbatch"


def test_every_module_has_its_level() -> None:
    missing = sorted({unit(module) for module in MODULES} - set(LEVEL))
    assert missing == [], "give it a line in LEVELS, above everything that imports it"
    assert sorted(set(LEVEL) - {unit(module) for module in MODULES}) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_lower_levels(module: str) -> None:
    wrong = [
        f"{MODULES[module].relative_to(PACKAGE.parent)}:{line} imports {target}"
        for target, line in imports(module)
        if unit(target) != unit(module) and LEVEL[unit(target)] >= LEVEL[unit(module)]
    ]
    assert wrong == []


def test_nothing_goes_round_in_circles() -> None:
    graph = {module: {target for target, _ in imports(module)} - {module} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_reader_of_imports_sees_every_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "import microbatch\n"
        "import microbatch.job, os\n"
        "from . import core\n"
        "from .errors import QueueFull\n"
        "from microbatch.processors.postgres import PostgresProcessor\n"
        "def lazily():\n"
        "    from microbatch import stats, MicroBatcher\n"
        "    importlib.import_module('microbatch.cli')\n"
        "if TYPE_CHECKING:\n"
        "    from .batcher import MicroBatcher\n"
    )
    monkeypatch.setitem(MODULES, "sample", source)
    assert sorted(imports("sample"), key=lambda found: found[1]) == [
        ("microbatch", 1),
        ("job", 2),
        ("core", 3),
        ("errors", 4),
        ("processors.postgres", 5),
        ("stats", 7),
        ("microbatch", 7),
        ("cli", 8),
        ("batcher", 10),
    ]


def test_import_microbatch_loads_nothing_outside_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import microbatch, microbatch.testing;"
        "names = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(names - sys.stdlib_module_names - {'microbatch'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_import_microbatch_starts_no_thread_and_loads_no_heavy_machinery() -> None:
    script = (
        "import sys, threading; import microbatch;"
        "heavy = {'asyncio', 'multiprocessing', 'subprocess', 'socket'} & set(sys.modules);"
        "print(threading.active_count(), sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1 []", done.stderr


def test_the_public_names_are_listed_once_and_exist() -> None:
    assert len(set(microbatch.__all__)) == len(microbatch.__all__)
    assert [name for name in microbatch.__all__ if not hasattr(microbatch, name)] == []


def test_every_public_name_says_what_it_is() -> None:
    undocumented = [name for name in microbatch.__all__ if not (getattr(microbatch, name).__doc__ or "").strip()]
    assert undocumented == []
