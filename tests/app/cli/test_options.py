"""Declared options: help, numbers, and completion."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import hessfunc as hf
from hessfunc.app.cli import app
from hessfunc.app.cli.options import number, one_of
from tests.app.cli.commands import invoke


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


@pytest.mark.parametrize(
    ("text", "value"),
    [("7B", 7e9), ("1e9", 1e9), ("350M", 350e6), ("2.5k", 2500), ("1,000", 1000), ("1_0", 10)],
)
def test_numbers_are_written_as_people_write_them(text: str, value: float) -> None:
    assert number(text, whole=False) == value
    assert number(text, whole=True) == value
    assert isinstance(number(text, whole=True), int)
    assert number(value, whole=False) == value


@pytest.mark.parametrize(
    ("limits", "text", "message"),
    [
        ({"whole": True, "min": 1}, "0.5", "a whole number of at least 1, such as 1000, 1k or 7B"),
        ({"whole": False, "above": 0}, "0", "a number above 0, such as 0.5 or 1e-3, not '0'"),
        ({"whole": False, "above": 0, "max": 1}, "2", "a number above 0, at most 1, not '2'"),
        ({"whole": False, "min": 0, "max": 1}, "2", "a number from 0 to 1, not '2'"),
        ({"whole": False}, "seven", "a number, such as"),
    ],
)
def test_other_numbers_are_refused(limits: dict[str, float], text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"^must be {message}"):
        number(text, **limits)


def test_a_choice_has_a_short_name() -> None:
    choices = {"bfloat16": "bf16", "float32": "fp32"}
    assert one_of(choices, "bf16") == one_of(choices, "bfloat16") == "bfloat16"
    with pytest.raises(typer.BadParameter, match=r"one of bfloat16 \(bf16\), float32 \(fp32\), "):
        one_of(choices, "int8")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("hessfunc an", ["analyze"]),
        ("hessfunc analyze --curvature ", ["hessian", "ggn", "fisher", "efisher"]),
        ("hessfunc train --curvature hbp-a", ["hbp-abs"]),
    ],
)
def test_shells_complete_commands_and_choices(words: str, completed: list[str]) -> None:
    shell = {
        "_HESSFUNC_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = CliRunner().invoke(app, [], prog_name="hessfunc", env=shell)
    assert done.stdout.split() == completed
    assert "--install-completion" in invoke("--help").stdout
