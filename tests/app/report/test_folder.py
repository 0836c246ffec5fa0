import json
from pathlib import Path
from typing import Any

import pytest

import hessfunc as hf
from hessfunc import plot
from hessfunc.app import report
from hessfunc.app.report.folder import picture
from tests.app.report.cases import LINE, PARTS, RUN, SUBJECT, TRACE

pytest.importorskip("matplotlib")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_folder_has_each_part_as_soon_as_it_is_finished(tmp_path: Path) -> None:
    folder = report.Folder(tmp_path / "new" / "folder", RUN)
    folder.begin()
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


def test_the_first_part_takes_the_place_of_an_earlier_analysis(tmp_path: Path) -> None:
    earlier = report.Folder(tmp_path, RUN, SUBJECT)
    for part in PARTS:
        earlier.add(part)
    others = ["notes.txt", "trace.png", "curves.npz"]
    for name in others:
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)

    unfinished = report.Folder(tmp_path, RUN, SUBJECT)
    unfinished.begin()
    unfinished.close("failed")
    assert names(tmp_path) == before
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "running"

    folder = report.Folder(tmp_path, RUN, SUBJECT)
    folder.begin()
    folder.add(report.Part("line", LINE, 0.5))
    assert names(tmp_path) == sorted(
        [*others, "line.npz", "line.png", "report.html", "results.json"]
    )


@pytest.mark.parametrize("text", ["{}", "[1]", "not JSON", '{"results": {"trace": 1}}'])
def test_results_of_something_else_are_not_overwritten(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="contains a results.json that no analysis has written"):
        report.Folder(tmp_path, RUN).begin()
    (tmp_path / "results.json").rename(tmp_path / "density.png")
    with pytest.raises(ValueError, match="contains a density.png that no analysis has written"):
        report.Folder(tmp_path, RUN).begin()


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


def test_all_eigenvalues_that_were_found_are_marked_in_the_density(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    density = plot.density

    def noted(*args: Any, **options: Any) -> Any:
        drawn.append(density(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(plot, "density", noted)
    found = next(part for part in PARTS if part.name == "density")
    assert picture(found, PARTS[:3]).startswith(b"\x89PNG")
    sticks = [float(segment[0][0]) for segment in drawn[0].collections[-1].get_segments()]
    assert sticks == [5.0, -2.5, -2.5]


def test_numbers_alone_have_no_picture() -> None:
    assert all(picture(part, []) is None for part in PARTS[:3])
