"""What a saved network says of itself, and what contradicts it."""

import pytest

from tests.app.cli.commands import eig, train
from tests.datapath import data_file


def test_eig_reads_from_a_checkpoint_what_is_not_given() -> None:
    train("--epochs", "1", "--arch", "resnet", "--depth", "8", "--examples", "30")
    file = "hessfunc-train/checkpoint.pt"
    told = eig("--resume", file, "--data", "digits", "--arch", "resnet8", "--examples", "30")
    assert told.exit_code == 0, told.output
    for same in ((), ("--type", "full"), ("--depth", "8"), ("--arch", "resnet", "--depth", "8")):
        assert eig("--resume", file, *same).stdout == told.stdout
    assert "10 examples" in eig("--resume", file, "--examples", "10").stdout


def test_eig_finds_the_data_where_the_training_did() -> None:
    file = data_file("mnist")
    train("--data", "mnist", "--data-path", str(file), "--epochs", "1", "--examples", "20")
    done = eig("--resume", "hessfunc-train/checkpoint.pt", "--max-matvecs", "3")
    assert done.exit_code == 0, done.output
    elsewhere = eig("--resume", "hessfunc-train/checkpoint.pt", "--data-path", "none")
    assert "no MNIST (train) at none" in elsewhere.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--arch", "c1"], "was trained with --arch mlp, not c1: omit --arch"),
        (["--depth", "8"], "was trained with --arch mlp, not resnet8: omit --arch"),
        (["--data", "mnist"], "was trained with --data digits, not mnist: omit --data"),
    ],
)
def test_options_that_contradict_a_checkpoint_are_refused(option: list[str], message: str) -> None:
    train("--epochs", "1", "--examples", "20", "--minutes", "0")
    refused = eig("--resume", "hessfunc-train/checkpoint.pt", *option)
    assert refused.exit_code == 2
    assert refused.stderr == f"hessfunc: hessfunc-train/checkpoint.pt {message}\n"
