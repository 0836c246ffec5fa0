import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hessfunc as hf
from hessfunc.app.cli.options import held
from tests.datapath import DATA, data_file

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from hessfunc.app.cli import app

# The Hessian of x'Dx / 2 is D, on every batch.
QUADRATIC = """
import signal
from pathlib import Path
import torch

D = torch.tensor([5.0, 3.0, 1.0, 0.5, -2.0, 0.0])

def loss(params, batch):
    return (params["x"].square() * D).sum() / 2 + 0 * batch.sum()

def quadratic():
    return loss, {"x": torch.ones(6)}, [torch.zeros(3, 1), torch.zeros(1, 1)]

def interrupted():
    def until_ctrl_c(params, batch):
        if Path("hessfunc-out/smallest.npz").exists():
            signal.raise_signal(signal.SIGINT)
        return loss(params, batch)
    return until_ctrl_c, {"x": torch.ones(6)}, [torch.zeros(3, 1)]

def breaking():
    def until_broken(params, batch):
        return params["y"]
    return until_broken, {"x": torch.ones(6)}, [torch.zeros(3, 1)]

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module above in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("HESSFUNC_DATA", raising=False)
    (tmp_path / "mine.py").write_text(QUADRATIC)
    return tmp_path


def analyze(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["analyze", *arguments])


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "results.json").read_text())


def test_analysis_of_a_known_hessian(here: Path) -> None:
    done = analyze("mine:quadratic", "--k", "3", "--out", "found")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "mine:quadratic: loss 3.75 over 4 examples, 6 parameters" in done.stdout
    content = results(here / "found")
    assert content["status"] == "complete"
    assert content["subject"]["batches"] == 2
    found = content["results"]
    assert found["eigenvalues"]["values"] == pytest.approx([5, 3, -2], rel=1e-5)
    assert found["smallest"]["values"] == pytest.approx([-2], rel=1e-5)
    # D is diagonal, so every probe of signs gives the trace.
    assert found["trace"]["value"] == pytest.approx(7.5, rel=1e-5)
    assert found["density"]["n"] == 6
    # The loss is x'Dx / 2 at the ones, so along the first unit vector it is 3.75 + 5 (s + s^2 / 2).
    assert found["line"]["x"][0] == -0.5
    assert min(found["line"]["values"]) == pytest.approx(3.75 - 1.875, rel=1e-5)
    assert len(found["plane"]["values"]) == len(found["plane"]["values"][0]) == 15
    names = {file.name for file in (here / "found").iterdir()}
    assert {f"{part}.npz" for part in found} <= names
    assert {"report.html", "density.png", "line.png", "plane.png"} <= names
    pairs = hf.load(here / "found" / "eigenvalues.npz")
    assert pairs.vectors["x"].shape == (3, 6)


def test_dtype_examples_and_batch_size(here: Path) -> None:
    done = analyze(
        *("mine:quadratic", "--k", "1", "--probes", "1", "--steps", "3"),
        *("--dtype", "float64", "--device", "cpu", "--examples", "3", "--batch-size", "2"),
    )
    assert done.exit_code == 0, done.output
    content = results(here / "hessfunc-out")
    subject = content["subject"]
    assert (subject["dtype"], subject["examples"], subject["batches"]) == ("float64", 3, 2)
    assert content["run"]["command"].endswith(
        "analyze mine:quadratic --k 1 --probes 1 --steps 3 --examples 3 --batch-size 2 "
        "--device cpu --dtype float64"
    )


def test_landscapes_reach_as_far_as_they_are_told(here: Path) -> None:
    done = analyze("mine:quadratic", "--k", "1", "--landscape", "5", "--radius", "2")
    assert done.exit_code == 0, done.output
    found = results(here / "hessfunc-out")["results"]
    assert found["line"]["x"] == [-2, -1, 0, 1, 2]
    assert "plane" not in found
    assert analyze("mine:quadratic", "--k", "2", "--landscape", "0").exit_code == 0
    found = results(here / "hessfunc-out")["results"]
    assert list(found) == ["eigenvalues", "smallest", "trace", "density"]
    assert not (here / "hessfunc-out" / "line.png").exists()


def test_the_seed_repeats_the_results(here: Path) -> None:
    found = []
    for seed in ("1", "1", "2"):
        analyze("mine:quadratic", "--k", "1", "--steps", "2", "--probes", "1", "--seed", seed)
        found.append(hf.load(here / "hessfunc-out" / "density.npz").nodes)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_killed_analysis_goes_on_from_its_checkpoint(here: Path) -> None:
    arguments = ("mine:quadratic", "--k", "2", "--steps", "4", "--checkpoint", "state")
    assert analyze(*arguments).exit_code == 0
    first = results(here / "hessfunc-out")["results"]
    # So small a trace is exact, and needs no state; landscapes take few evaluations.
    kept = {"eigenvalues", "smallest", "density"}
    assert {folder.name for folder in (here / "state").iterdir()} == kept
    assert analyze(*arguments).exit_code == 0
    again = results(here / "hessfunc-out")["results"]
    for part in first:
        first[part].pop("seconds", None)
        again[part].pop("seconds", None)
    assert again == first
    other = analyze("mine:quadratic", "--k", "3", "--steps", "4", "--checkpoint", "state")
    assert other.exit_code == 2
    assert "k was 2 and is 3 now" in other.stderr


def test_ctrl_c_leaves_what_is_finished(here: Path) -> None:
    stopped = analyze("mine:interrupted", "--k", "2")
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    assert stopped.stderr == (
        "hessfunc: interrupted; finished parts in hessfunc-out: eigenvalues, smallest\n"
    )
    content = results(here / "hessfunc-out")
    assert content["status"] == "interrupted"
    assert list(content["results"]) == ["eigenvalues", "smallest"]
    assert {file.name for file in (here / "hessfunc-out").iterdir()} == {
        "report.html",
        "results.json",
        "eigenvalues.npz",
        "smallest.npz",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "TARGET must be digits, cifar10 or module:function, not 'nothing'"),
        (["mine:"], "TARGET must be digits"),
        (["nowhere_to_be_found:it"], "cannot import 'nowhere_to_be_found'"),
        (["mine:missing"], "has no function 'missing'"),
        (["mine:number"], "must return (model, criterion, loader)"),
        (["mine:breaking"], "KeyError: 'y' (use --traceback for details)"),
        (["mine:quadratic", "--k", "7"], "the matrix has 6 eigenvalues"),
        (["mine:quadratic", "--device", "abacus"], "--device abacus cannot be used: "),
        (["mine:quadratic", "--out", "mine.py"], "--out mine.py cannot be used: File exists"),
        (["mine:quadratic", "--data", "x"], "require the target cifar10"),
        (["mine:quadratic", "--data-path", "x"], "require the target cifar10"),
        (["mine:quadratic", "--landscape", "2"], "--landscape must be 0 or at least 3"),
        (["mine:quadratic", "--radius", "-1"], "--radius positive and finite"),
        (["mine:quadratic", "--seed", "1" + 20 * "0"], "--seed must be an integer from 0 to 2^63"),
        (["cifar10"], "set HESSFUNC_DATA"),
        (["cifar10", "--weights", "none.th"], "no weights at none.th"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    here: Path, arguments: list[str], message: str
) -> None:
    refused = analyze(*arguments)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("hessfunc: ")
    assert refused.stderr.count("\n") == 1
    assert message in refused.stderr


@pytest.mark.parametrize("target", ["nowhere_to_be_found:it", "mine:breaking", "mine:number"])
def test_a_target_that_fails_leaves_the_results_of_an_earlier_analysis(
    here: Path, target: str
) -> None:
    assert analyze("mine:quadratic", "--k", "1", "--out", "found").exit_code == 0
    before = {file.name: file.read_bytes() for file in (here / "found").iterdir()}
    assert analyze(target, "--out", "found").exit_code == 2
    assert {file.name: file.read_bytes() for file in (here / "found").iterdir()} == before


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
    text = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100"}).stdout
    assert "--help" in text
    assert "<bool>" not in text
    assert "[default: (" not in text


def test_help_names_targets_and_options() -> None:
    text = CliRunner().invoke(app, ["analyze", "--help"], env={"COLUMNS": "100"}).stdout
    for word in ("digits", "cifar10", "module:function", "--examples", "--weights", "--dtype"):
        assert word in text


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"hessfunc {hf.__version__}\n"


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import hessfunc.app.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "hessfunc: the command line requires typer: pip install 'hessfunc[cli]'\n"
    )


@pytest.mark.slow
def test_digits(here: Path) -> None:
    pytest.importorskip("sklearn")
    done = analyze("digits", "--k", "3", "--probes", "1", "--steps", "30")
    assert done.exit_code == 0, done.output
    found = results(here / "hessfunc-out")["results"]
    assert all(found["eigenvalues"]["converged"])
    assert found["smallest"]["values"][0] < 0 < found["eigenvalues"]["values"][0]
    low, high = found["trace"]["interval_95"]
    assert 0 < low < found["trace"]["value"] < high


@pytest.mark.slow
def test_cifar10(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_file("cifar10")
    weights = data_file("resnet20_cifar10/resnet20-12fca82f.th")
    done = analyze(
        *("cifar10", "--data", str(DATA), "--weights", str(weights), "--examples", "20"),
        *("--k", "1", "--probes", "1", "--steps", "4", "--max-matvecs", "12"),
    )
    assert done.exit_code == 0, done.output
    subject = results(here / "hessfunc-out")["subject"]
    assert (subject["parameters"], subject["examples"]) == (269_722, 20)


def test_help_does_not_load_torch() -> None:
    code = "import sys, hessfunc.app.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
