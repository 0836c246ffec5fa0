"""Densities by Lanczos from random vectors."""

from __future__ import annotations

import math

import pytest
import torch

from hessfunc.compat.eigenthings.stochastic_lanczos import (
    eigv_to_density,
    stochastic_lanczos,
    tridiag_to_density,
    tridiag_to_eigv,
)
from tests.compat.eigenthings.problem import SPECTRUM, operator


def test_nodes_of_all_steps_are_the_eigenvalues() -> None:
    nodes, weights = stochastic_lanczos(operator(), 8, 8, 3)
    assert nodes.shape == weights.shape == (3, 8)
    expected = SPECTRUM.sort().values.double().expand(3, 8)
    torch.testing.assert_close(nodes.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.sum(1).double(), torch.ones(3).double())
    density, grid = stochastic_lanczos(operator(), 8, 8, 3, get_density=True)
    assert density.shape == grid.shape == (10000,)
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0)


def test_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=9: the operator has vectors of 8 entries"):
        stochastic_lanczos(operator(), 9, 4, 1)


def test_densities_are_means_of_gaussians() -> None:
    tridiagonal = torch.tensor([[[1.0, 0.5, 0], [0.5, 2, 0.3], [0, 0.3, 4]]], dtype=torch.float64)
    nodes, weights = tridiag_to_eigv(tridiagonal)
    # e_1' T^k e_1 is the sum of weights times nodes^k.
    for power in range(4):
        moment = torch.linalg.matrix_power(tridiagonal[0], power)[0, 0]
        torch.testing.assert_close((weights * nodes**power).sum(), moment)
    density, grid = tridiag_to_density(tridiagonal, sigma_sq=0.01, grid_len=2000)
    variance = 0.01 * (float(nodes.max() - nodes.min()) + 0.02)
    expected = sum(
        w * torch.exp(-((grid - x) ** 2) / (2 * variance))
        for x, w in zip(nodes[0], weights[0], strict=True)
    ) / math.sqrt(2 * math.pi * variance)
    torch.testing.assert_close(density, expected / (expected.sum() * (grid[1] - grid[0])))
    equal, _ = eigv_to_density(nodes, grids=grid, sigma_sq=0.01)
    assert not torch.allclose(equal, density)
    with pytest.raises(ValueError, match="eig_vals must be finite"):
        eigv_to_density(nodes * math.nan)
    with pytest.raises(ValueError, match="sigma_sq=-1.0: it must be positive"):
        eigv_to_density(nodes, sigma_sq=-1.0)
