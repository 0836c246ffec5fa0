"""What all figures have in common: colours, axes, and notes above them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray


# Any two differ by 25 or more in CIELAB, and so they do to people who see no red, green or blue.
PALETTE = ("#1f4e79", "#c8553d", "#5aa9c4", "#e3b34c", "#471e28")


FIRST, SECOND, *_ = PALETTE


QUIET = "#8a8f98"


FAINT = "#e4e6e9"


WHITE = "#ffffff"


# From dark to light, so that the order of values is seen without colour.
_SHADES = ("#0f2b46", "#1f4e79", "#4a86ae", "#8fc0c9", "#cfe0cf", "#f6efd9")


DASHED = (0, (5, 4))


SIZE = (7.2, 4.2)


# Points of a line that are marked.
_FEW = 30


def new_axes(size: tuple[float, float] = SIZE, **options: Any) -> Axes:
    """The Axes of a new figure of pyplot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return grid(1, 1, size, **options)[0]


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> NDArray[np.object_]:
    """Rows of Axes, one after another, of a new figure of pyplot."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'hessfunc[plot]'") from None
    found = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, subplot_kw=options
    )[1]
    return found.ravel()


def clean(ax: Axes) -> Axes:
    """Axes without a frame, with quiet ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(which="both", color=QUIET, labelsize="small")
    return ax


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, of what has a name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", **options)


def marker(points: int) -> str | None:
    """Of a line through so many points: dots while they are few, as one alone has no line."""
    return "o" if points < _FEW else None


def note(ax: Axes, parts: Iterable[str]) -> None:
    """What the figure is of, in small letters above it."""
    ax.set_title(" · ".join(parts), fontsize="small", color=QUIET, loc="left")


def refuse_other(found: object, kind: type | tuple[type, ...], takes: str) -> None:
    """Raise for what a figure is not of.

    Raises:
        TypeError: it is so.
    """
    if not isinstance(found, kind):
        raise TypeError(f"{takes}, and got a {type(found).__name__}")


def shades() -> Colormap:
    """A colour map whose lightness rises steadily."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", _SHADES)


def draw_edge(ax: Axes, edges: Mapping[float, float], /, *, end: float, label: str) -> None:
    """The edge of stability, on Axes of curvature against steps.

    Args:
        ax: where to draw.
        edges: step -> the edge from there on; where it is not finite the line has a gap, and where
            none is finite there is no line.
        end: the step to which the line reaches at least.
        label: Name of the line.
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
