"""Figure of eigenvalues by index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hessfunc.algorithms.results import Eigenpairs
from hessfunc.options import anything, validated
from hessfunc.plot.style import (
    QUIET,
    accent,
    background,
    clean,
    covering,
    legend,
    new_axes,
    refuse_other,
    series_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mark of the heads of one run, and the distance of the next run to its right.
_RUN, _BESIDE = "hessfunc eigenvalues", 0.18


@validated(pairs=anything)
def eigenvalues(
    pairs: Eigenpairs,
    /,
    *,
    ax: Axes | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw eigenvalues by index, with their intervals.

    Eigenvalues that have not converged are hollow.

    Args:
        pairs: Eigenpairs, as returned by `lanczos` or `power_iteration`.
        ax: Axes to draw on; by default a new figure.
        label: Name of the run in the legend. Draw several runs on the same ``ax`` to compare them;
            they stand side by side.
        color: Colour of the run; by default the next one of the Axes.

    Raises:
        TypeError: If ``pairs`` is not an `Eigenpairs`.
        ValueError: If the colour is unknown, or if an eigenvalue is not finite.
    """
    refuse_other(pairs, Eigenpairs, "`eigenvalues` takes the result of lanczos(matvec, params)")
    if not bool(pairs.values.isfinite().all()):
        raise ValueError("the eigenvalues are NaN or infinite: check the matvec with `check`")
    ax = clean(new_axes() if ax is None else ax)
    draw(pairs, ax, label=label, color=color)
    ax.set(xlabel="index", ylabel="eigenvalue")
    legend(ax)
    return ax


def draw(pairs: Eigenpairs, ax: Axes, *, label: str | None = None, color: Any = None) -> None:
    """Draw the eigenvalues as bars with heads, without labels of the axes."""
    values, intervals, converged = (
        x.cpu() for x in (pairs.values, pairs.intervals, pairs.converged)
    )
    before = sum(line.get_gid() == _RUN for line in ax.lines)
    several = ax.has_data()
    colour = series_colour(ax, color)
    own = several or label is not None
    index = torch.arange(1, len(values) + 1, dtype=torch.float64, device="cpu") + _BESIDE * before
    if not before:
        ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.vlines(index, values.clamp_max(0), values.clamp_min(0), color=colour, alpha=0.35)
    bars = accent(ax, colour, overlaid=own)
    ax.vlines(index, *intervals.T, color=bars, linewidth=3, label="" if own else "interval")
    for done, face, name in (
        (converged, colour, "converged"),
        (~converged, background(ax), "not converged"),
    ):
        if done.any():
            named = f"{label}, {name}" if label and name != "converged" else label or name
            style: Any = {"color": colour, "markerfacecolor": face, "label": named}
            (heads,) = ax.plot(index[done], values[done], "o", **style)
    heads.set_gid(_RUN)
    covering(ax, 0.4, len(values) + 0.6 + _BESIDE * before, "x", also=several)
    ax.locator_params(axis="x", integer=True)
