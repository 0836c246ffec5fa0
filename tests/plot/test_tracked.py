import math
from typing import Any

import pytest

from hessfunc import plot
from hessfunc.tracking.measure import Point


def traced(step: int, **fields: Any) -> Point:
    return Point(step=step, loss=1.0, trace=3.0 + step, trace_stderr=0.5, **fields)


def test_the_band_of_a_trace_is_twice_its_standard_error() -> None:
    ax = plot.tracked([traced(0), traced(10)], quantity="trace")
    (band,) = ax.collections
    edges = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert edges == {(0, 2.0), (0, 4.0), (10, 12.0), (10, 14.0)}


def test_one_point_is_marked() -> None:
    (line,) = plot.tracked([traced(0)], quantity="trace").lines
    assert line.get_marker() == "o"
    (line,) = plot.tracked([traced(step) for step in range(100)], quantity="trace").lines
    assert line.get_marker() == "None"


def topped(step: int, **fields: Any) -> Point:
    return traced(step, top=(1.0,), top_residuals=(0.1,), **fields)


def test_there_is_no_edge_where_the_step_size_is_zero_and_none_without_one() -> None:
    ax = plot.tracked([topped(0, lr=0.0), topped(1, lr=0.5), topped(2)])
    assert ax.lines[1].get_label() == "2 / lr (gradient descent)"
    assert list(ax.lines[1].get_xdata()) == [0, 1, 2]
    assert list(ax.lines[1].get_ydata()) == pytest.approx([math.nan, 4.0, 4.0], nan_ok=True)
    assert len(plot.tracked([topped(0, lr=0.0), topped(1)]).lines) == 1


@pytest.mark.parametrize("quantity", ["trace", "bottom", "preconditioned"])
def test_gradient_descent_has_an_edge_of_the_largest_eigenvalue_alone(quantity: Any) -> None:
    fields = {"bottom": (-1.0,), "bottom_residuals": (0.1,), "preconditioned": 2.0}
    ax = plot.tracked([topped(step, lr=0.5, **fields) for step in (0, 1)], quantity=quantity)
    assert len(ax.lines) == 1


def test_another_threshold_has_its_own_name() -> None:
    ax = plot.tracked([traced(0, lr=0.5)], quantity="trace", threshold=lambda lr: 38 / lr)
    assert ax.lines[1].get_label() == "edge of stability"
    assert list(ax.lines[1].get_ydata()) == [76.0]


def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="quantity='foo': choose one of 'top', 'bottom', 'trace'"):
        plot.tracked([traced(0)], quantity="foo")  # type: ignore[arg-type]
