"""Figures of results, with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hessfunc.algorithms.results import Density, Eigenpairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density", "eigenvalues"]

_CURVE = "#1f4e79"
_STICK = "#c8553d"
_QUIET = "#8a8f98"


def density(
    density: Density,
    /,
    *,
    ax: Axes | None = None,
    eigenvalues: Eigenpairs | None = None,
    width: float | None = None,
) -> Axes:
    """The smoothed spectral density on a log axis, with its outliers as sticks.

    The dashed line is the height of one single eigenvalue, ``1 / (n width sqrt(2 pi))``: a bump
    that reaches it stands for about one.

    Args:
        density: as `slq` returns it.
        ax: where to draw; by default a new figure.
        eigenvalues: drawn as the sticks; by default the Ritz values that stand alone, five widths
            or more from the next one of the same probe.
        width: of the smoothing, in units of the eigenvalues; by default the density's own.
    """
    width = density.width if width is None else width
    ax = _axes(ax)
    one = 1 / (density.n * width * math.sqrt(2 * math.pi))
    sticks = _lone_nodes(density, 5 * width) if eigenvalues is None else eigenvalues.values.cpu()
    ends = torch.cat([density.nodes[density.weights > 0], sticks])
    margin = max(5 * width, 0.03 * float(ends.max() - ends.min()))
    low, high = float(ends.min()) - margin, float(ends.max()) + margin
    # Four points a width, or peaks would be cut off.
    grid = torch.linspace(low, high, max(1000, math.ceil(4 * (high - low) / width)))
    curve = density.pdf(grid, width)
    floor, top = 0.1 * min(one, float(curve.max())), 3 * float(curve.max())

    ax.fill_between(grid, floor, curve.clamp_min(floor), color=_CURVE, alpha=0.18, linewidth=0)
    ax.plot(grid, curve, color=_CURVE, linewidth=1.4, label="density")
    if len(sticks):
        heights = density.pdf(sticks, width).clamp_min(2 * floor)
        ax.vlines(sticks, floor, heights, color=_STICK, linewidth=1.1)
        name = "Ritz values that stand alone" if eigenvalues is None else "eigenvalues"
        ax.plot(sticks, heights, "o", color=_STICK, markersize=4, label=name)
    ax.axhline(one, color=_QUIET, linewidth=0.8, linestyle=(0, (5, 4)), label="one eigenvalue")

    ax.set(yscale="log", xlim=(low, high), ylim=(floor, top))
    ax.set(xlabel="eigenvalue", ylabel="spectral density")
    probes, steps = density.nodes.shape
    ax.set_title(
        f"n = {density.n:,} · {probes} probe{'s' * (probes > 1)} of {steps} steps"
        f" · Gaussians of width {width:.2g}",
        fontsize="small",
        color=_QUIET,
        loc="left",
    )
    ax.legend(frameon=False, fontsize="small")
    return ax


def eigenvalues(pairs: Eigenpairs, /, *, ax: Axes | None = None) -> Axes:
    """Eigenvalues by index, with their intervals; those that have not converged are hollow.

    Args:
        pairs: as `lanczos` or `power_iteration` returns them.
        ax: where to draw; by default a new figure.
    """
    ax = _axes(ax)
    values, intervals, converged = (
        x.cpu() for x in (pairs.values, pairs.intervals, pairs.converged)
    )
    index = torch.arange(1, len(values) + 1)
    ax.axhline(0, color=_QUIET, linewidth=0.8)
    ax.vlines(index, values.clamp_max(0), values.clamp_min(0), color=_CURVE, alpha=0.35)
    ax.vlines(index, *intervals.T, color=_STICK, linewidth=3, label="interval")
    for done, face, name in ((converged, _CURVE, "converged"), (~converged, "white", "not yet")):
        if done.any():
            ax.plot(index[done], values[done], "o", color=_CURVE, markerfacecolor=face, label=name)
    ax.set(xlabel="index", ylabel="eigenvalue", xlim=(0.4, len(values) + 0.6))
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        try:
            from matplotlib import pyplot as plt
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "figures need matplotlib: pip install 'hessfunc[plot]'"
            ) from None
        ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _lone_nodes(density: Density, distance: float) -> torch.Tensor:
    """The nodes, of all probes, with no other node of their probe within a distance."""
    found = []
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        nodes = nodes[weights > 0]
        gaps = torch.cat([nodes.new_tensor([math.inf]), nodes.diff(), nodes.new_tensor([math.inf])])
        found.append(nodes[torch.minimum(gaps[:-1], gaps[1:]) > distance])
    return torch.cat(found)
