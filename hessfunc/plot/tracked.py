"""Figure of a tracked quantity with the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hessfunc.options import anything, validated
from hessfunc.plot.style import PALETTE, clean, draw_edge, legend, marker, new_axes, refuse_other
from hessfunc.tracking.measure import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Literal["top", "bottom", "trace", "preconditioned", "critical"]

# The second colour of the palette is the colour of the edge.
_COLOURS = (PALETTE[0], *PALETTE[2:])
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
) -> Axes:
    """Draw a tracked quantity against steps, with the edge up to which the training is stable.

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

    Raises:
        TypeError: If ``points`` is not a sequence of points.
        ValueError: If the quantity is unknown, or if no point has it.
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
    for i, line in enumerate(lines):
        steps, values, radii = zip(*line, strict=True)
        colour = _COLOURS[i % len(_COLOURS)]
        name = _NAMES[quantity] if len(lines) == 1 else f"{_NAMES[quantity]}, {i + 1}"
        style: Any = {"color": colour, "linewidth": 1.4, "markersize": 3}
        ax.plot(steps, values, marker=marker(len(steps)), label=name, **style)
        below = [value - radius for value, radius in zip(values, radii, strict=True)]
        above = [value + radius for value, radius in zip(values, radii, strict=True)]
        ax.fill_between(steps, below, above, color=colour, alpha=0.18, linewidth=0)
    if threshold is not None:
        _draw_edge(ax, points, quantity, threshold)
    ax.set(xlabel="step", ylabel=_NAMES[quantity])
    legend(ax)
    return ax


def _draw_edge(
    ax: Axes,
    points: Sequence[Point],
    quantity: Quantity,
    threshold: Callable[[float], float] | Literal["known"],
) -> None:
    end = points[-1].step
    rates: dict[float, float] = {p.step: p.lr for p in points if p.lr is not None}
    if threshold != "known":
        drawn = {step: threshold(lr) if lr else math.nan for step, lr in rates.items()}
        draw_edge(ax, drawn, end=end, label="edge of stability")
        return
    edges: dict[float, float | None] = {point.step: _edge(point, quantity) for point in points}
    if any(edge is not None for edge in edges.values()):
        drawn = {step: math.nan if edge is None else edge for step, edge in edges.items()}
        draw_edge(ax, drawn, end=end, label="edge of stability")
    elif quantity in ("top", "critical") and not any(map(_is_known, points)):
        drawn = {step: 2 / lr if lr else math.nan for step, lr in rates.items()}
        draw_edge(ax, drawn, end=end, label="2 / lr (gradient descent)")


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
