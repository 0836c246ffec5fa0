from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from hessfunc import plot
from hessfunc.tracking import tracked
from hessfunc.tracking.measure import Point
from tests.tracking.problem import point


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


def test_a_curve_has_a_line_for_each_value_and_that_of_stability() -> None:
    points = [point(s, top=(s + 1.0, 1.0), top_residuals=(0.1, 0.1), lr=0.5) for s in (0, 10)]
    ax = plot.tracked([*points, point(20, top=(5.0, 2.0), top_residuals=(0.1, 0.1), lr=0.25)])
    lines = {line.get_label(): line for line in ax.get_lines()}
    edge = "2 / lr (gradient descent)"
    assert list(lines) == ["largest eigenvalue, 1", "largest eigenvalue, 2", edge]
    assert list(lines["largest eigenvalue, 1"].get_ydata()) == [1, 11, 5]
    assert list(lines[edge].get_ydata()) == [4, 4, 8]
    assert list(lines[edge].get_xdata()) == [0, 10, 20]
    assert plot.tracked(points, ax=ax) is ax


@pytest.mark.parametrize(
    ("quantity", "fields"),
    [
        ("bottom", {"bottom": (-1.0,), "bottom_residuals": (0.1,)}),
        ("trace", {"trace": 3.0, "trace_stderr": 0.5}),
        ("preconditioned", {"preconditioned": 3.0, "preconditioned_residual": 0.5}),
        ("critical", {"critical": 3.0}),
    ],
)
def test_other_quantities_are_drawn(quantity: Any, fields: dict[str, Any]) -> None:
    points = [point(0), point(10, **fields, lr=0.1), point(20, **fields, lr=0.1)]
    ax = plot.tracked(points, quantity=quantity, threshold=lambda lr: 38 / lr)
    assert list(ax.get_lines()[0].get_xdata()) == [10, 20]
    assert list(ax.get_lines()[1].get_ydata()) == pytest.approx([380, 380])
    assert len(plot.tracked(points, quantity=quantity, threshold=None).get_lines()) == 1
    with pytest.raises(ValueError, match="no point has a"):
        plot.tracked([point(0)], quantity=quantity)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (partial(torch.optim.SGD, lr=0.1), {"top": 20.0, "preconditioned": 20.0, "critical": 20.0}),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"top": 38.0, "preconditioned": 38.0}),
        (
            partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1.0),
            {"top": 38 / 2.8 - 1, "preconditioned": 38 / 2.8},
        ),
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0), {"preconditioned": 380.0}),
        (partial(torch.optim.Adam, lr=0.1, weight_decay=0.5), {"preconditioned": 380.0}),
        (partial(torch.optim.RMSprop, lr=0.1, momentum=0.5), {"preconditioned": 30.0}),
        (partial(torch.optim.Adagrad, lr=0.1), {"preconditioned": 20.0}),
        (partial(torch.optim.Adafactor, lr=0.1), {"preconditioned": 20.0}),
        (partial(torch.optim.ASGD, lr=0.1), {"top": 20.0, "critical": 20.0}),
    ],
    ids=lambda value: f"{value.func.__name__} {value.keywords}" if callable(value) else "",
)
def test_an_edge_is_drawn_beside_the_quantity_that_it_bounds(
    make: Callable[..., torch.optim.Optimizer], known: dict[str, float]
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = make(model.parameters())
    batch = torch.randn(10, 4), torch.randint(2, (10,))
    measured = "preconditioned" in known
    options = {"preconditioned": measured, "bottom": 1, "trace_probes": 2, "critical": True}
    with tracked(
        model, F.cross_entropy, [batch], every=1, optimizer=optimizer, **options
    ) as tracker:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            tracker.step()
    for quantity in ("top", "bottom", "trace", "critical", *(["preconditioned"] * measured)):
        ax = Figure().add_subplot()
        _, *line = plot.tracked(tracker.points, ax=ax, quantity=quantity).get_lines()  # type: ignore[arg-type]
        assert [float(one.get_ydata()[-1]) for one in line] == pytest.approx(
            [known[quantity]] if quantity in known else []
        )


def test_the_edge_moves_with_the_learning_rate() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    batch = torch.randn(10, 4), torch.randint(3, (10,))
    with tracked(
        model, F.cross_entropy, [batch], every=1, optimizer=optimizer, preconditioned=True
    ) as tracker:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            schedule.step()
            tracker.step()
    points = tracker.points
    assert points[0].preconditioned_edge is None
    assert [p.preconditioned_edge for p in points[1:]] == pytest.approx([760, 1520, 3040])
    assert {point.optimizer for point in points} == {"Adam"}
    line = plot.tracked(points, quantity="preconditioned", ax=Figure().add_subplot()).lines[1]
    assert list(line.get_ydata()) == pytest.approx([math.nan, 760, 1520, 3040], nan_ok=True)


def run(top: float, lr: float) -> list[Point]:
    edge = {"lr": lr, "edge": 2 / lr, "optimizer": "SGD"}
    return [
        Point(step=step, loss=1.0, top=(top + step,), top_residuals=(0.1,), **edge)
        for step in (0, 10)
    ]


def test_the_limits_follow_the_values_and_a_far_edge_is_named() -> None:
    ax = plot.tracked(run(10.0, 1e-3))
    low, high = ax.get_ylim()
    assert low < 10 < 20 < high < 25
    assert [text.get_text() for text in ax.texts] == ["edge of stability: 2,000 ↑"]
    ax = plot.tracked(run(10.0, 0.08))
    assert ax.get_ylim()[1] > 25
    assert not ax.texts


def test_the_limits_of_two_runs_cover_both() -> None:
    ax = plot.tracked(run(10.0, 0.1), label="SGD")
    plot.tracked(run(50.0, 0.1), ax=ax, label="SAM")
    low, high = ax.get_ylim()
    assert low < 10 < 60 < high


def test_the_limits_of_panels_with_one_axis_cover_both() -> None:
    panels = Figure().subplots(1, 2, sharey=True)
    for panel, top in zip(panels, (30.0, 2.0), strict=True):
        plot.tracked(run(top, 0.1), ax=panel)
    low, high = panels[0].get_ylim()
    assert low < 2 < 30 < high


def test_a_broad_band_does_not_flatten_the_curve() -> None:
    points = [Point(step=s, loss=1.0, trace=10.0 + s, trace_stderr=1e4) for s in (0, 10)]
    low, high = plot.tracked(points, quantity="trace").get_ylim()
    assert -10 < low < high < 40
