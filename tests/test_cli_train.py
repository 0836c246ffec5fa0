import json
import signal
from pathlib import Path

import pytest

from tests.datapath import DATA, data_file

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from typer.testing import CliRunner, Result

from hessfunc.cli import app
from hessfunc.training import runs as training
from hessfunc.training.loop import train as loop


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSFUNC_DATA", raising=False)


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


def experiment(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["experiment", *arguments])


def history(file: str = "hessfunc-train/history.json") -> dict[str, object]:
    return json.loads(Path(file).read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--optimizer", "sgd", "--momentum", "0.5"),
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
    assert done.stdout.endswith("history.json and history.png are in hessfunc-train\n")
    content = history()
    assert content["settings"]["examples"] == content["settings"]["test"] == 200
    assert content["versions"]["torch"]
    (run,) = content["runs"]
    assert run["ended"] == "complete"
    first, *_, last = run["records"]
    assert (last["step"], last["epoch"]) == (8, 2.0)
    assert last["loss"] < first["loss"]
    assert {file.name for file in Path("hessfunc-train").iterdir()} == {
        "history.json",
        "history.png",
    }


def test_the_seed_repeats_a_training() -> None:
    found = []
    for seed in ("1", "1", "2"):
        train("--optimizer", "sgd", "--epochs", "1", "--examples", "100", "--seed", seed)
        found.append(history()["runs"][0]["records"][-1]["loss"])
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
    assert len(run["records"]) >= 1


def test_ctrl_c_leaves_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> object:
        records = loop(*args, **options)
        yield next(records)
        yield next(records)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "train", interrupted)
    stopped = train("--optimizer", "sgd", "--examples", "100")
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted; what is finished is in hessfunc-train\n")
    (run,) = history()["runs"]
    assert run["ended"] == "interrupted"
    assert len(run["records"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "abacus"], "--data is digits or cifar10, not 'abacus'"),
        (["--data-path", "x"], "--data-path goes with --data cifar10 alone"),
        (["--data", "cifar10"], "set HESSFUNC_DATA"),
        (["--arch", "c4d3"], "there is no 'c4d3' for digits: choose mlp, convnet"),
        (["--optimizer", "adam"], "--optimizer is sgd or newton, not 'adam'"),
        (["--optimizer", "sgd", "--alpha", "0.1"], "--alpha goes with --optimizer newton alone"),
        (["--optimizer", "sgd", "--cg-max", "3"], "--cg-max goes with --optimizer newton alone"),
        (["--momentum", "0.9"], "--momentum goes with --optimizer sgd alone"),
        (["--curvature", "none"], "choose one of hbp-none"),
        (["--curvature", "ggn", "--max-blocks", "2"], "goes with hbp alone"),
        (["--curvature", "ggn", "--solve", "direct"], "solve by cg"),
        (["--lr", "0"], "lr=0.0: it must be positive"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--out", "file"], "--out file cannot be used: File exists"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    Path("file").touch()
    refused = train(*arguments, "--examples", "20", "--epochs", "1")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("hessfunc: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr


def test_an_unknown_experiment_is_refused() -> None:
    refused = experiment("exp99")
    assert refused.exit_code == 2
    assert refused.stderr == "hessfunc: NAME is exp01, exp02, exp08 or exp09, not 'exp99'\n"
    assert "set HESSFUNC_DATA" in experiment("exp01").stderr


@pytest.mark.parametrize("command", ["train", "experiment"])
def test_help_names_options(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).stdout
    for word in ("--epochs", "--examples", "--minutes", "--data-path", "--out", "--device"):
        assert word in text


@pytest.mark.slow
def test_an_experiment_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    data_file("cifar10")
    arguments = (
        *("exp08", "--epochs", "1", "--examples", "20", "--batch-size", "10"),
        *("--data-path", str(DATA), "--out", "found"),
    )
    left = [2]

    def interrupted(*args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            signal.raise_signal(signal.SIGINT)
        return loop(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train", interrupted)
        stopped = experiment(*arguments)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted; 2 trainings finished, see found\n")
    before = history("found/results.json")["runs"]
    assert [run["method"] for run in before] == ["SGD", "PCH zero"]
    done = experiment(*arguments)
    assert done.exit_code == 0, done.output
    after = history("found/results.json")["runs"]
    assert after[:2] == before
    assert [run["method"] for run in after[2:]] == ["PCH abs", "PCH clip"]
    assert {run["ended"] for run in after} == {"complete"}
    starts = {run["records"][0]["loss"] for run in after}
    assert len(starts) == 1
    assert Path("found/results.md").read_text().count("\n| ") == 6
    assert Path("found/curves.png").exists()
    assert "PCH clip" in done.stdout
    other = experiment(*arguments, "--minutes", "3")
    assert other.exit_code == 2
    assert "minutes was None and is 3.0 now: take another --out" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp01", "exp02", "exp09"])
def test_experiments_run(name: str) -> None:
    data_file("cifar10")
    done = experiment(
        *(name, "--epochs", "1", "--examples", "10", "--data-path", str(DATA), "--minutes", "0.05")
    )
    assert done.exit_code == 0, done.output
    runs = history(f"{name}/results.json")["runs"]
    assert {run["ended"] for run in runs} <= {"complete", "time is up"}
