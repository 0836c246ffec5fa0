"""Figure of a spectral density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.options import anything, several_eigenpairs, validated
from hessfunc.plot.style import (
    DASHED,
    QUIET,
    accent,
    clean,
    covering,
    legend,
    new_axes,
    note,
    refuse_other,
    series_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Smallest number of points of the curve.
_POINTS = 1000


@validated(density=anything, eigenvalues=several_eigenpairs)
def density(
    density: Density,
    /,
    *,
    ax: Axes | None = None,
    eigenvalues: Eigenpairs | Sequence[Eigenpairs] | None = None,
    width: float | None = None,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw the smoothed spectral density on a log axis, with its outliers as sticks.

    The band reaches from the lowest to the highest density of a single probe. The dashed line is
    the height of one eigenvalue, ``1 / (n width sqrt(2 pi))``: a bump of this height is about one
    eigenvalue.

    Args:
        density: Spectral density, as returned by `slq`.
        ax: Axes to draw on; by default a new figure.
        eigenvalues: Result or results whose eigenvalues are drawn as sticks. By default the sticks
            are the isolated Ritz values, at least five widths from the next one of the same probe.
        width: Width of the Gaussians, in units of the eigenvalues; by default ``density.width``.
        label: Name of the run in the legend. Draw several runs on the same ``ax`` to compare them.
        color: Colour of the run; by default the next one of the Axes.

    Raises:
        TypeError: If ``density`` is not a `Density`.
        ValueError: If the density is not finite, if the width is not positive and finite, or if the
            colour is unknown.
    """
    refuse_other(density, Density, "`density` takes a density, as returned by slq(matvec, params)")
    if not bool(density.nodes.isfinite().all()):
        raise ValueError("the density is NaN or infinite: check the matvec with `check`")
    width = density.width if width is None else width
    if not 0 < width < math.inf:
        raise ValueError(f"width={width}: the width must be positive and finite")
    ax = clean(new_axes() if ax is None else ax)
    pairs = [eigenvalues] if isinstance(eigenvalues, Eigenpairs) else eigenvalues
    draw(density, ax, width=width, eigenvalues=pairs, label=label, color=color)
    ax.set(xlabel="eigenvalue", ylabel="spectral density")
    probes, steps = density.nodes.shape
    note(
        ax,
        (
            f"n = {density.n:,}",
            f"{probes} probe{'s' * (probes > 1)} of {steps} steps",
            f"Gaussians of width {width:.2g}",
        ),
    )
    legend(ax)
    return ax


def draw(
    density: Density,
    ax: Axes,
    *,
    width: float,
    eigenvalues: Sequence[Eigenpairs] | None,
    label: str | None = None,
    color: Any = None,
) -> None:
    """Draw the curve, its band and its outliers on a log axis, without labels."""
    # Height of the Gaussian of one eigenvalue, whose mass is 1 / n.
    one = 1 / (density.n * width * math.sqrt(2 * math.pi))
    if eigenvalues:
        sticks = torch.cat([pairs.values.cpu() for pairs in eigenvalues])
    else:
        sticks = _lone_nodes(density, 5 * width)
    ends = torch.cat([density.nodes[density.weights > 0], sticks])
    margin = max(5 * width, 0.03 * float(ends.max() - ends.min()))
    low, high = float(ends.min()) - margin, float(ends.max()) + margin
    grid = _grid(density, low, high, width)
    curves = _by_probe(density, grid, width)
    curve = curves.mean(0)
    floor, top = 0.1 * min(one, float(curve.max())), 3 * float(curve.max())

    several = ax.has_data()
    colour = series_colour(ax, color)
    own = several or label is not None
    sticks_colour = accent(ax, colour, overlaid=own)
    ax.fill_between(grid, floor, curve.clamp_min(floor), color=colour, alpha=0.1, linewidth=0)
    if len(curves) > 1:
        below, above = (edge.clamp_min(floor) for edge in (curves.amin(0), curves.amax(0)))
        band = None if own else f"range of {len(curves)} probes"
        ax.fill_between(grid, below, above, color=colour, alpha=0.25, linewidth=0, label=band)
    ax.plot(grid, curve, color=colour, linewidth=1.4, label=label or "density")
    if len(sticks):
        # A pin is as high as the bump of one eigenvalue.
        heights = torch.full_like(sticks, one)
        ax.vlines(sticks, floor, heights, color=sticks_colour, linewidth=1.1)
        name = "eigenvalues" if eigenvalues else "isolated Ritz values"
        style: Any = {"color": sticks_colour, "markersize": 4, "label": None if own else name}
        ax.plot(sticks, heights, "o", **style)
    ax.axhline(one, color=QUIET, linewidth=0.8, linestyle=DASHED, label="one eigenvalue")
    ax.set_yscale("log")
    covering(ax, low, high, "x", also=several)
    covering(ax, floor, top, "y", also=several)


def _grid(density: Density, low: float, high: float, width: float) -> Tensor:
    """Return the points of the curve: four a width, so that no peak is cut off.

    If this needs too many points, the fine grid covers only the neighbourhood of the nodes.
    """
    near = density.nodes[density.weights > 0][:, None] + width * torch.arange(-5, 6, device="cpu")
    wanted = 4 * (high - low) / width
    if wanted <= _POINTS + near.numel():
        points = max(_POINTS, math.ceil(wanted))
        return torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
    even = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
    return torch.cat([even, near.flatten()]).unique()


def _by_probe(density: Density, points: Tensor, width: float) -> Tensor:
    """Return the density of each probe, ``(probes, points)``."""
    # One probe at a time: each takes memory for its nodes times the points.
    probes = zip(density.nodes.split(1), density.masses.split(1), strict=True)
    return torch.stack(
        [
            replace(density, nodes=n, weights=mass, residuals=None, deflated=None).pdf(
                points, width
            )
            for n, mass in probes
        ]
    )


def _lone_nodes(density: Density, distance: float) -> Tensor:
    """Return the nodes of all probes without another node of the same probe within a distance."""
    lone = []
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        nodes = nodes[weights > 0]
        gaps = torch.cat([nodes.new_tensor([math.inf]), nodes.diff(), nodes.new_tensor([math.inf])])
        lone.append(nodes[torch.minimum(gaps[:-1], gaps[1:]) > distance])
    return torch.cat(lone)
