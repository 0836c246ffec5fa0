from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from hessfunc.algorithms.results import Density
from hessfunc.algorithms.results.masses import masses, simple
from hessfunc.algorithms.results.quadrature import Rule
from tests.algorithms.densities import diagonal, of_nodes

OUTLIERS = torch.tensor([100.0, 60, 30, 20, 10, 8, 6, 5, 4, 3]).double()
BULK = torch.randn(490, generator=torch.Generator().manual_seed(0)).double()
NETS = {
    "semi-definite": torch.cat([OUTLIERS, 0.02 * BULK.abs()]),
    "indefinite": torch.cat([OUTLIERS, 0.3 * BULK]),
}


def distance(found: Density, weights: Tensor, spectrum: Tensor) -> float:
    nodes, mass = found.nodes.flatten().numpy(), weights.flatten().numpy()
    return float(wasserstein_distance(spectrum.numpy(), nodes, None, mass))


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("net", NETS)
def test_masses_are_much_nearer_to_the_spectra_of_networks(net: str, probes: int) -> None:
    spectrum = NETS[net]
    ratios, covered = [], 0
    for seed in range(20):
        found = diagonal(spectrum, probes, 40, seed)
        near, far = (distance(found, w, spectrum) for w in (found.masses, found.weights))
        ratios.append(far / near)
        covered += found.distance() >= near
    assert float(torch.tensor(ratios).median()) > 2.5
    assert covered >= 18


def test_converged_outliers_have_the_mass_of_one_eigenvalue() -> None:
    found = diagonal(NETS["semi-definite"], 2, 40, 3)
    assert found.residuals is not None
    known = simple(Rule(found.nodes, found.weights, found.residuals), found.n)
    assert bool(known[:, -10:].all())
    torch.testing.assert_close(
        found.masses[known], torch.full((int(known.sum()),), 1 / 500).double()
    )
    torch.testing.assert_close(found.masses.sum(1), torch.ones(2).double(), rtol=1e-12, atol=0)
    # The ratios of the other weights remain.
    others = found.masses[0][~known[0]] / found.weights[0][~known[0]]
    assert float(others.std()) < 1e-9 * float(others.mean())


def test_repeated_eigenvalues_keep_their_weights() -> None:
    repeated = torch.cat([torch.ones(20).double(), torch.full((180,), 1e-3).double()])
    found = diagonal(repeated, 1, 30, 0)
    assert torch.equal(found.masses, found.weights)
    # Weights that are improbable only together remain as well.
    n, k = 1000, 8
    nodes = torch.arange(1.0, k + 2).double()[None]
    weights = torch.full_like(nodes, 6 / n)
    weights[0, 0] = 1 - 6 * k / n
    residuals = torch.full_like(nodes, 1e-9)
    residuals[0, 0] = 1.0
    assert not simple(Rule(nodes, weights, residuals), n).any()
    weights[0, 1:] = 1 / n
    assert simple(Rule(nodes, weights, residuals), n).sum() == k


def test_unknown_residuals_leave_the_weights() -> None:
    weights = torch.tensor([[0.5, 0.5]]).double()
    rule = Rule(torch.tensor([[0.0, 1.0]]).double(), weights, None)
    assert torch.equal(masses(rule, 10), weights)
    found = of_nodes([[0.0, 1.0]], [[0.5, 0.5]], 10)
    assert math.isfinite(found.distance(0.9))


def test_a_whole_krylov_space_is_known_without_error() -> None:
    spectrum = torch.linspace(1, 2, 12).double()
    found = diagonal(spectrum, 1, 12, 0)
    assert distance(found, found.masses, spectrum) < 1e-12
    assert found.distance(0.99) < 1e-12
