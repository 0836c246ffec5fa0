"""A tracked quantity, beside the line at which training is stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hessfunc.options import anything, validated
from hessfunc.plot.style import PALETTE, clean, draw_edge, legend, marker, new_axes, refuse_other
from hessfunc.tracking.measure import Point
from hessfunc.tracking.stability import stability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Literal["top", "bottom", "trace", "preconditioned", "critical"]

# The second colour is that of the line.
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
    """A quantity against steps, with the line at which training is stable.

    Bands are residuals, or twice the standard error of a trace. The line bounds one quantity alone:
    the largest eigenvalue for SGD, at (2 + 2 momentum) / lr, and the preconditioned sharpness for
    Adam, at (2 + 2 beta_1) / ((1 - beta_1) lr). Where the optimiser is not known, it is that of
    plain gradient descent, 2 / lr, beside the largest eigenvalue and critical sharpness.

    Args:
        points: of a `Tracker`, or from `read`.
        ax: where to draw; by default a new figure.
        quantity: ``"top"``, ``"bottom"``, ``"trace"``, ``"preconditioned"`` or ``"critical"``.
        threshold: Function of the learning rate, drawn beside any quantity. ``"known"`` draws the
            line of the optimiser that the tracker was given, and None no line.

    Raises:
        TypeError: these are no points.
        ValueError: the quantity is none of these, or no point has it.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if quantity not in _NAMES:
        raise ValueError(f"quantity={quantity!r}: choose {', '.join(map(repr, _NAMES))}")
    refuse_other(points, Sequence, "`tracked` takes points, as in tracker.points")
    for point in points:
        refuse_other(point, Point, "`tracked` takes points, as in tracker.points")
    lines = _lines(points, quantity)
    if not lines:
        raise ValueError(f"no point has {_NAMES[quantity]}: was it measured?")
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
    found: dict[float, float | None] = {point.step: _edge(point, quantity) for point in points}
    if any(edge is not None for edge in found.values()):
        drawn = {step: math.nan if edge is None else edge for step, edge in found.items()}
        draw_edge(ax, drawn, end=end, label="edge of stability")
    elif quantity in ("top", "critical") and not any(map(_is_known, points)):
        drawn = {step: stability(lr) if lr else math.nan for step, lr in rates.items()}
        draw_edge(ax, drawn, end=end, label="2 / lr (gradient descent)")


def _is_known(point: Point) -> bool:
    """Whether the optimiser of a point is known, and has an edge of some quantity."""
    return point.edge is not None or point.preconditioned_edge is not None


def _edge(point: Point, quantity: Quantity) -> float | None:
    """The edge of a quantity."""
    match quantity:
        case "top":
            return point.edge
        case "preconditioned":
            return point.preconditioned_edge
        case "critical" if point.edge and point.lr and math.isclose(point.edge * point.lr, 2):
            # The loss along the gradient is what a step of plain gradient descent meets.
            return point.edge
        case _:
            return None


def _lines(points: Sequence[Point], quantity: Quantity) -> list[list[tuple[int, float, float]]]:
    """Of each line its steps, values and half-widths of the band."""
    found: list[list[tuple[int, float, float]]] = []
    for point in points:
        for i, (value, radius) in enumerate(_values(point, quantity)):
            if i == len(found):
                found.append([])
            found[i].append((point.step, value, radius))
    return found


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
