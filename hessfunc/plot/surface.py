"""Figure of a loss on a plane, as a surface in three dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.options import anything, validated
from hessfunc.plot.losses import LEVELS, Scale, aspect, coordinate, losses, scaled, second_axis
from hessfunc.plot.style import (
    FAINT,
    QUIET,
    WHITE,
    legend,
    new_axes,
    refuse_other,
    series_colour,
    set_colours,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (5.4, 4.6)
# Largest number of lines on each axis of the surface.
_LINES = 101
# Distance from the lowest point of the surface to the contours below it, relative to its height.
_GAP = 0.35


@validated(landscape=anything)
def surface(
    landscape: Landscape,
    /,
    *,
    scale: Scale | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw the loss along two directions as a surface over its contours.

    Args:
        landscape: Landscape along two directions.
        scale: Scale of the loss, ``"linear"`` or ``"log"``; by default it depends on its range.
        ax: Three-dimensional Axes, ``figure.add_subplot(projection="3d")``; by default a new
            figure.
        label: Name of the run in the legend.
        color: Single colour of the surface, for several runs on the same Axes.

    Raises:
        TypeError: If ``landscape`` is not a `Landscape`.
        ValueError: If the landscape is along one direction or has fewer than 2 x 2 points, if the
            loss is finite nowhere, or not positive on a log scale, if the Axes are
            two-dimensional, or if the colour is unknown.
    """
    refuse_other(landscape, Landscape, "`surface` takes a landscape, as returned by landscape(...)")
    y, values = second_axis(landscape), losses(landscape)
    scale = scaled(scale, values)
    solid: Any = new_axes(_SIZE, projection="3d") if ax is None else ax
    if solid.name != "3d":
        raise ValueError(
            "a surface needs three-dimensional Axes: pass `ax=figure.add_subplot(projection='3d')`"
        )
    heights = np.log10(values) if scale == "log" else values
    low, high = float(np.nanmin(heights)), float(np.nanmax(heights))
    # On a plateau, low == high: use a height of 1.
    high = high if high > low else low + 1.0
    floor = low - _GAP * (high - low)
    grid = np.meshgrid(landscape.x.numpy(), y.numpy(), indexing="ij")
    levels = np.linspace(low, high, LEVELS)
    several = solid.has_data()
    set_colours(solid)
    options: Any = {"cmap": shades(), "vmin": low, "vmax": high}
    patch = shades()(0.4)
    if several or color is not None:
        patch = series_colour(solid, color)
        options = {"color": patch, "alpha": 0.6}
    lines = {"rcount": _LINES, "ccount": _LINES, "linewidth": 0.15, "edgecolor": (WHITE, 0.35)}
    solid.plot_surface(*grid, heights, **options, **lines)
    solid.plot([], [], [], "s", color=patch, label=label)
    if "cmap" in options:
        solid.contour(*grid, heights, levels, zdir="z", offset=floor, linewidths=0.8, **options)
    if several:
        before = solid.get_zlim()
        floor, high = min(floor, before[0]), max(high, before[1])
    solid.set(
        xlabel=coordinate(landscape, 0),
        ylabel=coordinate(landscape, 1),
        zlabel="loss",
        zlim=(floor, high),
    )
    _quieten(solid)
    sides = np.array([np.ptp(landscape.x.numpy()), np.ptp(y.numpy()) * aspect(landscape)])
    # A zoom below 1 leaves room for the labels.
    solid.set_box_aspect((*sides / sides.max(), 0.8), zoom=0.95)
    ticks = _ticks(low, high, scale)
    solid.set_zticks(list(ticks), list(ticks.values()))
    if label is not None:
        legend(solid)
    return solid


def _quieten(solid: Any) -> None:
    solid.view_init(elev=26, azim=-125)
    for axis in (solid.xaxis, solid.yaxis, solid.zaxis):
        axis.pane.set_visible(False)
        axis.line.set_color(QUIET)
        axis._axinfo["grid"].update(color=FAINT, linewidth=0.6)
        axis.label.set_size("small")
    solid.tick_params(labelsize="small", color=QUIET, pad=1)
    for name in ("x", "y"):
        solid.locator_params(axis=name, nbins=5)


def _ticks(low: float, high: float, scale: Scale) -> dict[float, str]:
    """Return the ticks: heights with the labels of their losses."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if scale == "linear":
        return _within(MaxNLocator(5).tick_values(low, high), low, high)
    few = (1.0, 2.0, 5.0) if high - low < 2 else (1.0,)
    round_losses = LogLocator(subs=few, numticks=8).tick_values(10**low, 10**high)
    labels = _within(round_losses, 10**low, 10**high)
    return {float(np.log10(loss)): text for loss, text in labels.items()}


def _within(candidates: Iterable[float], low: float, high: float) -> dict[float, str]:
    return {float(loss): f"{loss:.4g}" for loss in candidates if low <= loss <= high}
