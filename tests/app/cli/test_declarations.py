"""Options of all commands, and their mistakes."""

import inspect
from collections.abc import Iterator

import pytest
from typer.main import get_command

from hessfunc.app.analysis import CURVATURES as ANALYSED
from hessfunc.app.cli import app
from hessfunc.app.cli.declarations import BLOCKS, DATASETS, EXPERIMENTS, MATRICES, OPTIONS, PARTS
from hessfunc.app.experiments import EXPERIMENTS as PUBLISHED
from hessfunc.app.report import NAMES
from hessfunc.training.methods import CURVATURES
from tests.app.cli.commands import invoke

COMMANDS = get_command(app).commands

_SHARED = ("--examples", "--data-path", "--device")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ("--epochs", "--minutes", "--out", "--method", "--large-ratio", "--track")),
        ("experiment", ("--epochs", "--minutes", "--out")),
        ("eig", ("--resume", "--type", "--arch")),
    ],
)
def test_help_names_options(command: str, words: tuple[str, ...]) -> None:
    text = invoke(command, "--help").stdout
    for word in (*words, *_SHARED):
        assert word in text


def test_the_table_declares_exactly_the_parameters_of_the_commands() -> None:
    for name, command in COMMANDS.items():
        parameters = set(inspect.signature(command.callback).parameters) - {"context"}
        assert parameters <= set(OPTIONS[name])
        shared = set.intersection(*(set(table) for table in OPTIONS.values()))
        assert set(OPTIONS[name]) - shared <= parameters


def test_choices_are_those_of_the_modules_that_use_them() -> None:
    assert PARTS == NAMES
    assert set(MATRICES) == set(ANALYSED)
    assert set(BLOCKS) == set(CURVATURES)
    assert set(EXPERIMENTS) == set(PUBLISHED)
    assert DATASETS[0] == "digits"


def options(kind: str) -> Iterator[tuple[str, str, str]]:
    """Yield each option whose value is a number (N, X or a unit) or a choice (NAME)."""
    for name, command in COMMANDS.items():
        for parameter in command.params:
            metavar = parameter.metavar or ""
            if parameter.param_type_name == "option" and metavar.split(" ")[0] in kind.split():
                yield name, max(parameter.opts, key=len), metavar


def refused(command: str, flag: str, value: str) -> str:
    arguments = ["exp01"] if command == "experiment" else []
    arguments += ["--resume", "x"] if command == "eig" and flag != "--resume" else []
    done = invoke(command, *arguments, f"{flag}={value}")
    assert done.exit_code == 2, (command, flag, value)
    assert done.stdout == ""
    assert done.stderr.startswith(f"hessfunc: {flag} must be "), done.stderr
    assert done.stderr.endswith(f", not {value!r}\n")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(("command", "flag", "metavar"), list(options("N X GiB GiB/s us")))
def test_a_bad_number_is_refused_in_one_style(command: str, flag: str, metavar: str) -> None:
    for value in ("many", "nan", "inf", "", "-1"):
        assert " number " in refused(command, flag, value)
    if metavar.startswith("N"):
        assert "a whole number" in refused(command, flag, "0.5")
    assert "[>=" in metavar or "[>0" in metavar


# Devices are checked by torch, and networks with the data set.
_FREE = ("--device", "--arch")


@pytest.mark.parametrize(
    ("command", "flag"),
    [(command, flag) for command, flag, _ in options("NAME") if flag not in _FREE],
)
def test_a_bad_choice_is_refused_with_all_choices(command: str, flag: str) -> None:
    message = refused(command, flag, "abacus")
    (parameter,) = (p for p in COMMANDS[command].params if flag in p.opts)
    choices = [item.value for item in parameter.shell_complete(None, "")]
    assert len(choices) > 1
    assert all(choice in message for choice in choices)


def test_a_large_seed_is_exact() -> None:
    context = COMMANDS["train"].make_context("train", ["--seed", str(2**63 - 1)])
    assert context.params["seed"] == 2**63 - 1
    assert "2^63 - 1" in refused("train", "--seed", str(2**63))
