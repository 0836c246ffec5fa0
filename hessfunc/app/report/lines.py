"""Figures of lines: the data that scripts draw, and the elements of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessfunc.app.report import html
from hessfunc.app.report.rows import Words

# Scripts that draw these figures.
SCRIPTS = ("numbers", "svg", "zoom", "chart", "lines", "lines_page")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Line of a figure.

    Attributes:
        name: Name in the legend.
        points: Points; a value that is None or not finite is a gap.
        run: Number of the run, which decides the colour.
        dashed: Whether the line is dashed.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    run: int = 0
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Figure of lines.

    Attributes:
        name: Name of the figure, unique in the page.
        title: Title above the figure.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        lines: Lines of the figure.
        is_log: Whether the vertical axis has a log scale.
        meaning: Sentence that interprets the figure.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    is_log: bool = False
    meaning: Words = ()

    @property
    def known(self) -> bool:
        """Whether at least one point can be drawn."""
        values = [value for line in self.lines for _, value in line.points if value is not None]
        return any(math.isfinite(v) and (v > 0 or not self.is_log) for v in values)


def plain(figures: Iterable[Figure], /) -> dict[str, Any]:
    """Return the figures as plain data, by name."""
    return {
        figure.name: {
            "x": figure.x,
            "y": figure.y,
            "isLog": figure.is_log,
            "series": [
                {
                    "name": line.name,
                    "run": line.run,
                    "dashed": line.dashed,
                    "points": [[x, _finite(value)] for x, value in line.points],
                }
                for line in figure.lines
            ],
        }
        for figure in figures
    }


def elements(figures: Iterable[Figure], pictures: Mapping[str, bytes], /) -> str:
    """Return the figures as HTML, with pictures for browsers without scripts.

    Args:
        figures: Figures of the page.
        pictures: PNG pictures by the name of the figure.
    """
    drawn = "".join(
        html.figure(one.name, one.title, one.meaning, pictures.get(one.name)) for one in figures
    )
    return f'<div class="figures">\n{drawn}</div>' if drawn else ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
