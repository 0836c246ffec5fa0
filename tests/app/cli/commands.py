"""Commands, run in this process."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from typer.testing import CliRunner, Result

from hessfunc.app.cli import app


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})


analyze, train, eig = (partial(invoke, name) for name in ("analyze", "train", "eig"))
experiment, plan = (partial(invoke, name) for name in ("experiment", "plan"))


def assert_refused(refused: Result, message: str) -> None:
    """Assert that a command has said its mistake in one line, and nothing else."""
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("hessfunc: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr


def history(file: str = "hessfunc-train/history.json") -> dict[str, Any]:
    return json.loads(Path(file).read_text())


SMALL = ("--params", "1e8", "--graph-memory", "1")
LARGE = ("--params", "7e9", "--k", "10", "--steps", "100", "--ranks", "64", "--gpu-memory", "80")


def number(output: str, row: str) -> list[float]:
    """The numbers of the first row that begins so."""
    line = next(line for line in output.splitlines() if line.strip().startswith(row))
    words = line.strip().removeprefix(row).replace(",", "").split()
    return [float(word) for word in words]
