"""Page, table and figures of a tracked training."""

import io
import json
from dataclasses import replace

from rich.console import Console

from hessfunc.app.report.tracked import as_table, edge_of, figures, picture, rows, tracking
from hessfunc.tracking import Point
from tests.app.report.documents import parsed

FIRST = Point(
    step=0,
    loss=2.0,
    top=(4.0, 3.0),
    top_residuals=(0.5, 0.25),
    trace=9.0,
    trace_stderr=0.125,
    lr=0.5,
    edge=4.0,
    optimizer="SGD",
    matvecs=10,
)
LAST = replace(FIRST, step=1200, loss=1.0, top=(5.0, 3.5), matvecs=7)
CONTENT = {
    "status": "complete",
    "run": {"command": "hessfunc track <mine>:training", "seed": 0, "began": "now"},
    "settings": {"target": "<mine>:training", "every": 1200, "critical": False},
    "versions": {"torch": "2"},
}


def test_the_page_has_each_quantity_with_its_error() -> None:
    text = tracking([FIRST, LAST], CONTENT, b"\x89PNG")
    document = parsed(text)
    assert [e.text for e in document.all("dt")][:5] == [
        "loss",
        "largest eigenvalue",
        "largest eigenvalue 2",
        "trace",
        "edge of stability",
    ]
    names = [figure.attributes["id"] for figure in document.all("figure")]
    assert names == ["loss", "top", "trace"]
    written = {json.loads(str(e.attributes["value"])) for e in document.all("data")}
    assert {1200, 1.0, 5.0, 3.5, 9.0, 0.125, 17} <= written
    assert "<mine>" not in text


def test_the_edge_is_drawn_where_it_is_near() -> None:
    def lines(*points: Point) -> list[str]:
        (figure,) = (figure for figure in figures([(points, "")]) if figure.name == "top")
        return [line.name for line in figure.lines]

    assert lines(FIRST, LAST) == ["eigenvalue 1", "eigenvalue 2", "edge of stability"]
    assert lines(replace(FIRST, edge=400.0)) == ["eigenvalue 1", "eigenvalue 2"]
    assert edge_of(replace(FIRST, edge=None)) is None
    # Without a known optimiser, the edge is that of plain gradient descent.
    assert edge_of(replace(FIRST, edge=None, optimizer=None)) == 4.0


def test_two_runs_are_drawn_over_each_other() -> None:
    drawn = {figure.name: figure for figure in figures([([FIRST, LAST], "a"), ([FIRST], "b")])}
    assert [line.name for line in drawn["trace"].lines] == ["a, trace", "b, trace"]
    assert [line.run for line in drawn["trace"].lines] == [0, 1]


def test_the_table_of_a_terminal_has_the_first_and_the_last_point() -> None:
    points = [replace(FIRST, step=step) for step in range(100)]
    stream = io.StringIO()
    Console(file=stream, width=100).print(as_table(points))
    steps = [line.split()[0] for line in stream.getvalue().splitlines()[3:] if line.strip()]
    assert (steps[0], steps[-1], len(steps)) == ("0", "99", 12)


def test_a_loss_that_is_not_finite_has_a_row_and_a_picture() -> None:
    broken = Point(step=5, loss=None)
    assert [row.label for row in rows([broken])] == ["loss"]
    assert picture([Point(step=0, loss=1.0), broken]).startswith(b"\x89PNG")
    assert "unknown" in tracking([broken], CONTENT, b"")
