"""Figure of a loss on a plane, as contours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.options import anything, validated
from hessfunc.plot.losses import (
    LEVELS,
    Heights,
    Scale,
    aspect,
    coordinate,
    losses,
    scaled,
    second_axis,
)
from hessfunc.plot.style import (
    PALETTE,
    QUIET,
    WHITE,
    clean,
    legend,
    new_axes,
    palette,
    refuse_other,
    series_colour,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (5.4, 4.2)


@validated(landscape=anything)
def contours(
    landscape: Landscape,
    /,
    *,
    scale: Scale | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw the loss along two directions as contours.

    Darker colours are lower losses. The cross marks the parameters. Equal lengths on both axes are
    equal distances of the parameters.

    Args:
        landscape: Landscape along two directions.
        scale: Scale of the levels, ``"linear"`` or ``"log"``; by default it depends on their range.
        ax: Axes to draw on; by default a new figure.
        label: Name of the run in the legend.
        color: Colour in which the contours are drawn as lines only. Further runs on the same Axes
            are lines in the next colour of the Axes.

    Raises:
        TypeError: If ``landscape`` is not a `Landscape`.
        ValueError: If the landscape is along one direction or has fewer than 2 x 2 points, or if
            the loss is finite nowhere, not positive on a log scale, or if the colour is
            unknown.
    """
    from matplotlib.colors import LogNorm, Normalize

    refuse_other(
        landscape, Landscape, "`contours` takes a landscape, as returned by landscape(...)"
    )
    x, y, values = landscape.x, second_axis(landscape), losses(landscape)
    scale = scaled(scale, values)
    levels = _levels(values, scale)
    norm = (LogNorm if scale == "log" else Normalize)(levels[0], levels[-1])
    ax = clean(new_axes(_SIZE) if ax is None else ax)
    if ax.has_data() or color is not None:
        colour = series_colour(ax, color)
        ax.contour(x, y, values.T, levels=levels[::2], colors=[colour], linewidths=1.1)
        ax.plot([], [], color=colour, linewidth=1.1, label=label)
    else:
        _fill(ax, x, y, values, levels, norm, label)
    ax.plot(0, 0, "+", color=palette(ax)[1], markersize=11, markeredgewidth=1.8)
    ax.set(xlabel=coordinate(landscape, 0), ylabel=coordinate(landscape, 1))
    ax.set_aspect(aspect(landscape))
    if label is not None:
        legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return ax


def _fill(
    ax: Axes, x: Any, y: Any, values: Heights, levels: Heights, norm: Any, label: str | None
) -> None:
    """Fill the space between contours with shades, and explain them by a bar."""
    drawn = ax.contourf(x, y, values.T, levels=levels, cmap=shades(), norm=norm)
    ax.contour(drawn, colors=WHITE, linewidths=0.5, alpha=0.6)
    ax.plot([], [], "s", color=shades()(0.4), label=label)
    # Further runs are lines over the shades of blue.
    _, second, _, fourth, fifth = PALETTE
    ax.set_prop_cycle(color=[fourth, second, fifth])
    bar = ax.figure.colorbar(drawn, ax=ax, label="loss", ticks=levels[::2], format="%.3g")
    bar.ax.tick_params(labelsize="small", color=QUIET)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _levels(values: Heights, scale: Scale) -> Heights:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    # On a plateau, low == high: widen the range, so that the levels increase.
    high = high if high > low else low + (abs(low) or 1.0)
    return (np.geomspace if scale == "log" else np.linspace)(low, high, LEVELS)
