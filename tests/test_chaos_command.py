"""The command: its table, its evidence, and that it fails where a level does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import __main__ as command
from chaos.levels import LEVELS, SHORT, Settings
from chaos.report import Evidence, Finding, table
from chaos.verdict import Kind, Outcome, Verdict, judge
from docutils import nodes
from docutils.core import publish_doctree


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def finding(accepted: list[str], stored: list[str], **more: object) -> Finding:
    outcomes = {key: Outcome(Kind.COMPLETED, (n, key)) for n, key in enumerate(accepted)}
    rows = list(enumerate(stored))
    evidence = Evidence(dict.fromkeys(accepted), rows, outcomes)
    return Finding("storm: a, b", judge(*vars(evidence).values()), evidence=evidence, **more)  # type: ignore[arg-type]


def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, played: Finding, *arguments: str) -> int:
    def level(settings: Settings) -> list[Finding]:
        assert settings.seed == 17
        return [played]

    monkeypatch.setitem(LEVELS, "storm", level)
    return command.main(["--level", "storm", "--seed", "17", "--failures", str(tmp_path / "failures"), *arguments])


def test_a_level_that_holds_leaves_a_table_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "table.rst"
    monkeypatch.setattr(command, "DOCUMENT", document)

    assert play(monkeypatch, tmp_path, finding(["a", "b"], ["a", "b"]), "--write") == 0

    printed = capsys.readouterr().out
    for words in ("storm: a, b", "holds", "with the seed 17", "load averages"):
        assert words in " ".join(printed.split())
        assert words in " ".join(document.read_text().split())
    written = publish_doctree(document.read_text(), settings_overrides={"halt_level": 2})
    assert len(list(written.findall(nodes.row))) == 2
    assert not (tmp_path / "failures").exists()


def test_a_level_that_fails_leaves_its_seed_its_faults_and_the_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = finding(["a", "b"], ["a", "c"], fault_log=["0.5 restart immediate"])

    assert play(monkeypatch, tmp_path, failing) == 1

    assert "FAILED storm: a, b: lost: 1 (b)" in capsys.readouterr().out
    (path,) = (tmp_path / "failures").iterdir()
    kept = json.loads(path.read_text())
    assert (kept["seed"], kept["faults"]) == (17, ["0.5 restart immediate"])
    assert kept["violations"] == {"lost": ["b"], "stranger": ["c"]}
    assert (kept["accepted"], kept["rows"]) == ({"a": None, "b": None}, [[0, "a"], [1, "c"]])
    assert kept["outcomes"]["b"] == ["COMPLETED", [1, "b"], ""]


def test_what_is_told_is_bounded() -> None:
    verdict = Verdict(unknown=["a", "b"], expired=["c"], jobs=3)

    assert not Finding("x", verdict, unknown_at_most=2, expired_at_most=1).complaints()
    assert Finding("x", verdict, unknown_at_most=1, expired_at_most=1).complaints() == [
        "unknown: 2, and 1 is the bound"
    ]
    assert Finding("x", verdict, unknown_at_most=2).complaints() == ["expired: 1, and 0 is the bound"]


def test_a_control_must_break_a_promise() -> None:
    assert finding(["a"], ["a"], is_control=True).complaints()
    assert not finding(["a"], ["a", "a"], is_control=True).complaints()


def test_the_table_is_one_for_the_documents() -> None:
    rows = publish_doctree(table([finding(["a"], ["a"]), finding(["a"], [])]), settings_overrides={"halt_level": 2})

    results = [row.children[-1].astext() for row in rows.findall(nodes.row)]
    assert results == ["result", "holds", "FAILED"]


def test_the_short_run_is_a_part_of_the_long_one() -> None:
    assert set(SHORT) < set(LEVELS)
