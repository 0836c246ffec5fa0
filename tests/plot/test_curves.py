"""Losses along a line."""

from dataclasses import replace

from hessfunc import plot
from hessfunc.algorithms.results.landscape import Landscape


def test_a_curve_has_a_dot_at_params(line: Landscape) -> None:
    ax = plot.curves(line)
    curve, dot = ax.lines
    assert curve.get_xdata().tolist() == [-2, -1, 0, 1, 2]
    assert list(curve.get_ydata()) == [5, 2, 1, 2, 5]
    assert (dot.get_xdata().tolist(), list(dot.get_ydata())) == ([0], [1])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("along the direction (distance)", "loss")
    assert ax.get_legend() is None


def test_several_curves_are_named(line: Landscape) -> None:
    ax = plot.curves({"top": line, "random": replace(line, values=2 * line.values)})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["top", "random"]
    assert len({one.get_color() for one in ax.lines[:2]}) == 2
