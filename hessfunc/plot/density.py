"""The spectral density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.options import anything, several_eigenpairs, validated
from hessfunc.plot.style import (
    DASHED,
    FIRST,
    QUIET,
    SECOND,
    clean,
    legend,
    new_axes,
    note,
    refuse_other,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the curve at least.
_POINTS = 1000


@validated(density=anything, eigenvalues=several_eigenpairs)
def density(
    density: Density,
    /,
    *,
    ax: Axes | None = None,
    eigenvalues: Eigenpairs | Sequence[Eigenpairs] | None = None,
    width: float | None = None,
) -> Axes:
    """The smoothed spectral density on a log axis, with its outliers as sticks.

    The band reaches from the lowest to the highest density of a single probe. The dashed line is
    the height of one single eigenvalue, ``1 / (n width sqrt(2 pi))``: a bump that reaches it
    stands for about one.

    Args:
        density: as `slq` returns it.
        ax: where to draw; by default a new figure.
        eigenvalues: drawn as the sticks, those of one or several results; by default the Ritz
            values that stand alone, five widths or more from the next one of the same probe.
        width: of the smoothing, in units of the eigenvalues; by default the density's own.

    Raises:
        TypeError: it is no density.
        ValueError: the width is not positive and finite.
    """
    refuse_other(density, Density, "`density` takes a density, as slq(matvec, params) gives it")
    width = density.width if width is None else width
    if not 0 < width < math.inf:
        raise ValueError(f"width={width}: a positive, finite number")
    ax = clean(new_axes() if ax is None else ax)
    pairs = [eigenvalues] if isinstance(eigenvalues, Eigenpairs) else eigenvalues
    draw(density, ax, width=width, eigenvalues=pairs)
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
    density: Density, ax: Axes, *, width: float, eigenvalues: Sequence[Eigenpairs] | None
) -> None:
    """The curve, its band and its outliers, on a log axis, without labels."""
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

    ax.fill_between(grid, floor, curve.clamp_min(floor), color=FIRST, alpha=0.1, linewidth=0)
    if len(curves) > 1:
        below, above = (edge.clamp_min(floor) for edge in (curves.amin(0), curves.amax(0)))
        name = f"range of {len(curves)} probes"
        ax.fill_between(grid, below, above, color=FIRST, alpha=0.25, linewidth=0, label=name)
    ax.plot(grid, curve, color=FIRST, linewidth=1.4, label="density")
    if len(sticks):
        heights = _by_probe(density, sticks, width).mean(0).clamp_min(2 * floor)
        ax.vlines(sticks, floor, heights, color=SECOND, linewidth=1.1)
        name = "eigenvalues" if eigenvalues else "Ritz values that stand alone"
        ax.plot(sticks, heights, "o", color=SECOND, markersize=4, label=name)
    ax.axhline(one, color=QUIET, linewidth=0.8, linestyle=DASHED, label="one eigenvalue")
    ax.set(yscale="log", xlim=(low, high), ylim=(floor, top))


def _grid(density: Density, low: float, high: float, width: float) -> Tensor:
    """Four points a width, or peaks would be cut off; where that is too many, around the nodes."""
    near = density.nodes[density.weights > 0][:, None] + width * torch.arange(-5, 6)
    wanted = 4 * (high - low) / width
    if wanted <= _POINTS + near.numel():
        return torch.linspace(low, high, max(_POINTS, math.ceil(wanted)), dtype=torch.float64)
    even = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    return torch.cat([even, near.flatten()]).unique()


def _by_probe(density: Density, points: Tensor, width: float) -> Tensor:
    """The density of each probe ``(probes, points)``."""
    # One after another, as each takes the memory of its nodes times the points.
    probes = zip(density.nodes.split(1), density.weights.split(1), strict=True)
    return torch.stack([replace(density, nodes=n, weights=w).pdf(points, width) for n, w in probes])


def _lone_nodes(density: Density, distance: float) -> Tensor:
    """The nodes, of all probes, with no other node of their probe within a distance."""
    found = []
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        nodes = nodes[weights > 0]
        gaps = torch.cat([nodes.new_tensor([math.inf]), nodes.diff(), nodes.new_tensor([math.inf])])
        found.append(nodes[torch.minimum(gaps[:-1], gaps[1:]) > distance])
    return torch.cat(found)
