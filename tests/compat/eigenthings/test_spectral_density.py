"""Densities from the eigenpairs of a tridiagonal matrix."""

from __future__ import annotations

import numpy as np
import pytest

from hessfunc.compat.eigenthings import spectral_density


def test_the_density_is_a_sum_of_gaussians() -> None:
    values, vectors = np.linalg.eigh(np.array([[1.0, 0.5], [0.5, 2.0]]))
    density, support = spectral_density(
        values, vectors.T, -1, 4, num_support_points=5001, sigma_squared=0.01
    )
    expected = np.zeros(5001)
    for value, vector in zip(values, vectors.T, strict=True):
        kernel = np.exp(-((support - value) ** 2) / 0.02) / np.sqrt(2 * np.pi * 0.01)
        expected += vector[0] ** 2 * kernel
    np.testing.assert_allclose(density, expected, rtol=1e-10)
    step = support[1] - support[0]
    assert density.sum() * step == pytest.approx(1.0, rel=1e-6)
    assert (density * support).sum() * step == pytest.approx(1.0, rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="eigenvals have the shape"):
        spectral_density([1.0, 2.0], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="sigma_squared=0.0: it must be positive"):
        spectral_density([1.0], [[1.0]], sigma_squared=0.0)
