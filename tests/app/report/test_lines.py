"""Figures of lines: data for the scripts, and elements of the page."""

from __future__ import annotations

import json
import math

from hessfunc.app.report import lines
from hessfunc.app.report.rows import Number
from tests.app.report.documents import parsed

FIGURE = lines.Figure(
    name="loss",
    title="Loss <of>",
    x="epoch",
    y="loss",
    is_log=True,
    lines=[
        lines.Line(name="a", points=[(0, 2.0), (1, None), (2, math.inf)]),
        lines.Line(name="b", points=[(0, 1.0)], run=1, dashed=True),
    ],
    meaning=("Lowest: ", Number(-1.5, ".3g"), "."),
)


def test_values_that_are_not_finite_are_gaps() -> None:
    (data,) = lines.plain([FIGURE]).values()
    assert data["series"][0]["points"] == [[0, 2.0], [1, None], [2, None]]
    assert (data["series"][1]["run"], data["series"][1]["dashed"]) == (1, True)
    json.dumps(data, allow_nan=False)


def test_the_element_has_its_title_its_sentence_and_its_picture() -> None:
    html = lines.elements([FIGURE], {"loss": b"PNG"})
    document = parsed(html)
    assert document.all("h2")[0].text == "Loss <of>"
    assert document.all("p")[0].text == "Lowest: \N{MINUS SIGN}1.5."
    assert len(document.all("img")) == 1
    assert lines.elements([], {}) == ""


def test_a_figure_without_points_is_not_known() -> None:
    none = lines.Figure(name="n", title="n", x="x", y="y", lines=[])
    assert not none.known
    negative = lines.Line(name="a", points=[(0, -1.0)])
    assert lines.Figure(name="n", title="n", x="x", y="y", lines=[negative]).known
    assert not lines.Figure(name="n", title="n", x="x", y="y", lines=[negative], is_log=True).known
