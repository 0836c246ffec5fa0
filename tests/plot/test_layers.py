from dataclasses import replace
from typing import Any

import pytest
import torch

from hessfunc import plot
from hessfunc.algorithms.results import Estimate, LeafEstimate
from tests.plot.conftest import COST

ONE = Estimate(
    value=4.0,
    stderr=0.5,
    degrees=3,
    samples=torch.tensor([3.5, 4.5], dtype=torch.float64),
    by_leaf={"0.weight": 5.0, "0.bias": -1.0},
    **COST,
)


def bars(ax: Any) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def intervals(ax: Any) -> list[tuple[float, float]]:
    return [(float(a[0]), float(b[0])) for a, b in ax.collections[0].get_segments()]


def names(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_yticklabels()]


def test_one_estimate_is_drawn_from_its_first_layer_down() -> None:
    ax = plot.layers(ONE)
    assert bars(ax) == [5.0, -1.0]
    assert names(ax) == ["0.weight", "0.bias"]
    top, bottom = ax.get_ylim()[::-1]
    assert top < 0 < 1 < bottom
    low, high = ONE.interval()
    assert f"{low:.4g} to {high:.4g}" in ax.get_title(loc="left")
    assert ax.get_xlabel() == "trace"
    ax.figure.draw_without_rendering()


def test_an_estimate_a_layer_has_its_own_interval() -> None:
    other = replace(ONE, value=2.0, stderr=0.1)
    ax = plot.layers({"a": ONE, "b": other}, level=0.5, quantity="tr H")
    assert bars(ax) == [4.0, 2.0]
    assert intervals(ax) == [ONE.interval(0.5), other.interval(0.5)]
    assert ax.get_xlabel() == "tr H"


def test_several_estimates_have_student_intervals_of_their_layers() -> None:
    several = [
        replace(ONE, seed=seed, by_leaf={"0.weight": value, "0.bias": 1.0})
        for seed, value in enumerate([1.0, 2.0, 6.0])
    ]
    ax = plot.layers(several)
    assert bars(ax) == [3.0, 1.0]
    # t_0.975 with 2 degrees of freedom, times sqrt(7) / sqrt(3).
    half = 4.302653 * (7 / 3) ** 0.5
    assert intervals(ax)[0] == pytest.approx((3 - half, 3 + half), rel=1e-5)
    assert intervals(ax)[1] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (replace(ONE, by_leaf={}), "by_leaf` is empty"),
        ({}, "by_leaf` is empty"),
        ([ONE], "at least two estimates"),
        ([ONE, ONE], "with different seeds"),
        ([ONE, replace(ONE, seed=1, by_leaf={"1.weight": 1.0})], "different layers"),
    ],
)
def test_what_has_no_layers_or_no_intervals_is_refused(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layers(found)


def test_one_estimate_has_the_interval_of_each_layer() -> None:
    known = replace(ONE, leaf_stderr={"0.weight": 0.5, "0.bias": 0.1})
    ax = plot.layers(known, level=0.9)
    for found, part in zip(intervals(ax), known.by_leaf.values(), strict=True):
        assert isinstance(part, LeafEstimate)
        assert found == pytest.approx(part.interval(0.9))


def test_a_further_run_has_dots_on_the_same_rows() -> None:
    ax = plot.layers(ONE, label="a")
    plot.layers(replace(ONE, by_leaf={"0.weight": 3.0, "0.bias": 2.0}), ax=ax, label="b")
    assert bars(ax) == [5.0, -1.0]
    assert list(ax.lines[-1].get_xdata()) == [3.0, 2.0]
    assert names(ax) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="show other layers"):
        plot.layers(replace(ONE, by_leaf={"1.weight": 1.0}), ax=ax)
