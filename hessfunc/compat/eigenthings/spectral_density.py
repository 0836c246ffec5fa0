"""Spectral density from the eigenpairs of a tridiagonal matrix."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hessfunc.compat.gaussians import mixture
from hessfunc.options import at_least, real, reals, validated


@validated(
    eigenvals=reals,
    eigenvecs=reals,
    min_eigenvalue_support=real,
    max_eigenvalue_support=real,
    num_support_points=real,
    sigma_squared=real,
)
def spectral_density(
    eigenvals: ArrayLike,
    eigenvecs: ArrayLike,
    min_eigenvalue_support: float = -1e5,
    max_eigenvalue_support: float = 1e5,
    num_support_points: float = 1e6,
    sigma_squared: float = 1e-5,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the sum of Gaussians at eigenvalues of a tridiagonal matrix of Lanczos.

    The weight of an eigenvalue is the square of the first entry of its vector.

    Args:
        eigenvals: Eigenvalues ``(k,)``.
        eigenvecs: Vectors ``(k, m)``, one in each row.
        min_eigenvalue_support: First point of the grid.
        max_eigenvalue_support: Last point of the grid.
        num_support_points: Number of points.
        sigma_squared: Variance of a Gaussian.

    Returns:
        ``(density, support)``, each ``(num_support_points,)``.

    Raises:
        ValueError: If there is not one vector for each eigenvalue, or if an option is out of range.
    """
    values, vectors = np.asarray(eigenvals, np.float64), np.asarray(eigenvecs, np.float64)
    if values.ndim != 1 or vectors.ndim != 2 or len(values) != len(vectors):
        raise ValueError(
            f"eigenvals have the shape {values.shape} and eigenvecs {vectors.shape}: pass (k,) and "
            "(k, m)"
        )
    at_least(1, num_support_points=num_support_points)
    if not sigma_squared > 0:
        raise ValueError(f"sigma_squared={sigma_squared}: it must be positive, such as 1e-5")
    support = np.linspace(min_eigenvalue_support, max_eigenvalue_support, int(num_support_points))
    # One node in a run, because the grid may be long.
    nodes, weights = values[:, None], vectors[:, :1] ** 2
    density = mixture(support, nodes, weights, sigma_squared)
    return density / math.sqrt(2 * math.pi * sigma_squared), support
