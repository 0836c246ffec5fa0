"""A tracked quantity, beside the line at which training is stable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hessfunc.plot.edge import draw_edge
from hessfunc.plot.style import PALETTE, clean, legend, marker, new_axes, refuse_other
from hessfunc.training.tracking.point import Point
from hessfunc.training.tracking.stability import stability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["tracked"]

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


def tracked(
    points: Sequence[Point],
    /,
    *,
    ax: Axes | None = None,
    quantity: Quantity = "top",
    threshold: Callable[[float], float] | None = stability,
) -> Axes:
    """A quantity against steps, with the line at which training is stable.

    Bands are residuals, or twice the standard error of a trace.

    Args:
        points: of a `Tracker`, or from `read`.
        ax: where to draw; by default a new figure.
        quantity: ``"top"``, ``"bottom"``, ``"trace"``, ``"preconditioned"`` or ``"critical"``.
        threshold: of the learning rate, 2 / lr by default; with Adam the preconditioned sharpness
            has ``lambda lr: 38 / lr``. None draws no line.

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
        rates: dict[float, float] = {
            point.step: point.lr for point in points if point.lr is not None
        }
        draw_edge(ax, rates, end=points[-1].step, threshold=threshold)
    ax.set(xlabel="step", ylabel=_NAMES[quantity])
    legend(ax)
    return ax


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
