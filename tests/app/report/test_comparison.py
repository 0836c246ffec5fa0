"""Two runs beside each other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hessfunc.app import report
from hessfunc.app.report import comparison
from hessfunc.training import history
from tests.app.report.cases import DENSITY, PAIRS, PARTS, RUN, SETTINGS, SUBJECT, TRAINED
from tests.app.report.documents import parsed


def analysis(path: Path, scale: float = 1.0) -> Path:
    folder = report.Folder(path, RUN, SUBJECT)
    folder.begin()
    pairs = replace(PAIRS, values=scale * PAIRS.values, vectors={"x": torch.eye(3)[:2]})
    folder.add(report.Part("eigenvalues", pairs, 1.0))
    folder.add(replace(PARTS[2]))
    folder.add(report.Part("density", DENSITY, 1.0))
    folder.add(PARTS[4])
    folder.close("complete")
    return path


def training(path: Path, **settings: object) -> Path:
    path.mkdir()
    history.write(path / "history.json", {**SETTINGS, **settings}, [TRAINED])
    return path


def printed(runs: list[comparison.Compared]) -> str:
    stream = io.StringIO()
    Console(width=120, file=stream).print(comparison.as_table(runs))
    return stream.getvalue()


def test_two_analyses(tmp_path: Path) -> None:
    runs = comparison.read([analysis(tmp_path / "a"), analysis(tmp_path / "b", 2.0)])
    text = printed(runs)
    (line,) = (line.split() for line in text.splitlines() if "eigenvalue 1" in line)
    assert line == ["eigenvalue", "1", "5", "±", "1.0e-05", "10", "±", "1.0e-05"]
    assert "Hessian" in text
    page = comparison.comparison(runs)
    document = parsed(page)
    assert [figure.attributes["id"] for figure in document.all("figure")] == ["density", "line"]
    assert [e.text for e in document.all("h1")] == ["a and b"]
    assert "principal angles between the spaces of their top eigenvectors are 0°" in page
    data, script = document.all("script")
    assert len(json.loads(data.text)["figures"]["density"]["series"]) == 2
    assert "linesChart" in script.text


def test_two_trainings(tmp_path: Path) -> None:
    runs = comparison.read([training(tmp_path / "a"), training(tmp_path / "b", lr=0.3)])
    text = printed(runs)
    assert "accuracy" in text
    (line,) = (line.split() for line in text.splitlines() if line.strip().startswith("lr "))
    assert line == ["lr", "0.1", "0.3"]
    figures = comparison.figures(runs)
    assert [figure.name for figure in figures][:2] == ["loss", "accuracy"]
    assert [line.name for line in figures[0].lines] == [
        "a, training examples",
        "b, training examples",
        "a, test examples",
        "b, test examples",
    ]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = comparison.read([training(tmp_path / "x/out"), training(tmp_path / "y/out")])
    assert [run.name for run in runs] == ["x/out", "y/out"]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    good = training(tmp_path / "good")
    with pytest.raises(ValueError, match="contains neither results.json nor history.json"):
        comparison.read([good, tmp_path])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged, or of another program"):
        comparison.read([good, tmp_path])
    with pytest.raises(ValueError, match="has an analysis: pass two folders of one command"):
        comparison.read([good, analysis(tmp_path / "a")])
