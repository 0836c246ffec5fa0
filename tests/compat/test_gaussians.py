"""Sums of Gaussians."""

from __future__ import annotations

import numpy as np

from hessfunc.compat.gaussians import mixture, normalised


def test_a_mixture_sums_over_nodes_and_runs() -> None:
    points = np.linspace(-1, 1, 5)
    nodes, weights = np.array([[0.0, 0.5], [0.2, -0.3]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    found = mixture(points, nodes, weights, 0.1)
    for x, value in zip(points, found, strict=True):
        expected = (weights * np.exp(-((x - nodes) ** 2) / 0.2)).sum()
        np.testing.assert_allclose(value, expected)


def test_a_normalised_density_has_the_integral_one() -> None:
    points = np.linspace(0, 2, 9)
    assert normalised(1 + points, points).sum() * 0.25 == 1.0
