"""Mistakes and failures, each on one line."""

import io
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hessfunc.app import cli
from tests.app.cli.commands import analyze, assert_refused, invoke


def test_traceback_shows_where(here: Path) -> None:
    assert isinstance(analyze("mine:breaking", "--traceback").exception, KeyError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["analyse"],
            "No such command 'analyse': choose one of analyze, compare, eig, experiment, plan, ",
        ),
        (["analyze", "--color", "red"], "No such option: --color"),
        (["eig"], "Missing option '--resume'"),
        (["eig", "--k", "0"], "--k must be a whole number of at least 1, "),
        (["train", "--epochs", "ten"], "--epochs must be a whole number of at least 1, "),
    ],
)
def test_every_mistake_is_one_line(arguments: list[str], message: str) -> None:
    assert_refused(invoke(*arguments), message)


def test_an_argument_of_the_library_is_shown_as_the_option(here: Path) -> None:
    refused = analyze("mine:quadratic", "--k", "7")
    assert refused.stderr.startswith("hessfunc: --k 7: the matrix has 6 eigenvalues")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("hessfunc.app.cli.plan"), "judged", interrupted)
    stopped = invoke("plan", "--params", "7B")
    assert (stopped.exit_code, stopped.stderr) == (130, "hessfunc: interrupted\n")


def test_what_a_terminal_cannot_show_is_shown_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli, "app", lambda: print("in é", flush=True))
    cli.main()
    assert written.getvalue() == b"in \\xe9\n"
