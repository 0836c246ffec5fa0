"""Common parts of all figures: colours, axes, and notes above them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hessfunc.options import described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

# Any two colours differ by at least 25 in CIELAB, also under protanopia, deuteranopia and
# tritanopia.
PALETTE = ("#1f4e79", "#c8553d", "#5aa9c4", "#e3b34c", "#471e28")

# The same on a dark background, such as that of `plt.style.use("dark_background")`.
DARK_PALETTE = ("#7fb8e8", "#f08a6c", "#eff7c9", "#895de5", "#d8b828")


FIRST, SECOND, *_ = PALETTE

# Notes, ticks and lines of zero: a contrast of at least 4 with white and with a dark page.
QUIET = "#70767f"

FAINT = "#e4e6e9"

WHITE = "#ffffff"

# From dark to light, so that the order of values is visible without colour.
_SHADES = ("#0f2b46", "#1f4e79", "#4a86ae", "#8fc0c9", "#cfe0cf", "#f6efd9")

DASHED = (0, (5, 4))

# In inches: 10 points are 10 pixels of a figure that is 390 pixels wide, as on a phone.
SIZE = (5.4, 3.5)

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
        rows, columns, figsize=size, layout="compressed", squeeze=False, subplot_kw=options
    )[1]
    return panels.ravel()


def clean(ax: Axes) -> Axes:
    """Remove the frame of Axes, make their ticks quiet, and return them."""
    set_colours(ax)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.tick_params(which="both", color=QUIET, labelsize="small")
    return ax


def set_colours(ax: Axes) -> None:
    """Set the cycle of colours of empty Axes, unless the style of the user has its own cycle."""
    from matplotlib import rcParams, rcParamsDefault

    if not ax.has_data() and rcParams["axes.prop_cycle"] == rcParamsDefault["axes.prop_cycle"]:
        # The second colour is that of edges, sticks and intervals.
        first, _, *others = palette(ax)
        ax.set_prop_cycle(color=[first, *others])


def background(ax: Axes) -> Any:
    """Return the colour behind the drawing: that of the Axes, of the figure, or of the style."""
    from matplotlib import rcParams
    from matplotlib.colors import to_rgba

    figure = ax.figure.get_facecolor()
    for colour in (ax.get_facecolor(), figure, rcParams["savefig.facecolor"]):
        if colour != "auto" and to_rgba(colour)[3] > 0.5:
            return colour
    return WHITE if to_rgba(rcParams["text.color"])[:3] == (0, 0, 0) else "#000000"


def palette(ax: Axes) -> tuple[str, ...]:
    """Return the colours that suit the background of Axes."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(background(ax))
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.4
    return DARK_PALETTE if is_dark else PALETTE


def series_colour(ax: Axes, color: Any = None) -> Any:
    """Return the colour of the next run: the given one, or the next of the cycle of the Axes.

    Raises:
        ValueError: If matplotlib does not know the colour.
    """
    from matplotlib.colors import is_color_like

    if color is None:
        # matplotlib advances the cycle of the Axes only for a line.
        (scout,) = ax.plot([], [])
        color = scout.get_color()
        scout.remove()
        return color
    if not is_color_like(color):
        raise ValueError(
            f"color={color!r} is no colour of matplotlib: pass a name, such as 'tab:blue', or "
            "'#1f4e79'"
        )
    return color


def accent(ax: Axes, colour: Any, *, overlaid: bool) -> Any:
    """Return the colour of what belongs to a run: its own in a figure of several runs."""
    return colour if overlaid else palette(ax)[1]


def covering(ax: Axes, low: float, high: float, axis: Literal["x", "y"], *, also: bool) -> None:
    """Set the limits of an axis; ``also`` keeps what the present limits cover."""
    if also:
        before = ax.get_xlim() if axis == "x" else ax.get_ylim()
        low, high = min(low, *before), max(high, *before)
    (ax.set_xlim if axis == "x" else ax.set_ylim)(low, high)


def legend(ax: Axes, **options: Any) -> None:
    """Add a legend without a frame, in which each label appears once, if anything has a label."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        by_label = dict(zip(reversed(labels), reversed(handles), strict=True))
        ordered = list(dict.fromkeys(labels))
        style: Any = {"frameon": False, "fontsize": "small", **options}
        ax.legend([by_label[name] for name in ordered], ordered, **style)


def marker(points: int) -> str | None:
    """Return the marker of a line: dots for few points, because a single point has no line."""
    return "o" if points < _FEW else None


def note(ax: Axes, parts: Iterable[str]) -> None:
    """Describe the figure in small letters above it; the note of another run is removed."""
    text, before = " · ".join(parts), ax.get_title(loc="left")
    if before not in ("", text):
        text = ""
    ax.set_title(text, fontsize="small", color=QUIET, loc="left")


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
        raise TypeError(f"{takes}, but got {described(value)}")


def shades() -> Colormap:
    """Return a colour map whose lightness increases monotonically."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", _SHADES)


def draw_edge(
    ax: Axes, edges: Mapping[float, float], /, *, end: float, label: str, color: Any = None
) -> None:
    """Draw the edge of stability on Axes of curvature against steps.

    Args:
        ax: Axes to draw on.
        edges: Mapping from a step to the edge from there on. The line has a gap where the edge is
            not finite; without a finite edge there is no line.
        end: Step to which the line extends at least.
        label: Label of the line.
        color: Colour of the line; by default the second of the palette.
    """
    if not any(map(math.isfinite, edges.values())):
        return
    drawn, last = dict(sorted(edges.items())), max(edges)
    drawn.setdefault(max(last, end), edges[last])
    ax.plot(
        list(drawn),
        [edge if math.isfinite(edge) else math.nan for edge in drawn.values()],
        color=palette(ax)[1] if color is None else color,
        linewidth=1.2,
        linestyle=DASHED,
        drawstyle="steps-post",
        label=label,
    )
