"""The documents: their markup is valid, their code runs on a real server, their tables say what is."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from docutils import nodes
from docutils.core import publish_doctree
from psycopg.conninfo import conninfo_to_dict
from test_architecture import LEVELS

from microbatch import MicroBatcher, QueueFull, RetryPolicy
from microbatch.options import Options, options_from_env

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.rst")), *sorted(ROOT.glob("*/*.rst"))]
README = ROOT / "README.rst"
TESTING = ROOT / "docs" / "testing.rst"
_PAUSE = threading.Event()  # never set
SERVER = "postgresql://localhost/shop"  # stands in the documents for the reader's server

Names = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A code block, and the title it stands under."""

    path: Path
    section: str
    language: str
    line: int
    text: str


def parsed(path: Path) -> nodes.document:
    """The document; anything that docutils would as much as warn of is an error."""
    settings = {"halt_level": 2, "report_level": 2, "warning_stream": False, "syntax_highlight": "none"}
    return publish_doctree(path.read_text("utf-8"), source_path=str(path), settings_overrides=settings)


def blocks(path: Path, *languages: str) -> Iterator[Block]:
    for node in parsed(path).findall(nodes.literal_block):
        language = (node["classes"] or ["text"])[-1]
        if language in languages:
            title = _title_above(node)
            yield Block(path, title, language, _line_of(path, node.astext()), node.astext())


def _title_above(node: nodes.Node) -> str:
    while not isinstance(node, (nodes.section, nodes.document)):
        node = node.parent
    return str(next(node.findall(nodes.title)).astext())


def _line_of(path: Path, text: str) -> int:
    first = text.splitlines()[0]
    return next(n for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip() == first.strip())


def run_blocks(path: Path, database: str, checks: dict[str, Callable[[Names], None]]) -> None:
    """Run all blocks in one namespace, as a reader would paste them; after a section's last one its check.

    Those under the title Django need a project around them and have a test of their own.
    """
    names: Names = {"__name__": "__documented__"}
    code = [block for block in blocks(path, "python") if block.section != "Django"]
    assert set(checks) <= {block.section for block in code}
    create_tables(path, database)
    try:
        for block, following in zip(code, [*code[1:], None], strict=True):
            # Blank lines in front, so that a traceback names the document's own line.
            text = "\n" * (block.line - 1) + block.text.replace(SERVER, database)
            exec(compile(text, block.path, "exec"), names)
            if block.section in checks and (following is None or following.section != block.section):
                checks[block.section](names)
    finally:
        for value in list(names.values()):
            if isinstance(value, MicroBatcher):
                value.shutdown(timeout=10)


def create_tables(path: Path, database: str) -> None:
    with psycopg.connect(database) as connection:
        for block in blocks(path, "sql"):
            connection.execute(block.text)


def row_count(database: str) -> int:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT count(*) FROM payments").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def uri(database: str) -> str:
    return as_uri(database)


def as_uri(database: str) -> str:
    """The same server in the form that the documents use."""
    parts = conninfo_to_dict(database)
    host, port = parts.get("host", "localhost"), parts.get("port", 5432)
    return f"postgresql://{parts.get('user', '')}:{parts.get('password', '')}@{host}:{port}/{parts['dbname']}"


# Markup


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_is_valid_and_its_links_lead_somewhere(path: Path) -> None:
    document = parsed(path)

    targets = [node["refuri"] for node in document.findall(nodes.reference) if "refuri" in node]
    files = [target for target in targets if "://" not in target]

    assert [target for target in files if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_fit_the_screen(path: Path) -> None:
    assert [line for line in path.read_text("utf-8").splitlines() if len(line) > 120] == []


# Code


def test_the_readmes_code_runs(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    def check_flask(names: Names) -> None:
        client, payments = names["app"].test_client(), names["payments"]
        answer = client.post("/payments", data={"user_id": "7", "amount": "12.50"})
        assert (answer.status_code, answer.json) == (201, {"id": 1})
        later = client.post("/payments/later", data={"user_id": "8", "amount": "1"})
        assert later.status_code == 202
        assert payments.future(later.json["job"]).result()["amount"] == Decimal("1.00")
        with caplog.at_level(logging.ERROR):
            client.post("/payments/later", data={"user_id": "9", "amount": "-1"})
            payments.flush(10)
            wait_for(lambda: "CheckViolation" in caplog.text)
        with mock.patch.object(payments, "execute", side_effect=QueueFull):
            assert client.post("/payments", data={"user_id": "7", "amount": "1"}).status_code == 503

    def check_a_bad_row(names: Names) -> None:
        assert names["row"]["amount"] == 5
        assert names["refused"] == "payments_amount_check"

    def check_shutdown(names: Names) -> None:
        assert names["report"].finished
        assert names["report"].undelivered == ()

    run_blocks(README, uri, {"Flask": check_flask, "A bad row": check_a_bad_row, "Shutdown": check_shutdown})

    assert row_count(uri) == 2 + 1 + 10 + 1  # Flask, Waiting, submit_many, A bad row


def wait_for(condition: Callable[[], bool]) -> None:
    """Listeners run after the future is resolved, so `flush` does not wait for them."""
    for _ in range(1000):
        if condition():
            return
        _PAUSE.wait(0.01)
    raise AssertionError("it did not happen")


def test_the_page_on_transactions_runs(uri: str) -> None:
    run_blocks(ROOT / "docs" / "transactions.rst", uri, {})


def test_the_page_on_testing_runs(uri: str) -> None:
    def check_contracts(names: Names) -> None:
        suites = [names["TestMyQueue"](), names["TestMyProcessor"]()]
        for suite in suites:
            tests = [name for name in dir(suite) if name.startswith("test_")]
            assert tests
            for name in tests:
                getattr(suite, name)()

    run_blocks(TESTING, uri, {"A queue or a processor of your own": check_contracts})


def test_the_page_on_logging_runs(uri: str) -> None:
    logger = logging.getLogger("microbatch")
    level, handlers = logger.level, list(logger.handlers)
    try:
        run_blocks(ROOT / "docs" / "logging.rst", uri, {})
        assert len(logger.handlers) == len(handlers) + 1
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_every_page_with_code_is_run() -> None:
    pages = ("transactions", "postgres", "metrics", "logging")
    covered = {README, TESTING, *(ROOT / "docs" / f"{page}.rst" for page in pages)}

    assert {path for path in DOCUMENTS if list(blocks(path, "python"))} == covered


# Django, in a process of its own: its settings are global.

DJANGO_SETTINGS = """
import os
SHOP_DSN = os.environ["SHOP_DSN"]
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ["SHOP_NAME"],
    "USER": os.environ["SHOP_USER"],
    "PASSWORD": os.environ["SHOP_PASSWORD"],
    "HOST": os.environ["SHOP_HOST"],
    "PORT": os.environ["SHOP_PORT"],
    # The tables are the documents' own and not made by migrations.
    "TEST": {"TEMPLATE": os.environ["SHOP_NAME"]},
}}
ROOT_URLCONF = "shop.urls"
SECRET_KEY = "no secret"
"""
DJANGO_URLS = """
from django.urls import path
from shop.views import pay
urlpatterns = [path("pay", pay)]
"""
DJANGO_REQUEST = """
import django
django.setup()
from django.test import Client
from shop import batching
assert Client().post("/pay", {"user_id": "1", "amount": "9.50"}).status_code == 202
# The process ends here, and the batcher drains.
"""


@pytest.fixture
def shop(tmp_path: Path, uri: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A Django project out of the documents' blocks; gives a function that runs Python in it."""
    pytest.importorskip("django", reason="Django is not installed: pip install 'django>=4.2'")
    batching, views = [block.text for block in blocks(README, "python") if block.section == "Django"]
    (tests,) = [block.text for block in blocks(TESTING, "python") if block.section == "Django"]
    package = tmp_path / "shop"
    package.mkdir()
    files = {
        "__init__": "",
        "settings": DJANGO_SETTINGS,
        "urls": DJANGO_URLS,
        "batching": batching,
        "views": views,
        "tests": tests,
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, "utf-8")
    create_tables(README, uri)
    parts = conninfo_to_dict(uri)
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "SHOP_DSN": uri,
        "SHOP_NAME": str(parts["dbname"]),
        **{f"SHOP_{name.upper()}": str(parts.get(name, "")) for name in ("user", "password", "host", "port")},
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)

    return run


def test_the_readmes_django_view_writes_after_the_commit(
    shop: Callable[..., subprocess.CompletedProcess[str]], uri: str
) -> None:
    ended = shop("-c", DJANGO_REQUEST)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert row_count(uri) == 1


def test_a_django_test_case_uses_its_own_transaction(
    shop: Callable[..., subprocess.CompletedProcess[str]], uri: str
) -> None:
    ended = shop("-m", "django", "test", "--noinput", "shop")

    assert ended.returncode == 0, ended.stderr
    assert "Ran 1 test" in ended.stderr
    assert row_count(uri) == 0, "the real database is left alone"


# Tables


def test_the_table_of_layers_is_the_one_that_is_enforced() -> None:
    table = next(table for table in parsed(ROOT / "docs" / "design.rst").findall(nodes.table))
    rows = [row.findall(nodes.entry) for row in next(table.findall(nodes.tbody)).findall(nodes.row)]

    assert [sorted(modules.astext().split()) for _, modules, _ in rows] == [sorted(line.split()) for line in LEVELS]


def option_rows() -> Iterator[list[str]]:
    table = next(table for table in parsed(README).findall(nodes.table) if "linger" in table.astext())
    for row in next(table.findall(nodes.tbody)).findall(nodes.row):
        yield [entry.astext() for entry in row.findall(nodes.entry)]


def test_the_table_of_options_is_complete_and_true() -> None:
    said = {name: default for name, _, default, _ in option_rows()}

    parameters = inspect.signature(MicroBatcher).parameters
    true = {name: parameter.default for name, parameter in parameters.items() if name != "processor"}
    true |= {f"retry.{name}": getattr(RetryPolicy(), name) for name in ("max_attempts", "backoff", "backoff_max")}
    words = {name: getattr(value, "__name__", str(value)) for name, value in true.items()}
    words["retry"] = "RetryPolicy()"

    assert {name: default.strip('"') for name, default in said.items()} == words
    assert {name for name in said if "." not in name} == set(Options.__dataclass_fields__)


def test_every_variable_of_the_table_is_understood() -> None:
    variables = {name: variable for name, variable, _, _ in option_rows() if variable != "(none)"}

    assert variables == {name: f"MICROBATCH_{name.replace('.', '_').upper()}" for name in variables}
    for name, variable in variables.items():
        value = {"when_full": "raise", "retry": "none", "name": "shop"}.get(name, "1")
        assert list(options_from_env("MICROBATCH_", {variable: value})) == [name.partition(".")[0]]


def test_the_projects_own_variables_are_not_taken_for_options() -> None:
    texts = [path.read_text("utf-8") for path in [*DOCUMENTS, ROOT / ".ci" / "run", *ROOT.glob("microbatch/*.py")]]
    mentioned = set(re.findall(r"\bMICROBATCH_[A-Z_]+[A-Z]\b", " ".join(texts)))
    options = {variable for _, variable, _, _ in option_rows()} | {"MICROBATCH_BATCH_SIZE"}

    assert mentioned - options
    assert options_from_env("MICROBATCH_", dict.fromkeys(mentioned - options, "1")) == {}


def test_other_libraries_words_are_recognised_as_variables() -> None:
    with pytest.raises(ValueError, match="did you mean MICROBATCH_MAX_BATCH_SIZE"):
        options_from_env("MICROBATCH_", {"MICROBATCH_BATCH_SIZE": "10"})


def test_what_is_to_be_installed_can_be() -> None:
    """The package is installed from a clone, as the README says; everything else by a name that it requires itself."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    required = {re.split(r"[\[<>=]", name)[0] for name in re.findall(r'"([\w.-]+(?:\[\w+\])?[<>=][^"]*)"', project)}
    sources = [*DOCUMENTS, *ROOT.glob("microbatch/**/*.py"), *ROOT.glob("examples/*.py"), ROOT / "Dockerfile"]
    wrong, seen = [], 0
    for path in sources:
        # CONTRIBUTING has the one command that follows a release.
        text = "" if path.name == "CONTRIBUTING.rst" else path.read_text("utf-8")
        for command in re.findall(
            r"pip install ((?:-\S+ )*(?:(?:'[^'\s]+'|\"[^\"\s]+\"|[\w.][\w.\[\],<>=-]*) ?)+)", text
        ):
            for word in shlex.split(command):
                seen += not word.startswith("-")
                name, _, named = word.rstrip("]").partition("[")
                fits = (
                    set(named.split(",")) <= extras | {""} if name == "." else re.split(r"[<>=]", name)[0] in required
                )
                if not fits and not word.startswith("-"):
                    wrong.append((path.name, word))
    assert wrong == []
    assert seen > 10


def test_the_figures_of_the_readme_are_those_of_the_report() -> None:
    report = (ROOT / "benchmarks" / "report.rst").read_text()
    measured = re.findall(r"   \* - (.+)\n     - (.+)\n     - .+\n     - (\S+) \(.+\n     - .+\n", report)
    readme = (ROOT / "README.rst").read_text()
    figures = readme[readme.index("How fast\n") : readme.index("When not to use it\n")]
    said = re.findall(r"   \* - (.+)\n     - (.+)\n     - (\S+)\n     - ``(.+)``\n", figures)
    assert len(said) >= 8
    for what, against, ratio, benchmark in said:
        assert (what, against, ratio) in measured
        assert f'"{benchmark.strip(chr(34))}"' in (ROOT / "benchmarks" / "__main__.py").read_text()
