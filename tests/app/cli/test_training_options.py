"""Options of a training are declared once."""

import pytest

from tests.app.cli.commands import invoke

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
