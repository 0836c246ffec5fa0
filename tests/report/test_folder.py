import json
from pathlib import Path

import pytest

import hessfunc as hf
from hessfunc import report
from tests.report.cases import LINE, PARTS, RUN, SUBJECT, TRACE

pytest.importorskip("matplotlib")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_folder_has_each_part_as_soon_as_it_is_finished(tmp_path: Path) -> None:
    folder = report.Folder(tmp_path / "new" / "folder", RUN)
    folder.clear()
    folder.subject = SUBJECT
    folder.add(report.Part("trace", TRACE, 0.5))
    assert names(folder.path) == ["report.html", "results.json", "trace.npz"]
    content = json.loads((folder.path / "results.json").read_text())
    assert content["status"] == "running"
    assert content["subject"]["parameters"] == 12345
    assert list(content["results"]) == ["trace"]
    assert hf.load(folder.path / "trace.npz").value == 4.0

    folder.add(report.Part("line", LINE, 0.5))
    folder.close("complete")
    assert (folder.path / "line.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder.path / "results.json").read_text())["status"] == "complete"
    assert ">complete<" in (folder.path / "report.html").read_text()

    (folder.path / "notes.txt").touch()
    folder.clear()
    assert names(folder.path) == ["notes.txt"]


def test_every_part_is_written_and_every_figure_has_a_picture(tmp_path: Path) -> None:
    folder = report.Folder(tmp_path, RUN, SUBJECT)
    for part in PARTS:
        folder.add(part)
    results = {f"{name}.npz" for name in report.NAMES}
    pictures = {"density.png", "line.png", "plane.png"}
    assert set(names(tmp_path)) == {"report.html", "results.json"} | results | pictures
    assert set(folder.pictures) == {"density", "line", "plane"}


def test_nothing_is_written_of_an_analysis_that_has_not_begun(tmp_path: Path) -> None:
    report.Folder(tmp_path, RUN).close("failed")
    assert not list(tmp_path.iterdir())
