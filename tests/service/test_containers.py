"""The files for containers name what there is; they are not built here."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from microbatch.cli import _SERVE_NUMBERS, _SERVE_OPTIONS
from microbatch.options import options_from_env
from microbatch.service.settings import Settings, settings_from

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {f"MICROBATCH_{item.name.upper()}" for item in fields(Settings)} - {"MICROBATCH_BATCHER"}
SERVER = {*_SERVE_NUMBERS, "MICROBATCH_HOST"}


def example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))


def test_every_variable_of_the_example_is_understood() -> None:
    environ = {name: value for name, value in example().items() if name.startswith("MICROBATCH_")}
    settings = settings_from(environ)
    assert settings == Settings(batcher=settings.batcher), "what stands there is the default"
    for name, value in environ.items():
        is_option = bool(options_from_env("MICROBATCH_", {name: value or "none"}))
        assert is_option or name in SETTINGS | SERVER, name


def test_the_example_has_every_flag_and_setting() -> None:
    flags = {
        "MICROBATCH_" + flag[2:].upper().replace("-", "_") for group in _SERVE_OPTIONS.values() for flag, *_ in group
    }
    by_compose = set(compose()["services"]["microbatch"]["environment"])
    assert (flags | SETTINGS) - set(example()) == by_compose & (flags | SETTINGS)
    assert SETTINGS - flags == {"MICROBATCH_TOKEN", "MICROBATCH_ADMIN_TOKEN", "MICROBATCH_SECRET"}, (
        "no secret is a flag"
    )


def test_compose_has_what_it_needs_and_publishes_to_this_machine_only() -> None:
    services = compose()["services"]
    assert set(services) == {"microbatch", "postgres", "pgadmin"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:3000:3000", "127.0.0.1:8080:80"]
    needed = set(re.findall(r"\$\{([A-Z_]+):\?\}", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert needed == {name for name, value in example().items() if not name.startswith("MICROBATCH_") and value}


def test_the_image_copies_what_it_builds_from_and_runs_a_command_there_is() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    command = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    assert [json.loads(each) for each in command] == [["microbatch", "serve"]]
    variables = set(re.findall(r"(MICROBATCH_[A-Z_]+)=", text))
    assert variables <= SETTINGS | SERVER
