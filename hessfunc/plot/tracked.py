"""Figure of a tracked quantity with the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hessfunc.options import anything, validated
from hessfunc.plot.style import (
    background,
    clean,
    covering,
    draw_edge,
    legend,
    marker,
    new_axes,
    palette,
    refuse_other,
    series_colour,
)
from hessfunc.tracking.measure import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Literal["top", "bottom", "trace", "preconditioned", "critical"]

_EDGE = "edge of stability"
# An edge at most this many times as large as the values belongs to the figure.
_NEAR = 2.0
# Mark of the names of edges beyond the limits.
_BEYOND = "hessfunc edge"
_NAMES: dict[Quantity, str] = {
    "top": "largest eigenvalue",
    "bottom": "smallest eigenvalue",
    "trace": "trace",
    "preconditioned": "preconditioned sharpness",
    "critical": "critical sharpness",
}


@validated(points=anything, threshold=anything)
def tracked(
    points: Sequence[Point],
    /,
    *,
    ax: Axes | None = None,
    quantity: Quantity = "top",
    threshold: Callable[[float], float] | Literal["known"] | None = "known",
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw a tracked quantity against steps, with the edge up to which the training is stable.

    The limits of the vertical axis follow the quantity: an edge far above it is named at the top.
    Bands are residuals, or twice the standard error of a trace. The edge is the threshold of
    `stability` at each point. It bounds one quantity only: the largest eigenvalue for SGD, at
    (2 + 2 momentum) / lr, and the preconditioned sharpness for all others, at
    (2 + 2 beta_1) / ((1 - beta_1) lr) for Adam. If the optimiser is unknown, the edge is 2 / lr of
    plain gradient descent, drawn with the largest eigenvalue and the critical sharpness.

    Args:
        points: Points of a `Tracker`, or from `read`.
        ax: Axes to draw on; by default a new figure.
        quantity: Quantity to draw: ``"top"``, ``"bottom"``, ``"trace"``, ``"preconditioned"`` or
            ``"critical"``.
        threshold: Function from the learning rate to a threshold, drawn with any quantity.
            ``"known"`` draws the edge of the optimiser of the tracker, and None draws no line.
        label: Name of the run in the legend. Draw several runs on the same ``ax`` to compare them.
        color: Colour of the run; by default the next one of the Axes.

    Raises:
        TypeError: If ``points`` is not a sequence of points.
        ValueError: If the quantity is unknown, if no point has it, or if the colour is unknown.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if quantity not in _NAMES:
        raise ValueError(f"quantity={quantity!r}: choose one of {', '.join(map(repr, _NAMES))}")
    refuse_other(points, Sequence, "`tracked` takes points, as in tracker.points")
    for point in points:
        refuse_other(point, Point, "`tracked` takes points, as in tracker.points")
    lines = _lines(points, quantity)
    if not lines:
        raise ValueError(
            f"no point has a {_NAMES[quantity]}: select the quantity in the options of the tracker"
        )
    ax = clean(new_axes() if ax is None else ax)
    several = ax.has_data()
    sharing = ax.get_shared_y_axes().get_siblings(ax)
    before = any(panel.has_data() for panel in sharing)
    own = several or label is not None or color is not None
    colours = [series_colour(ax, color)] * len(lines) if own else []
    colours += [series_colour(ax) for _ in lines[len(colours) :]]
    for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        steps, values, radii = zip(*line, strict=True)
        name = label or _NAMES[quantity]
        name = name if len(lines) == 1 else f"{name}, {i + 1}"
        width = max(0.7, 1.4 - 0.3 * i) if own else 1.4
        style: Any = {"color": colour, "linewidth": width, "markersize": 3}
        ax.plot(steps, values, marker=marker(len(steps)), label=name, **style)
        below = [value - radius for value, radius in zip(values, radii, strict=True)]
        above = [value + radius for value, radius in zip(values, radii, strict=True)]
        ax.fill_between(steps, below, above, color=colour, alpha=0.18, linewidth=0)
    edges, name = _edges(points, quantity, threshold)
    colour = colours[0] if own else None
    draw_edge(ax, edges, end=points[-1].step, label=name, color=colour)
    low, high, beyond = _limits(lines, edges)
    covering(ax, low, high, "y", also=before)
    if beyond is not None:
        _name_beyond(ax, name, beyond, colour)
    ax.set(xlabel="step", ylabel=_NAMES[quantity])
    # Lines of several runs fill the Axes, so that the legend goes above them.
    outside: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    legend(ax, **(outside if own else {}))
    return ax


def _edges(
    points: Sequence[Point],
    quantity: Quantity,
    threshold: Callable[[float], float] | Literal["known"] | None,
) -> tuple[dict[float, float], str]:
    """Return the edge by step, empty if there is none, and its name."""
    rates: dict[float, float] = {p.step: p.lr for p in points if p.lr is not None}
    if threshold is None:
        return {}, ""
    if threshold != "known":
        return {s: threshold(lr) if lr else math.nan for s, lr in rates.items()}, _EDGE
    edges: dict[float, float | None] = {point.step: _edge(point, quantity) for point in points}
    if any(edge is not None for edge in edges.values()):
        return {step: math.nan if edge is None else edge for step, edge in edges.items()}, _EDGE
    if quantity in ("top", "critical") and not any(map(_is_known, points)):
        drawn = {step: 2 / lr if lr else math.nan for step, lr in rates.items()}
        return drawn, "2 / lr (gradient descent)"
    return {}, ""


def _limits(
    lines: Sequence[Sequence[tuple[int, float, float]]], edges: Mapping[float, float]
) -> tuple[float, float, float | None]:
    """Return the limits of the vertical axis, and the least edge if all edges lie beyond them.

    The limits cover the values, their bands up to the range of the values, and each edge at most
    twice as far from zero as the values.
    """
    values = [value for line in lines for _, value, _ in line if math.isfinite(value)]
    least, most = min(values, default=0.0), max(values, default=1.0)
    reach = (most - least) or abs(most) or 1.0
    ends = [
        end
        for line in lines
        for _, value, radius in line
        for end in (value - min(radius, reach), value + min(radius, reach))
        if math.isfinite(end)
    ]
    known = [edge for edge in edges.values() if math.isfinite(edge)]
    near = [edge for edge in known if abs(edge) <= _NEAR * max(abs(least), abs(most))]
    low, high = min([least, *ends, *near]), max([most, *ends, *near])
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    beyond = min(known, key=abs) if known and not near else None
    return low - margin, high + margin, beyond


def _name_beyond(ax: Axes, name: str, edge: float, colour: Any) -> None:
    """Name an edge beyond the limits at the end of the axis on its side."""
    above, before = edge > ax.get_ylim()[0], sum(text.get_gid() == _BEYOND for text in ax.texts)
    arrow = "\N{UPWARDS ARROW}" if above else "\N{DOWNWARDS ARROW}"
    ax.annotate(
        f"{name}: {edge:,.4g} {arrow}",
        (0.99, 0.99 if above else 0.01),
        (0, -14 * before if above else 14 * before),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top" if above else "bottom",
        fontsize="small",
        color=palette(ax)[1] if colour is None else colour,
        bbox={"facecolor": background(ax), "edgecolor": "none", "pad": 1.5, "alpha": 0.8},
    ).set_gid(_BEYOND)


def _is_known(point: Point) -> bool:
    """Return whether the stability of the optimiser of a point is known."""
    return point.optimizer is not None or point.preconditioned_edge is not None


def _edge(point: Point, quantity: Quantity) -> float | None:
    """Return the edge of a quantity at a point."""
    match quantity:
        case "top":
            return point.edge
        case "preconditioned":
            return point.preconditioned_edge
        case "critical" if point.edge and point.lr and math.isclose(point.edge * point.lr, 2):
            # Critical sharpness is measured along the gradient, the step of plain gradient
            # descent: its edge is known only if the edge is 2 / lr.
            return point.edge
        case _:
            return None


def _lines(points: Sequence[Point], quantity: Quantity) -> list[list[tuple[int, float, float]]]:
    """Return the steps, values and half-widths of the band of each line."""
    lines: list[list[tuple[int, float, float]]] = []
    for point in points:
        for i, (value, radius) in enumerate(_values(point, quantity)):
            if i == len(lines):
                lines.append([])
            lines[i].append((point.step, value, radius))
    return lines


def _values(point: Point, quantity: Quantity) -> list[tuple[float, float]]:
    match quantity:
        case "top":
            return list(zip(point.top, point.top_residuals, strict=True))
        case "bottom":
            return list(zip(point.bottom, point.bottom_residuals, strict=True))
        case "trace":
            return [] if point.trace is None else [(point.trace, 2 * (point.trace_stderr or 0.0))]
        case "preconditioned":
            value, radius = point.preconditioned, point.preconditioned_residual
            return [] if value is None else [(value, radius or 0.0)]
        case "critical":
            return [] if point.critical is None else [(point.critical, 0.0)]
