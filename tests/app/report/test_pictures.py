from typing import Any

import pytest

from hessfunc import plot
from hessfunc.app.report.folder import picture
from tests.app.report.cases import PARTS

pytest.importorskip("matplotlib")


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
