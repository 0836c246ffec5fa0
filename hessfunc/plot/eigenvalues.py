"""Figure of eigenvalues by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hessfunc.algorithms.results import Eigenpairs
from hessfunc.options import anything, validated
from hessfunc.plot.style import FIRST, QUIET, SECOND, WHITE, clean, legend, new_axes, refuse_other

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@validated(pairs=anything)
def eigenvalues(pairs: Eigenpairs, /, *, ax: Axes | None = None) -> Axes:
    """Draw eigenvalues by index, with their intervals.

    Eigenvalues that have not converged are hollow.

    Args:
        pairs: Eigenpairs, as returned by `lanczos` or `power_iteration`.
        ax: Axes to draw on; by default a new figure.

    Raises:
        TypeError: If ``pairs`` is not an `Eigenpairs`.
    """
    refuse_other(pairs, Eigenpairs, "`eigenvalues` takes the result of lanczos(matvec, params)")
    ax = clean(new_axes() if ax is None else ax)
    draw(pairs, ax)
    ax.set(xlabel="index", ylabel="eigenvalue")
    legend(ax)
    return ax


def draw(pairs: Eigenpairs, ax: Axes) -> None:
    """Draw the eigenvalues as bars with heads, without labels."""
    values, intervals, converged = (
        x.cpu() for x in (pairs.values, pairs.intervals, pairs.converged)
    )
    index = torch.arange(1, len(values) + 1)
    ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.vlines(index, values.clamp_max(0), values.clamp_min(0), color=FIRST, alpha=0.35)
    ax.vlines(index, *intervals.T, color=SECOND, linewidth=3, label="interval")
    for done, face, name in ((converged, FIRST, "converged"), (~converged, WHITE, "not converged")):
        if done.any():
            ax.plot(index[done], values[done], "o", color=FIRST, markerfacecolor=face, label=name)
    ax.set_xlim(0.4, len(values) + 0.6)
    ax.locator_params(axis="x", integer=True)
