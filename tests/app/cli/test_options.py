"""Options that commands share: folders, help, and mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

import hessfunc as hf
from hessfunc.app import tasks
from hessfunc.app.cli.options import held
from tests.app.cli.commands import analyze, experiment, invoke, train


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
        "import os, pathlib; from hessfunc.app.cli.options import held\n"
        "pathlib.Path('found').mkdir()\n"
        "with held(pathlib.Path('found')): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (here / "found/hessfunc.lock").exists()
    assert analyze("mine:quadratic", "--k", "1", "--out", "found").exit_code == 0
    assert not (here / "found/hessfunc.lock").exists()


def test_traceback_shows_where(here: Path) -> None:
    assert isinstance(analyze("mine:breaking", "--traceback").exception, KeyError)


@pytest.mark.parametrize("command", [[], ["analyze"], ["train"], ["eig"], ["experiment"]])
def test_help_has_flags_without_types_and_defaults_in_one_pair_of_brackets(
    command: list[str],
) -> None:
    text = invoke(*command, "--help").stdout
    assert "--help" in text
    assert "<bool>" not in text
    assert "[default: (" not in text


def test_version() -> None:
    assert invoke("--version").stdout == f"hessfunc {hf.__version__}\n"


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import hessfunc.app.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "hessfunc: the command line requires typer: pip install 'hessfunc[cli]'\n"
    )


def test_help_does_not_load_torch() -> None:
    code = "import sys, hessfunc.app.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyse"], "No such command 'analyse'"),
        (["analyse"], "choose one of analyze, compare, eig, experiment, plan, train"),
        (["analyze", "--color", "red"], "No such option: --color"),
        (["eig"], "Missing option '--resume'"),
        (["eig", "--k", "0"], "--k must be greater than or equal to 1"),
        (["train", "--epochs", "ten"], "--epochs must be a valid integer"),
    ],
)
def test_every_mistake_is_one_line(arguments: list[str], message: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("hessfunc: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr
