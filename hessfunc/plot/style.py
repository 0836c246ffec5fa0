"""Common parts of all figures: colours, axes, and notes above them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray


# Any two colours differ by at least 25 in CIELAB, also under protanopia, deuteranopia and
# tritanopia.
PALETTE = ("#1f4e79", "#c8553d", "#5aa9c4", "#e3b34c", "#471e28")


FIRST, SECOND, *_ = PALETTE


QUIET = "#8a8f98"


FAINT = "#e4e6e9"


WHITE = "#ffffff"


# From dark to light, so that the order of values is visible without colour.
_SHADES = ("#0f2b46", "#1f4e79", "#4a86ae", "#8fc0c9", "#cfe0cf", "#f6efd9")


DASHED = (0, (5, 4))


SIZE = (7.2, 4.2)


# Number of points below which the points of a line are marked.
_FEW = 30


def new_axes(size: tuple[float, float] = SIZE, **options: Any) -> Axes:
    """Return the Axes of a new pyplot figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    return grid(1, 1, size, **options)[0]


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> NDArray[np.object_]:
    """Return the Axes of a new pyplot figure with a grid of panels, row by row."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "figures need matplotlib: `pip install 'hessfunc[plot]'`"
        ) from None
    panels = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, subplot_kw=options
    )[1]
    return panels.ravel()


def clean(ax: Axes) -> Axes:
    """Remove the frame of Axes, make their ticks quiet, and return them."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(which="both", color=QUIET, labelsize="small")
    return ax


def legend(ax: Axes, **options: Any) -> None:
    """Add a legend without a frame, if anything has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", **options)


def marker(points: int) -> str | None:
    """Return the marker of a line: dots for few points, because a single point has no line."""
    return "o" if points < _FEW else None


def note(ax: Axes, parts: Iterable[str]) -> None:
    """Describe the figure in small letters above it."""
    ax.set_title(" · ".join(parts), fontsize="small", color=QUIET, loc="left")


def refuse_other(value: object, kind: type | tuple[type, ...], takes: str) -> None:
    """Raise for a value of a type that a figure does not draw.

    Args:
        value: Value that was passed.
        kind: Expected type or types.
        takes: Beginning of the message, which names the expected value.

    Raises:
        TypeError: If ``value`` is not an instance of ``kind``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{takes}, but got a {type(value).__name__}")


def shades() -> Colormap:
    """Return a colour map whose lightness increases monotonically."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", _SHADES)


def draw_edge(ax: Axes, edges: Mapping[float, float], /, *, end: float, label: str) -> None:
    """Draw the edge of stability on Axes of curvature against steps.

    Args:
        ax: Axes to draw on.
        edges: Mapping from a step to the edge from there on. The line has a gap where the edge is
            not finite; without a finite edge there is no line.
        end: Step to which the line extends at least.
        label: Label of the line.
    """
    if not any(map(math.isfinite, edges.values())):
        return
    drawn, last = dict(sorted(edges.items())), max(edges)
    drawn.setdefault(max(last, end), edges[last])
    ax.plot(
        list(drawn),
        [edge if math.isfinite(edge) else math.nan for edge in drawn.values()],
        color=SECOND,
        linewidth=1.2,
        linestyle=DASHED,
        drawstyle="steps-post",
        label=label,
    )
