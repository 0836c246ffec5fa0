"""Lines and bars that show how far a command is."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hessfunc.app.cli import app
from hessfunc.app.cli.progress import Bars, bar, finished_fraction, line, show
from hessfunc.app.terminal import Output
from tests.app.cli.commands import analyze, invoke
from tests.training.records import record


def test_a_line_has_what_was_measured() -> None:
    plain = record(epoch=0.5, loss=2.0, accuracy=0.25, gradients=1234.0, seconds=0.25)
    assert line(plain) == (
        "epoch 0.5: loss 2.0000, accuracy 25.0%, 1,234 gradient-equivalents, 0.2 s"
    )
    full = line(record(test_accuracy=0.5, ratio=4, eigenvalue=-2.5))
    assert "accuracy 25.0% (test 50.0%), 4 batches a step, eigenvalue -2.5, " in full


def test_the_share_is_that_of_epochs_or_of_time_whichever_ends_first() -> None:
    assert finished_fraction(record(epoch=3.0, seconds=9.0), 4, None) == 0.75
    assert finished_fraction(record(epoch=1.0, seconds=90.0), 4, 2.0) == 0.75
    assert finished_fraction(record(epoch=1.0, seconds=30.0), 4, 2.0) == 0.25
    assert finished_fraction(record(epoch=1.0, seconds=90.0), 4, 0.0) == 1.0


def test_bars_are_drawn_on_a_terminal_alone() -> None:
    with Bars() as progress:
        tick = bar(progress, "eigenvalues")
        tick(0.5, "3 of 6")
        (task,) = progress.tasks
    assert progress.disable
    assert (task.completed, task.fields["detail"]) == (0.5, "3 of 6")


def test_without_a_terminal_the_state_is_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Bars() as progress:
        tick = bar(progress, "eigenvalues")
        for clock[0] in (1.0, 31.0, 40.0):
            tick(0.5, "3 of 6")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eigenvalues: 50%, 3 of 6, ")
    with Bars(quiet=True) as progress:
        tick = bar(progress, "eigenvalues")
        clock[0] = 100.0
        tick(0.5, "3 of 6")
    assert capsys.readouterr().err == ""


def test_json_is_printed_alone_and_also_if_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        show(Output(["a sentence"], {"value": 1.5}), as_json=True, quiet=quiet)
        assert json.loads(capsys.readouterr().out) == {"value": 1.5}
    show(Output(["a sentence"], {"value": 1.5}), as_json=False, quiet=True)
    assert capsys.readouterr().out == ""


PARTS = ("--only", "eigenvalues,trace", "--k", "2")
ONE_EPOCH = ("--epochs", "1", "--examples", "20", "--batch-size", "10")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("analyze", "mine:quadratic", *PARTS), "results"),
        (("compare", "a", "a"), "runs"),
        (("train", *ONE_EPOCH, "--out", "b"), "runs"),
        (("eig", "--resume", "b/checkpoint.pt", "--k", "2"), "values"),
        (("plan", "--params", "7B"), "peak"),
        (("plan", "--params", "7B", "--gpu-memory", "4"), "refusal"),
    ],
)
def test_every_command_prints_json_alone(here: Path, words: tuple[str, ...], key: str) -> None:
    assert analyze("mine:quadratic", *PARTS, "--out", "a").exit_code == 0
    if words[0] == "eig":
        assert invoke("train", *ONE_EPOCH, "--out", "b").exit_code == 0
    done = invoke(*words, "--json", "--quiet")
    assert done.exit_code == (1 if key == "refusal" else 0), done.output
    assert key in json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize("columns", ["40", "60"])
def test_a_narrow_terminal_shows_every_word(here: Path, columns: str) -> None:
    assert analyze("mine:quadratic", *PARTS, "--out", "a").exit_code == 0
    for words in (("compare", "a", "a"), ("plan", "--params", "7B", "--gpu-memory", "4")):
        wide, narrow = (
            CliRunner().invoke(app, [*words], env={"COLUMNS": n}).stdout for n in ("300", columns)
        )
        assert wide.split() == narrow.split()
