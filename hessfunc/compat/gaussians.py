"""Sums of Gaussians, the smoothed densities of other libraries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


def mixture(points: _Array, nodes: _Array, weights: _Array, variance: float, /) -> _Array:
    """Return the sum of ``weight exp(-(x - node)^2 / (2 variance))`` over all nodes and runs.

    Args:
        points: Points x, ``(g,)``.
        nodes: Nodes ``(runs, m)``.
        weights: Weights of the nodes, ``(runs, m)``.
        variance: Variance of a Gaussian.
    """
    density = np.zeros(len(points))
    # One run at a time, so that memory grows with g m only.
    for run, mass in zip(nodes, weights, strict=True):
        density += np.exp(-((points[:, None] - run) ** 2) / (2 * variance)) @ mass
    return density


def normalised(density: _Array, points: _Array, /) -> _Array:
    """Return a density with the integral 1 over equidistant points."""
    scaled: _Array = density / (density.sum() * (points[1] - points[0]))
    return scaled
