"""Figure of a loss on a plane, as contours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.options import anything, validated
from hessfunc.plot.losses import LEVELS, Heights, Scale, aspect, label, losses, scaled, second_axis
from hessfunc.plot.style import QUIET, SECOND, WHITE, clean, new_axes, refuse_other, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (6.4, 4.6)


@validated(landscape=anything)
def contours(
    landscape: Landscape, /, *, scale: Scale | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the loss along two directions as contours.

    Darker colours are lower losses. The cross marks the parameters.

    Args:
        landscape: Landscape along two directions.
        scale: Scale of the levels, ``"linear"`` or ``"log"``; by default it depends on their range.
        ax: Axes to draw on; by default a new figure.

    Raises:
        TypeError: If ``landscape`` is not a `Landscape`.
        ValueError: If the landscape is along one direction or has fewer than 2 x 2 points, or if
            the loss is finite nowhere, or not positive on a log scale.
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
    drawn = ax.contourf(x, y, values.T, levels=levels, cmap=shades(), norm=norm)
    ax.contour(drawn, colors=WHITE, linewidths=0.5, alpha=0.6)
    ax.plot(0, 0, "+", color=SECOND, markersize=11, markeredgewidth=1.8)
    bar = ax.figure.colorbar(drawn, ax=ax, label="loss", ticks=levels[::2], format="%.3g")
    bar.ax.tick_params(labelsize="small", color=QUIET)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    ax.set(xlabel=label(landscape, 0), ylabel=label(landscape, 1))
    ax.set_aspect(aspect(landscape))
    return ax


def _levels(values: Heights, scale: Scale) -> Heights:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    # On a plateau, low == high: widen the range, so that the levels increase.
    high = high if high > low else low + (abs(low) or 1.0)
    return (np.geomspace if scale == "log" else np.linspace)(low, high, LEVELS)
