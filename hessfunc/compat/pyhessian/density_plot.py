"""Smoothed density from nodes and weights, and its figure."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hessfunc.compat.gaussians import mixture, normalised
from hessfunc.options import or_none, path, reals, text, validated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Added to the density, so that its logarithm is finite.
_FLOOR = 1e-7


@validated(eigenvalues=reals, weights=reals, filename=path, title=or_none(text))
def get_esd_plot(
    eigenvalues: ArrayLike,
    weights: ArrayLike,
    filename: str | PathLike[str] = "example.pdf",
    title: str | None = None,
) -> Axes:
    """Draw the density on a log axis in a new figure, and write it to a file.

    Args:
        eigenvalues: Nodes ``(runs, m)``.
        weights: Weights of the nodes, ``(runs, m)``.
        filename: File to write, in the format of its ending.
        title: Title of the figure.

    Returns:
        The Axes of the figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from hessfunc.plot.style import clean, new_axes

    density, grids = density_generate(eigenvalues, weights)
    nodes = np.asarray(eigenvalues)
    ax = clean(new_axes())
    ax.semilogy(grids, density + _FLOOR)
    ax.set(
        xlabel="Eigenvalue",
        ylabel="Density (Log Scale)",
        xlim=(nodes.min() - 1, nodes.max() + 1),
    )
    figure: Any = ax.figure
    if title is not None:
        ax.set_title(title)
    figure.savefig(filename)
    return ax


@validated(eigenvalues=reals, weights=reals)
def density_generate(
    eigenvalues: ArrayLike,
    weights: ArrayLike,
    num_bins: int = 10000,
    sigma_squared: float = 1e-5,
    overhead: float = 0.01,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the mean over runs of Gaussians at the nodes, scaled to a sum of 1 over the grid.

    Args:
        eigenvalues: Nodes ``(runs, m)``.
        weights: Weights of the nodes, ``(runs, m)``.
        num_bins: Number of points of the grid, from the mean lowest to the mean highest node.
        sigma_squared: Variance of a Gaussian, multiplied by the length of the grid if this is
            above 1. For lengths above sigma_squared num_bins^2 (1000 by default), a Gaussian is
            narrower than a step of the grid. Increase one of the two options then.
        overhead: Length by which the grid is extended at each end.

    Returns:
        ``(density, grids)``, each ``(num_bins,)``.
    """
    nodes, masses = np.asarray(eigenvalues, np.float64), np.asarray(weights, np.float64)
    if nodes.ndim != 2 or nodes.shape != masses.shape or not nodes.size:
        raise ValueError(
            f"eigenvalues have the shape {nodes.shape} and weights {masses.shape}: pass both as "
            "(runs, m), as hessian(...).density() returns them"
        )
    if num_bins < 2:
        raise ValueError(f"num_bins={num_bins}: it must be at least 2, such as num_bins=10000")
    low, high = nodes.min(axis=1).mean() - overhead, nodes.max(axis=1).mean() + overhead
    grids = np.linspace(low, high, num_bins)
    variance = sigma_squared * max(1.0, high - low)
    return normalised(mixture(grids, nodes, masses, variance), grids), grids
