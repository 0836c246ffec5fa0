"""The command ``hessfunc experiment``."""

import json
import signal
from pathlib import Path

import pytest

from hessfunc.training import runs as training
from hessfunc.training.loop import train as loop
from tests.app.cli.commands import experiment, history
from tests.datapath import DATA, data_file


def test_an_unknown_experiment_is_refused() -> None:
    refused = experiment("exp99")
    assert refused.exit_code == 2
    assert (
        refused.stderr == "hessfunc: NAME must be one of exp01, exp02, exp08, exp09, not 'exp99'\n"
    )
    assert "set HESSFUNC_DATA" in experiment("exp01").stderr


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
    assert stopped.stderr.endswith("interrupted; 2 finished training runs are in found\n")
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
    assert "minutes was None and is now 3.0): pass another --out" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp01", "exp02", "exp09"])
def test_experiments_run(name: str) -> None:
    data_file("cifar10")
    done = experiment(
        *(name, "--epochs", "1", "--examples", "10", "--data-path", str(DATA), "--minutes", "0.05"),
        "--json",
    )
    assert done.exit_code == 0, done.output
    runs = history(f"{name}/results.json")["runs"]
    assert json.loads(done.stdout)["runs"] == runs
    assert {run["ended"] for run in runs} <= {"complete", "time is up"}
