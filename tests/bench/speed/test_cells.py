from __future__ import annotations

from pathlib import Path

from bench.interleaved import Ratio
from bench.speed.cells import Cell, Line, Row, read, write


def test_what_is_written_is_read(tmp_path: Path) -> None:
    half = Ratio(0.5, 0.4, 0.6)
    cell = Cell(
        "a net",
        {"torch": "2"},
        seconds=3.0,
        rounds=5,
        floor=2.0,
        tolerance=1e-2,
        rows={"ours": Row("ours", half, {}, 1e-7), "theirs": Row("peer", half, {"ours": half})},
        lines=[Line("a line", [1.0, 2.0], [3.0, 4.0])],
        units=("vectors", "seconds"),
        gaps={"another": "not installed"},
    )
    write(tmp_path, "block/net", cell)
    write(tmp_path, "block/other", Cell("other", absent="no data"))
    assert read(tmp_path) == {"block/net": cell, "block/other": Cell("other", absent="no data")}


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    assert read(tmp_path / "cells") == {}


def test_a_cell_that_was_cut_short_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "net.part").write_text('{"title": "a n')
    assert read(tmp_path) == {}
