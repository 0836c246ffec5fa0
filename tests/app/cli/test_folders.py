"""Folders of results: locks, and files of other programs."""

import subprocess
import sys
from pathlib import Path

import pytest

from hessfunc.app import tasks
from hessfunc.app.cli.folders import held
from tests.app.cli.commands import analyze, experiment, train


def test_results_of_something_else_stay(here: Path) -> None:
    (here / "results.json").write_text("{}")
    refused = analyze("mine:quadratic", "--out", ".")
    assert refused.exit_code == 2
    assert "results.json that no analysis has written" in refused.stderr
    assert (here / "results.json").read_text() == "{}"


def test_a_folder_in_which_another_analysis_runs_is_refused(here: Path) -> None:
    (here / "found").mkdir()
    with held(here / "found"):
        refused = analyze("mine:quadratic", "--k", "1", "--out", "found")
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1
        assert "--out found: process" in refused.stderr
        assert "is running in this directory: wait until it has ended" in refused.stderr
        assert [file.name for file in (here / "found").iterdir()] == ["hessfunc.lock"]
    assert analyze("mine:quadratic", "--k", "1", "--out", "found").exit_code == 0
    assert not (here / "found/hessfunc.lock").exists()


def test_the_lock_of_an_analysis_that_was_killed_is_taken_over(here: Path) -> None:
    code = (
        "import os, pathlib; from hessfunc.app.cli.folders import held\n"
        "pathlib.Path('found').mkdir()\n"
        "with held(pathlib.Path('found')): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (here / "found/hessfunc.lock").exists()
    assert analyze("mine:quadratic", "--k", "1", "--out", "found").exit_code == 0
    assert not (here / "found/hessfunc.lock").exists()


@pytest.mark.parametrize("name", ["history.json", "history.png", "report.html"])
def test_files_of_other_programs_are_not_overwritten(name: str) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("precious")
    done = train("--out", "mine", "--epochs", "1", "--examples", "20", "--batch-size", "10")
    assert done.exit_code == 2
    assert Path("mine", name).read_text() == "precious"


def test_a_folder_in_which_another_command_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "examples", lambda *_, **__: ([0], [0]))
    Path("mine").mkdir()
    with held(Path("mine")):
        for done in (train("--out", "mine"), experiment("exp01", "--out", "mine")):
            assert done.exit_code == 2
            assert "--out mine: process" in done.stderr
        assert [file.name for file in Path("mine").iterdir()] == ["hessfunc.lock"]
