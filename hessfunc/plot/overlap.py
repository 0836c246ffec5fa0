"""Figure of the overlaps of two sets of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hessfunc.algorithms.results import Overlap
from hessfunc.options import anything, validated
from hessfunc.plot.style import QUIET, new_axes, note, refuse_other, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Side of a cell, room for labels, and width without cells and at most, in inches.
_CELL, _ROOM, _NARROWEST, _WIDEST = 0.42, 1.4, 3.6, 5.4
# Largest number of columns whose cells contain their numbers.
_MOST_NUMBERS = 12


@validated(overlap=anything, rows=anything, columns=anything)
def overlap(
    overlap: Overlap,
    /,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the overlaps ``|<u_i, w_j>|`` as a heat map, with the principal angles above it.

    Args:
        overlap: Overlaps, as returned by `hessfunc.overlap`.
        rows: Names of the vectors u; by default ``u 1``, ``u 2``, ...
        columns: Names of the vectors w, such as ``["gradient", "update"]``.
        ax: Axes to draw on; by default a new figure whose size fits the number of vectors.

    Raises:
        TypeError: If ``overlap`` is not an `Overlap`.
        ValueError: If the number of names differs from that of the vectors.
    """
    refuse_other(overlap, Overlap, "`overlap` takes the result of hessfunc.overlap(a, b)")
    count, width = overlap.cosines.shape
    names = [_names("rows", rows, "u", count), _names("columns", columns, "w", width)]
    if ax is None:
        size = min(_WIDEST, _NARROWEST + _CELL * width), _ROOM + _CELL * min(count, 20)
        ax = new_axes(size)
    style: Any = {"vmin": 0, "vmax": 1, "cmap": shades().reversed(), "aspect": "auto"}
    image = ax.imshow(overlap.cosines.numpy(), **style)
    if width <= _MOST_NUMBERS and count <= 2 * _MOST_NUMBERS:
        _write_numbers(ax, overlap)
    ax.set_yticks(range(count), names[0])
    turned: Any = {"rotation": 35, "ha": "right"} if max(map(len, names[1])) > 4 else {}
    ax.set_xticks(range(width), names[1], **turned)
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, label="overlap")
    bar.ax.tick_params(labelsize="small", color=QUIET)
    bar.outline.set_visible(False)
    degrees = ", ".join(f"{math.degrees(angle):.3g}°" for angle in overlap.angles[:4].tolist())
    note(ax, [f"principal angles {degrees}{', ...' if len(overlap.angles) > 4 else ''}"])
    return ax


def _names(argument: str, names: Sequence[str] | None, letter: str, count: int) -> list[str]:
    if names is None:
        return [f"{letter} {i}" for i in range(1, count + 1)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"{argument} must be a list with one name for each of {count} vectors")
    return [str(name) for name in names]


def _write_numbers(ax: Axes, overlap: Overlap) -> None:
    for i, row in enumerate(overlap.cosines.tolist()):
        for j, value in enumerate(row):
            text: Any = {"ha": "center", "va": "center", "fontsize": "small"}
            color = "white" if value > 0.5 else "black"
            ax.text(j, i, f"{value:.2f}".removeprefix("0") or "0", color=color, **text)
