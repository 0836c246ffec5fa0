"""Points as one result."""

from __future__ import annotations

from pathlib import Path

import pytest

from hessfunc.tracking import Point, Points, read
from hessfunc.tracking.writers import json_lines

POINTS = Points(
    Point(loss=1.0, step=s, top=(2.0 * s,), top_residuals=(0.1,), trace=None) for s in (1, 2)
)


def test_points_are_a_list_with_a_figure() -> None:
    assert isinstance(POINTS, list)
    assert POINTS[-1].step == 2
    assert "<svg" in POINTS._repr_html_()
    assert "4 ± 0.1" in repr(POINTS)


def test_the_table_has_a_column_for_each_eigenvalue() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = POINTS.to_pandas()
    assert table["top_1"].tolist() == [2.0, 4.0]
    assert table["top_1_residual"].tolist() == [0.1, 0.1]
    assert table["step"].tolist() == [1, 2]


def test_no_points() -> None:
    assert "points=0" in repr(Points())
    assert "<svg" not in Points()._repr_html_()


def test_points_of_a_file_are_points(tmp_path: Path) -> None:
    write = json_lines(tmp_path / "points.jsonl")
    for point in POINTS:
        write(point)
    assert read(tmp_path / "points.jsonl") == POINTS
    assert type(read(tmp_path / "points.jsonl")) is Points
