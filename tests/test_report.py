import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.results import Density, Eigenpairs, Estimate

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from hessfunc import report

COST = {"matvecs": 1234, "passes": 12, "reason": "converged", "seed": 7}

PAIRS = Eigenpairs(
    values=torch.tensor([5.0, -2.5], dtype=torch.float64),
    vectors={"x": torch.eye(2, 3)},
    residuals=torch.tensor([1e-5, 0.25], dtype=torch.float64),
    converged=torch.tensor([True, False]),
    largest=5.0,
    **COST,
)
SMALLEST = replace(
    PAIRS, values=PAIRS.values[1:], residuals=PAIRS.residuals[:1], converged=PAIRS.converged[:1]
)
TRACE = Estimate(
    value=4.0,
    stderr=0.5,
    degrees=1,
    samples=torch.tensor([3.5, 4.5], dtype=torch.float64),
    by_leaf={"x": 4.0},
    **COST,
)
DENSITY = Density(
    nodes=torch.tensor([[-2.5, 0.0, 5.0]], dtype=torch.float64),
    weights=torch.full((1, 3), 1 / 3, dtype=torch.float64),
    n=3,
    **COST,
)
SUBJECT = report.Subject("it", 12345, 100, 2, 0.5, "float32", "cpu")


def printed(*parts: report.Part) -> str:
    stream = io.StringIO()
    Console(width=80, file=stream).print(report.table(parts))
    return stream.getvalue()


def test_the_table_has_every_number_in_80_columns() -> None:
    text = printed(
        report.Part("eigenvalues", PAIRS, 1.25),
        report.Part("smallest", SMALLEST, 61.0),
        report.Part("trace", TRACE, 0.0),
        report.Part("density", DENSITY, 0.0),
    )
    first, second = (line.split() for line in text.splitlines() if "eigenvalue" in line)
    assert first == ["eigenvalue", "1", "5", "1.0e-05", "1,234", "1.2", "s"]
    assert second == ["eigenvalue", "2", "-2.5", "2.5e-01", "(not", "converged)"]
    assert "1 x 3 nodes" in text
    assert "-2.353 to 10.35" in text
    assert "…" not in text


def test_json_is_strict_and_without_large_arrays() -> None:
    unsure = replace(TRACE, stderr=float("nan"))
    content = [
        report.as_json(report.Part(name, result, 0.5))
        for name, result in (("eigenvalues", PAIRS), ("trace", unsure), ("density", DENSITY))
    ]
    pairs, trace, density = json.loads(json.dumps(content, allow_nan=False))
    assert pairs["values"] == [5.0, -2.5]
    assert pairs["converged"] == [True, False]
    assert "vectors" not in pairs
    assert trace["stderr"] is None
    assert trace["interval_95"] == [None, None]
    assert trace["by_leaf"] == {"x": 4.0}
    assert (density["probes"], density["steps"]) == (1, 3)
    assert {c["matvecs"] for c in (pairs, trace, density)} == {1234}


def test_a_folder_has_each_part_as_soon_as_it_is_finished(tmp_path: Path) -> None:
    folder = report.Folder(tmp_path / "new" / "folder")
    folder.clear()
    folder.subject = SUBJECT
    folder.add(report.Part("trace", TRACE, 0.5))
    assert sorted(file.name for file in folder.path.iterdir()) == ["results.json", "trace.npz"]
    content = json.loads((folder.path / "results.json").read_text())
    assert content["status"] == "running"
    assert content["subject"]["parameters"] == 12345
    assert list(content["results"]) == ["trace"]
    assert hf.load(folder.path / "trace.npz").value == 4.0

    folder.add(report.Part("density", DENSITY, 0.5))
    folder.close("complete")
    assert (folder.path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder.path / "results.json").read_text())["status"] == "complete"

    (folder.path / "notes.txt").touch()
    folder.clear()
    assert [file.name for file in folder.path.iterdir()] == ["notes.txt"]


def test_nothing_is_written_of_an_analysis_that_has_not_begun(tmp_path: Path) -> None:
    report.Folder(tmp_path).close("failed")
    assert not list(tmp_path.iterdir())


def test_brief_and_headline_are_one_line() -> None:
    assert report.brief(PAIRS) == "5, 1 of 2 converged"
    assert report.brief(TRACE) == "4 ± 0.5"
    assert report.headline(SUBJECT) == (
        "it: loss 0.5 over 100 examples, 12,345 parameters, float32 on cpu"
    )
