import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import hessfunc as hf
from hessfunc.training import runs as training
from hessfunc.training.loop import train as loop
from tests.app.cli.commands import assert_refused, history, invoke, train


@pytest.mark.parametrize(
    "arguments",
    [
        ("--optimizer", "sgd", "--momentum", "0.5", "--weight-decay", "5e-4"),
        ("--curvature", "pch-abs", "--alpha", "0.1", "--cg-max", "10"),
        ("--curvature", "hbp-clip", "--max-blocks", "2"),
        ("--curvature", "kflr", "--solve", "direct", "--alpha", "0.2"),
        ("--curvature", "ggn", "--arch", "convnet", "--cg-rtol", "0.3", "--cg-atol", "0.001"),
    ],
)
def test_training(arguments: tuple[str, ...]) -> None:
    done = train(
        *("--epochs", "2", "--batch-size", "50", "--lr", "0.3", "--examples", "200"), *arguments
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\n") == 3
    assert done.stderr.startswith("epoch 0: loss 2.")
    assert "accuracy" in done.stdout
    assert done.stdout.endswith(
        "report.html, history.json, history.png and checkpoint.pt are in hessfunc-train\n"
    )
    content = history()
    assert content["settings"]["examples"] == content["settings"]["test"] == 200
    assert content["versions"]["torch"]
    (run,) = content["runs"]
    assert run["ended"] == "complete"
    first, *_, last = run["records"]
    assert (last["step"], last["epoch"]) == (8, 2.0)
    assert last["loss"] < first["loss"]
    assert {file.name for file in Path("hessfunc-train").iterdir()} == {
        "report.html",
        "history.json",
        "history.png",
        "checkpoint.pt",
    }


def test_the_seed_repeats_a_training() -> None:
    found = []
    for seed in ("1", "1", "2"):
        options = ("--epochs", "1", "--examples", "100", "--seed", seed)
        train("--optimizer", "sgd", *options, "--out", f"seed{seed}-{len(found)}")
        file = f"seed{seed}-{len(found)}/history.json"
        found.append(history(file)["runs"][0]["records"][-1]["loss"])
    assert found[0] == found[1] != found[2]


def test_time_ends_a_training() -> None:
    done = train("--optimizer", "sgd", "--minutes", "0", "--out", "short")
    assert done.exit_code == 0, done.output
    (run,) = history("short/history.json")["runs"]
    assert run["ended"] == "time is up"
    assert run["records"][-1]["step"] == 1


def test_numbers_that_are_not_finite_are_said_and_what_was_found_stays() -> None:
    done = train("--optimizer", "sgd", "--lr", "1e38", "--examples", "200")
    assert done.exit_code == 2
    assert "lower the learning rate" in done.stderr.splitlines()[-1]
    (run,) = history()["runs"]
    assert "lower the learning rate" in run["ended"]
    page = Path("hessfunc-train/report.html").read_text()
    assert ">ended early<" in page
    assert run["ended"] in page
    assert len(run["records"]) >= 1


def test_ctrl_c_leaves_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> object:
        records = loop(*args, **options)
        yield next(records)
        yield next(records)
        signal.raise_signal(signal.SIGINT)

    def draw(*args: object, **options: object) -> None:
        others.append(train("--optimizer", "sgd", "--examples", "100"))
        drawn(*args, **options)

    others: list[Result] = []
    pictures = import_module("hessfunc.plot.trainings")
    drawn = pictures.draw
    monkeypatch.setattr(pictures, "draw", draw)
    monkeypatch.setattr(training, "train", interrupted)
    stopped = train("--optimizer", "sgd", "--examples", "100")
    assert [other.exit_code for other in others] == [2]
    assert "--out hessfunc-train: process" in others[0].stderr
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted; the finished epochs are in hessfunc-train\n")
    (run,) = history()["runs"]
    assert run["ended"] == "interrupted"
    assert ">interrupted<" in Path("hessfunc-train/report.html").read_text()
    assert len(run["records"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-path", "x"], "--data-path requires --data mnist or --data cifar10"),
        (["--data", "cifar10"], "set HESSFUNC_DATA"),
        (["--data", "cifar10", "--data-path", "none"], "no CIFAR-10 (train) at none: expected"),
        (["--data", "mnist"], "set HESSFUNC_DATA"),
        (["--data", "mnist", "--data-path", "none"], "no MNIST (train) at none: expected a folder"),
        (["--arch", "resnet21"], "the depth of a CIFAR ResNet must be 6n + 2"),
        (["--arch", "c1", "--depth", "20"], "--depth requires --arch resnet, not --arch c1"),
        (["--eps", "0.1"], "--eps requires --method absa"),
        (["--patience", "3"], "--patience requires --method absa"),
        (["--lr-decay-epoch", "soon"], "--lr-decay-epoch must be a list such as 30,60, not 'soon'"),
        (["--lr-decay-epoch", "30", "60"], "separate the epochs by commas: --lr-decay-epoch 30,60"),
        (
            ["--lr-decay-epoch", "30,60", "soon"],
            "unexpected argument 'soon': it belongs to no option",
        ),
        (
            ["--arch", "c4d3"],
            "--arch must be one of mlp, convnet, c1, resnet20 or",
        ),
        (["--optimizer", "sgd", "--alpha", "0.1"], "--alpha requires --optimizer newton"),
        (["--optimizer", "sgd", "--cg-max", "3"], "--cg-max requires --optimizer newton"),
        (
            ["--optimizer", "newton", "--momentum", "0.9"],
            "--momentum requires --optimizer sgd",
        ),
        (
            ["--curvature", "ggn", "--weight-decay", "5e-4", "--optimizer", "newton"],
            "--weight-decay requires --optimizer sgd",
        ),
        (["--curvature", "ggn", "--max-blocks", "2"], "requires an hbp curvature"),
        (["--curvature", "ggn", "--solve", "direct"], "solve by cg"),
        (["--device", "abacus"], "--device must be one of cpu, cuda"),
        (["--out", "file"], "--out file cannot be used: File exists"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    Path("file").touch()
    assert_refused(train(*arguments, "--examples", "20", "--epochs", "1"), message)


ABSA = (
    *("train", "--arch", "c1", "--method", "absa", "--large-ratio", "4", "--patience", "2"),
    *("--adversarial-share", "0.3", "--eps", "0.01", "--lr", "0.02", "--lr-decay-epoch", "3"),
    *("--epochs", "4", "--batch-size", "20", "--examples", "100", "--track", "top"),
)


def test_absa() -> None:
    done = invoke(*ABSA, "--depth", "20")
    assert "--depth requires --arch resnet" in done.stderr
    done = invoke(*ABSA)
    assert done.exit_code == 0, done.output
    assert "eigenvalue" in done.stderr
    assert "2 batches a step" in done.stderr
    assert "sgd, absa" in " ".join(done.stdout.split())
    content = history()
    assert content["settings"]["max_ratio"] == 4
    assert content["settings"]["eps"] == 0.01
    (run,) = content["runs"]
    shares = [record["adversarial_share"] for record in run["records"]]
    assert shares[:2] == [0.3, 0.3]
    assert shares[-1] == 0
    ratios = [record["ratio"] for record in run["records"]]
    assert ratios == sorted(ratios)
    assert ratios[-1] >= 2
    assert run["records"][-1]["step"] < 20
    assert all(record["eigenvalue"] is not None for record in run["records"][1:])
    last = run["records"][-1]
    shown = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert f"dominant eigenvalue {last['eigenvalue']:.4g}" in shown
    assert f"batch size {20 * last['ratio']}" in shown
    assert f"learning rate {last['lr']:.4g}" in shown
    page = Path("hessfunc-train/report.html").read_text()
    assert f'<data value="{last["eigenvalue"]}">' in page
    assert "train --arch c1 --method absa" in page


def test_a_fixed_large_batch_and_a_resnet() -> None:
    done = train(
        *("--arch", "ResNet", "--depth", "8", "--large-ratio", "3", "--track", "full"),
        *("--epochs", "1", "--batch-size", "10", "--examples", "60"),
    )
    assert done.exit_code == 0, done.output
    content = history()
    assert content["settings"]["arch"] == "resnet8"
    last = content["runs"][0]["records"][-1]
    assert (last["step"], last["ratio"]) == (2, 3)
    assert last["eigenvalue"] > 0


def timeless(file: str) -> list[dict[str, object]]:
    (run,) = history(file)["runs"]
    assert run["ended"] == "complete"
    return [{**record, "seconds": 0.0} for record in run["records"]]


KILLED = """
import os, signal, sys
import torch
from hessfunc.app.cli import main

fatal, step, count = int(sys.argv.pop(1)), torch.optim.SGD.step, 0

def counted(self, *args, **options):
    global count
    count += 1
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **options)

torch.optim.SGD.step = counted
main()
"""


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_same_bits() -> None:
    words = (*ABSA, "--save-every", "1", "--examples", "60", "--epochs", "3", "--out")
    assert invoke(*words, "whole").exit_code == 0
    # Within the second epoch of three steps.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "5", *words, "killed"],
        env=os.environ | {"PYTHONPATH": str(Path(hf.__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    assert killed.returncode == -signal.SIGKILL
    assert history("killed/history.json")["runs"][0]["ended"] == "running"
    assert invoke(*words, "killed").exit_code == 0
    assert timeless("whole/history.json") == timeless("killed/history.json")
    whole, resumed = (
        torch.load(f"{out}/checkpoint.pt", weights_only=True)["state_dict"]
        for out in ("whole", "killed")
    )
    assert all(torch.equal(leaf, resumed[name]) for name, leaf in whole.items())


def test_a_training_of_other_settings_is_refused() -> None:
    options = ("--arch", "c1", "--examples", "60", "--epochs", "2")
    assert train(*options, "--minutes", "0").exit_code == 0
    refused = train(*options, "--lr", "0.3")
    assert refused.exit_code == 2
    assert "unfinished training with other settings (lr was 0.1 and is now 0.3" in refused.stderr
    assert train(*options).exit_code == 0
    refused = train(*options, "--lr", "0.3")
    assert refused.exit_code == 2
    assert "a finished training with other settings" in refused.stderr
    assert refused.stderr.endswith("pass another --out\n")


def test_a_damaged_checkpoint_is_refused() -> None:
    Path("hessfunc-train").mkdir()
    Path("hessfunc-train/checkpoint.pt").write_bytes(b"half")
    assert_refused(train("--examples", "60", "--epochs", "1"), "checkpoint.pt is damaged")
