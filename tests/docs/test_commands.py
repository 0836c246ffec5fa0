"""Every command of the pages exists, with the options that it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[list[str]]:
    """The arguments of each call of ``hessfunc`` in a block of commands."""
    blocks = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.splitlines()]
    calls = [re.search(r"(?:^|-m )hessfunc (.*)", line) for line in lines]
    return [shlex.split(call[1], comments=True) for call in calls if call]


def test_commands_and_options_exist() -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    from typer.main import get_command

    from hessfunc.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands()) > 10
    for name, *arguments in commands():
        options = {option for parameter in known[name].params for option in parameter.opts}
        given = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
        assert given <= options | {"--help"}, (name, given - options)
