"""Every command of the pages exists, with the options that it is given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def in_blocks() -> list[str]:
    """The lines of all blocks of commands."""
    blocks = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def in_lines() -> list[str]:
    """All code within the lines of the pages for those who come from elsewhere."""
    pages = [page.read_text() for page in PAGES if page.parent.name == "coming-from"]
    lines = [re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE) for page in pages]
    return [code for line in lines for code in re.findall(r"`([^`\n]+)`", line)]


def calls(lines: list[str]) -> list[list[str]]:
    """The arguments of each call of ``hessfunc``."""
    found = [re.search(r"(?:^|-m |do )hessfunc ([^;]*)", line) for line in lines]
    return [shlex.split(call[1], comments=True) for call in found if call]


@pytest.mark.parametrize("commands", [calls(in_blocks()), calls(in_lines())], ids=["sh", "inline"])
def test_commands_and_options_exist(commands: list[list[str]]) -> None:
    pytest.importorskip("typer", reason="typer is not installed")
    from typer.main import get_command

    from hessfunc.app.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) > 10
    for name, *arguments in commands:
        options = {option for parameter in known[name].params for option in parameter.opts}
        given = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
        assert given <= options | {"--help"}, (name, given - options)
