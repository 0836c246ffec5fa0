"""The commands under torchrun: the numbers of one process, printed and written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.app.cli.commands import analyze, invoke
from tests.app.problems.language_models import gpt2, saved

ROOT = Path(__file__).parents[3]


def on_two_ranks(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "hessfunc", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def numbers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["results"]
    return found


MINE = """
import torch
from torch.nn import functional as F

def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    x, y = torch.randn(31, 4).double(), torch.randint(3, (31,))
    return model, F.cross_entropy, list(zip(x.split(7), y.split(7)))

def broken():
    import os
    if os.environ["RANK"] == "1":
        raise OSError("no such disk here")
    return problem()
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    return folder


OPTIONS = ("--k", "3", "--probes", "2", "--steps", "15", "--landscape", "3")


@pytest.mark.slow
def test_analyze_prints_once_and_finds_what_one_process_finds(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine)
    alone = analyze("mine:problem", *OPTIONS, "--out", "one")
    both = on_two_ranks("analyze", "mine:problem", *OPTIONS, "--out", "two", cwd=mine)
    assert (alone.exit_code, both.returncode) == (0, 0), both.stderr
    assert both.stdout.count("report.html") == 1
    assert sorted(x.name for x in (mine / "one").iterdir()) == sorted(
        x.name for x in (mine / "two").iterdir()
    )
    one, two = numbers(mine / "one"), numbers(mine / "two")
    assert two.keys() == one.keys()
    _compare(one, two)


@pytest.mark.slow
def test_analyze_divides_the_model_too(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    only = ["--only", "eigenvalues,trace,density"]
    alone = analyze("mine:problem", *OPTIONS, *only, "--out", "whole")
    both = on_two_ranks("analyze", "mine:problem", *OPTIONS, *only, "--shard", "0,2", cwd=mine)
    assert (alone.exit_code, both.returncode) == (0, 0), both.stderr
    one, two = numbers(mine / "whole"), numbers(mine / "hessfunc-out")
    assert two.keys() == one.keys()
    _compare(one, two)


@pytest.mark.slow
def test_analyze_divides_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = f"hf:{saved(tmp_path, gpt2())}", "--text", str(tmp_path / "text.txt")
    words = ["--sequence", "9", "--examples", "5", "--batch-size", "3", "--dtype", "float64"]
    words += ["--curvature", "ggn", "--only", "eigenvalues,density"]
    alone = analyze(*target, *words, *OPTIONS, "--out", "whole")
    both = on_two_ranks(
        "analyze", *target, *words, *OPTIONS, "--shard", "transformer.h.*", cwd=tmp_path
    )
    assert (alone.exit_code, both.returncode) == (0, 0), both.stderr
    _compare(numbers(tmp_path / "whole"), numbers(tmp_path / "hessfunc-out"))


def test_a_model_is_divided_under_torchrun_only(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine)
    assert "start the command with torchrun" in analyze("mine:problem", "--shard", "*").stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = analyze("mine:problem", "--shard", "*", "--only", "eigenvalues,line")
    assert "--shard has no line and plane" in refused.stderr


def _compare(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        # Two ranks add up in another order, which may move the last round by one.
        assert two.get("matvecs", 0) == pytest.approx(one.get("matvecs", 0), rel=0.15)
        for key in one.keys() - {"seconds", "choices", "residuals", "matvecs", "passes"}:
            _compare(one[key], two[key])
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            _compare(a, b)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-8, abs=1e-9)
    else:
        assert one == two


@pytest.mark.slow
def test_what_fails_in_one_process_is_said_once(mine: Path) -> None:
    found = on_two_ranks("analyze", "mine:broken", *OPTIONS, "--out", "broken", cwd=mine)
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith("hessfunc: ")]
    assert len(said) == 1
    assert "rank 1" in said[0]
    assert "no such disk here" in said[0]


@pytest.mark.parametrize("words", [("train", "--epochs", "1"), ("experiment", "exp08")])
def test_commands_that_do_not_share_work_say_so(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torchrun sets it for the two processes.
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        refused = invoke(*words)
        assert refused.exit_code != 0
        assert refused.stdout == ""
        said.append(refused.stderr)
    assert said == [
        f"hessfunc: {words[0]} runs in a single process, but torchrun has started 2: run it "
        "without torchrun\n",
        "",
    ]
