import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.app.problems.huggingface import language_model
from tests.app.cli.commands import analyze, assert_refused
from tests.app.problems.language_models import gpt2, saved
from tests.datapath import DATA, data_file


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "results.json").read_text())


def test_analysis_of_a_known_hessian(here: Path) -> None:
    done = analyze("mine:quadratic", "--k", "3", "--out", "found")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "mine:quadratic: Hessian of the loss 3.75 over 4 examples, 6 parameters" in done.stdout
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


@pytest.mark.parametrize(
    ("name", "make"),
    [("hessian", hf.hvp), ("ggn", hf.ggnvp), ("fisher", hf.fvp), ("efisher", hf.efvp)],
)
def test_other_matrices(here: Path, name: str, make: Any) -> None:
    done = analyze("mine:net", "--curvature", name, "--only", "eigenvalues", "--k", "2")
    assert done.exit_code == 0, done.output
    import mine

    model, criterion, (batch,) = mine.net()
    model_fn, params = hf.functional(model)
    matvec = make(hf.supervised(model_fn, criterion))(params, batch)
    expected = torch.linalg.eigvalsh(hf.matrix(matvec, params).double())
    top = expected[expected.abs().argsort(descending=True)][:2]
    content = results(here / "hessfunc-out")
    assert content["results"]["eigenvalues"]["values"] == pytest.approx(top.tolist(), rel=1e-4)
    words = {
        "hessian": "Hessian",
        "ggn": "Gauss-Newton",
        "fisher": "Fisher",
        "efisher": "empirical",
    }
    assert words[name] in content["subject"]["matrix"]
    assert words[name] in (here / "hessfunc-out" / "report.html").read_text()


def test_a_language_model_of_hugging_face(here: Path) -> None:
    folder = saved(here, gpt2())
    words = (f"hf:{folder}", "--text", "text.txt", "--sequence", "8", "--batch-size", "3")
    done = analyze(*words, "--only", "eigenvalues", "--k", "1", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    subject = content["subject"]
    assert (subject["examples"], subject["batches"]) == (12, 4)
    loss, params, (batch,) = language_model(folder, here / "text.txt", sequence=8)
    assert subject["loss"] == pytest.approx(loss(params, batch).item(), rel=1e-5)
    due = hf.lanczos(hf.hvp(loss)(params, batch), params, k=1, seed=1).values.tolist()
    assert content["results"]["eigenvalues"]["values"] == pytest.approx(due, rel=1e-3)
    assert (
        analyze(*words, "--only", "trace", "--examples", "2", "--max-matvecs", "4").exit_code == 0
    )
    assert results(here / "hessfunc-out")["subject"]["examples"] == 2


def test_parts_may_be_chosen(here: Path) -> None:
    done = analyze("mine:quadratic", "--only", "trace, eigenvalues", "--k", "1")
    assert done.exit_code == 0, done.output
    assert list(results(here / "hessfunc-out")["results"]) == ["eigenvalues", "trace"]


def test_json_is_the_only_output(here: Path) -> None:
    done = analyze("mine:quadratic", "--only", "trace", "--json")
    assert json.loads(done.stdout) == results(here / "hessfunc-out")
    assert done.stderr == ""


def test_quiet_prints_nothing(here: Path) -> None:
    done = analyze("mine:quadratic", "--only", "trace", "-q")
    assert (done.exit_code, done.output) == (0, "")
    assert results(here / "hessfunc-out")["status"] == "complete"


def test_short_names_of_dtypes(here: Path) -> None:
    done = analyze("mine:net", "--only", "trace", "--dtype", "bf16", "--examples", "1e1")
    assert done.exit_code == 0, done.output
    assert results(here / "hessfunc-out")["subject"]["dtype"] == "bfloat16"


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
        (
            ["nothing"],
            "TARGET must be one of digits, cifar10, hf:PATH, module:function, not",
        ),
        (["mine:"], "TARGET must be one of"),
        (["nowhere_to_be_found:it"], "cannot import 'nowhere_to_be_found'"),
        (["mine:missing"], "has no function 'missing'"),
        (["mine:loss"], "mine:loss must take no argument: missing a required argument: 'params'"),
        (["mine:number"], "must return (model, criterion, loader)"),
        (["mine:breaking"], "KeyError: 'y' (use --traceback for details)"),
        (["mine:quadratic", "--k", "7"], "--k 7: the matrix has 6 eigenvalues"),
        (["mine:quadratic", "--device", "abacus"], "--device must be one of cpu, cuda, mps"),
        (["mine:quadratic", "--out", "mine.py"], "--out mine.py cannot be used: File exists"),
        (["mine:quadratic", "--data", "x"], "require the target cifar10"),
        (["mine:quadratic", "--data-path", "x"], "require the target cifar10"),
        (["mine:quadratic", "--landscape", "2"], "--landscape must be 0 or at least 3"),
        (["cifar10"], "set HESSFUNC_DATA"),
        (["hf:gpt2"], "a target hf:PATH requires --text FILE"),
        (["hf:gpt2", "--text", "mine.py"], "hf:gpt2 must name a folder: download the model"),
        (["digits", "--text", "mine.py"], "--text and --sequence require a target hf:PATH"),
        (["digits", "--only", "trace,all"], "--only must be a list of eigenvalues, smallest, "),
        (["digits", "--only", "line"], "pass --only eigenvalues,line"),
        (["digits", "--colour"], "No such option: --colour"),
        (["cifar10", "--weights", "none.th"], "no weights at none.th"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    here: Path, arguments: list[str], message: str
) -> None:
    assert_refused(analyze(*arguments), message)


@pytest.mark.parametrize("target", ["nowhere_to_be_found:it", "mine:breaking", "mine:number"])
def test_a_target_that_fails_leaves_the_results_of_an_earlier_analysis(
    here: Path, target: str
) -> None:
    assert analyze("mine:quadratic", "--k", "1", "--out", "found").exit_code == 0
    before = {file.name: file.read_bytes() for file in (here / "found").iterdir()}
    assert analyze(target, "--out", "found").exit_code == 2
    assert {file.name: file.read_bytes() for file in (here / "found").iterdir()} == before


def test_help_names_targets_and_options() -> None:
    text = analyze("--help").stdout
    for word in ("digits", "cifar10", "module:function", "--examples", "--weights", "--dtype"):
        assert word in text


@pytest.mark.slow
def test_digits(here: Path) -> None:
    done = analyze("digits", "--examples", "300", "--k", "3", "--probes", "1", "--steps", "30")
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
