import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results import Eigenpairs


def line(ax: Any, name: str) -> list[tuple[float, float]]:
    found = next(one for one in ax.lines if one.get_label() == name)
    return list(zip(found.get_xdata(), map(float, found.get_ydata()), strict=True))


def test_numbers_are_a_line_in_the_order_of_the_steps() -> None:
    ax = plot.history({10: 3.0, 0: 1.0, 5: math.nan, 2: 2.0})
    drawn = line(ax, "eigenvalue")
    assert drawn[:2] == [(0, 1.0), (2, 2.0)]
    assert math.isnan(drawn[2][1])
    assert drawn[3] == (10, 3.0)
    assert ax.get_xlabel() == "step"


def test_eigenpairs_are_one_line_an_index_with_their_intervals(pairs: Eigenpairs) -> None:
    later = replace(pairs, values=pairs.values + 1)
    ax = plot.history({0: pairs, 1: later}, against="epoch")
    assert line(ax, "eigenvalue 1") == [(0, 5.0), (1, 6.0)]
    assert line(ax, "eigenvalue 2") == [(0, -0.5), (1, 0.5)]
    _, y = ax.collections[1].get_paths()[0].vertices.T
    assert (y.min(), y.max()) == pytest.approx((-0.7, 0.7), rel=1e-3)
    assert ax.get_xlabel() == "epoch"
    ax.figure.draw_without_rendering()


def test_the_edge_of_stability_is_two_over_the_step_size() -> None:
    ax = plot.history({0: 1.0, 8: torch.tensor([2.0])}, lr=0.5)
    assert line(ax, "2 / lr") == [(0, 4.0), (8, 4.0)]


def test_the_edge_has_a_step_where_the_step_size_has_one() -> None:
    ax = plot.history({0: 1.0, 8: 2.0}, lr={5: 0.1, 0: 0.5})
    assert line(ax, "2 / lr") == [(0, 4.0), (5, 20.0), (8, 20.0)]
    assert ax.lines[-1].get_drawstyle() == "steps-post"


def test_there_is_no_edge_where_the_step_size_is_zero() -> None:
    ax = plot.history({0: 1.0, 8: 2.0}, lr={0: 0.0, 2: 0.5, 4: 0.0, 6: 0.25})
    steps, heights = zip(*line(ax, "2 / lr"), strict=True)
    assert steps == (0, 2, 4, 6, 8)
    assert heights == pytest.approx((math.nan, 4.0, math.nan, 8.0, 8.0), nan_ok=True)
    ax.figure.draw_without_rendering()


@pytest.mark.parametrize("lr", [0, 0.0, {}, {0: 0.0}])
def test_without_a_step_size_there_is_no_edge(lr: Any) -> None:
    ax = plot.history({0: 1.0, 8: 2.0}, lr=lr)
    assert [one.get_label() for one in ax.lines] == ["eigenvalue"]


@pytest.mark.parametrize("found", [{}, {0: 1.0, 1: [1.0, 2.0]}])
def test_nothing_and_unequal_numbers_are_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="the same number of eigenvalues"):
        plot.history(found)
