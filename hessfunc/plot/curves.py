"""Figure of a loss along a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.options import anything, validated
from hessfunc.plot.losses import Scale, coordinate, losses, only_axis, scaled
from hessfunc.plot.style import QUIET, clean, legend, new_axes, refuse_other, series_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@validated(landscapes=anything)
def curves(
    landscapes: Landscape | Mapping[str, Landscape],
    /,
    *,
    scale: Scale | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw the loss along one direction, or along each of several directions.

    The dot marks the parameters.

    Args:
        landscapes: Landscape along one direction, or several such landscapes by name.
        scale: Scale of the loss, ``"linear"`` or ``"log"``; by default it depends on its range.
        ax: Axes to draw on; by default a new figure.
        label: Name of a single landscape in the legend; several have their own names.
        color: Colour of a single landscape; by default the next one of the Axes.

    Raises:
        TypeError: If ``landscapes`` is neither a `Landscape` nor a mapping of landscapes.
        ValueError: If there is no landscape, if one is along two directions, or if the loss is
            finite nowhere, or not positive on a log scale.
    """
    named = landscapes if isinstance(landscapes, Mapping) else {label or "": landscapes}
    if isinstance(landscapes, Mapping) and (label is not None or color is not None):
        raise ValueError("label and color are for a single landscape: name several in the mapping")
    for one in named.values():
        refuse_other(one, Landscape, "`curves` takes a landscape, as returned by landscape(...)")
    if not named:
        raise ValueError("there is no landscape to draw: the mapping is empty")
    lines = {name: (only_axis(one), losses(one)) for name, one in named.items()}
    scale = scaled(scale, np.concatenate([values for _, values in lines.values()]))
    ax = clean(new_axes() if ax is None else ax)
    for name, (x, values) in lines.items():
        ax.plot(x, values, color=series_colour(ax, color), linewidth=1.6, label=name)
    for x, values in lines.values():
        here = x.numpy() == 0
        ax.plot(x[here], values[here], "o", color=QUIET, markersize=5, zorder=3)
    labels = {coordinate(one, 0) for one in named.values()}
    ax.set(
        xlabel=labels.pop() if len(labels) == 1 else "along the direction",
        ylabel="loss",
        yscale=scale,
    )
    legend(ax)
    return ax
