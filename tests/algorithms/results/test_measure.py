"""Means over spectra and distributions of eigenvalues, from the measures of random probes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.results import Density
from tests.algorithms.densities import (
    GEOMETRIC,
    SPECTRUM,
    diagonal,
    of_nodes,
    shares,
    spiked_spectrum,
)


def exact_densities(spectrum: torch.Tensor, probes: int, draws: int) -> list[Density]:
    n = len(spectrum)
    nodes = spectrum.expand(probes, n)
    return [
        Density(
            nodes=nodes,
            weights=w,
            residuals=torch.zeros_like(w),
            n=n,
            matvecs=0,
            passes=0,
            reason="exact",
            seed=None,
        )
        for w in shares(draws, probes, n)
    ]


def band(probes: int, n: int, level: float) -> float:
    """The half-width of the simultaneous band, without what encloses the quadrature."""
    found = of_nodes([[0.0, 1.0]] * probes, [[0.01, 0.99]] * probes, n, residual=0.1)
    upper = found.cdf_bounds(torch.tensor(-1.0), level, simultaneous=True)[1]
    return float(upper) - 0.01


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize(("n", "at_most"), [(3, 1.0), (10, 1.0), (50, 0.985), (1000, 0.965)])
def test_band_of_exact_quadratures_holds_at_all_eigenvalues_at_once(
    probes: int, n: int, at_most: float
) -> None:
    draws = 4000
    cumulated = shares(draws, probes, n).mean(1).cumsum(-1)
    away = (cumulated - torch.arange(1, n + 1) / n).abs().amax(-1)
    held = float((away <= band(probes, n, 0.95)).double().mean())
    # Three standard deviations of the simulation, 0.0034 each.
    assert 0.94 <= held <= at_most


def test_band_is_wider_than_pointwise_bounds_and_stays_a_probability() -> None:
    found = diagonal(SPECTRUM.double(), 4, 40, seed=0)
    points = torch.linspace(-2, 4, 50)
    lower, upper = found.cdf_bounds(points)
    low, high = found.cdf_bounds(points, simultaneous=True)
    inside = (lower > 0.05) & (upper < 0.95)
    assert inside.sum() > 20
    assert (low < lower)[inside].all()
    assert (high > upper)[inside].all()
    assert float(low.min()) == 0
    assert float(high.max()) == 1


SPECTRA: dict[str, Callable[[], torch.Tensor]] = {
    "flat": lambda: torch.linspace(1, 2, 300, dtype=torch.float64),
    "geometric": lambda: GEOMETRIC,
    "steep": lambda: GEOMETRIC**7,
    "one spike": lambda: torch.eye(300, dtype=torch.float64)[0],
    "spiked": spiked_spectrum,
}


@pytest.mark.parametrize("probes", [1, 4, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_a_mean_hold_from_one_probe_on(name: str, probes: int) -> None:
    spectrum = SPECTRA[name]()
    truth, draws = float(spectrum.mean()), 600 if len(spectrum) < 2000 else 300
    held, squares = 0, 0.0
    for found in exact_densities(spectrum, probes, draws):
        # Without residuals, it is unknown that the nodes are all eigenvalues.
        estimate = replace(found, residuals=None).mean(lambda x: x)
        low, high = estimate.interval()
        held += low <= truth <= high
        squares += estimate.stderr**2 / draws
    assert held >= 0.93 * draws
    variance = 2 / (len(spectrum) + 2) * float(spectrum.var(correction=0)) / probes
    assert squares == pytest.approx(variance, rel=0.15)


def test_the_rounding_of_products_is_part_of_the_interval() -> None:
    # Zeros of a matrix in float32 come out as 1e-7 |A|, which is far above the damping.
    factor = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    matvec = hf.batched(lambda v: factor.mT @ (factor @ v))
    found = hf.slq(matvec, torch.zeros(300), probes=4, steps=60, seed=0)
    low, high = found.effective_dimension(1e-6).interval()
    assert low <= 40 <= high


def test_mean_of_a_constant_has_no_error() -> None:
    found = diagonal(torch.full((50,), 3.0, dtype=torch.float64), 2, 5, seed=0)
    estimate = found.mean(torch.ones_like)
    assert (estimate.value, estimate.stderr) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert estimate.interval() == (pytest.approx(1), pytest.approx(1))


def test_nodes_of_no_weight_do_not_count() -> None:
    found = of_nodes([[0.0, 1.0, 2.0]], [[0.0, 0.5, 0.5]], 10)
    assert found.mean(lambda x: 1 / x).value == pytest.approx(0.75)
    assert found.mean(torch.log).value == pytest.approx(0.5 * math.log(2))


def test_mean_refuses_the_log_of_a_negative_node() -> None:
    found = of_nodes([[-9.0, -0.25, 1.0], [-0.5, 2.0, 3.0]], [[0, 0.5, 0.5], [0.2, 0.4, 0.4]], 10)
    with pytest.raises(ValueError, match=r"at 2 nodes, the smallest -0.5: shift the matrix, or"):
        found.mean(torch.log)


def test_the_mean_over_all_eigenvalues_is_exact() -> None:
    spectrum = SPECTRA["geometric"]()
    (found,) = exact_densities(spectrum, 2, 1)
    estimate = found.mean(torch.sqrt)
    assert estimate.value == pytest.approx(float(spectrum.sqrt().mean()), rel=1e-12)
    assert estimate.stderr == 0
    assert estimate.reason == "exact: all eigenvalues are known"


def test_ends_that_eigenvalues_pass_are_refused() -> None:
    found = diagonal(SPECTRUM.double(), 2, 30, seed=0)
    with pytest.raises(ValueError, match=r"smallest=0.0: a Ritz value lies at -0.9"):
        found.mean(torch.exp, smallest=0.0)
    with pytest.raises(ValueError, match="largest=1: a Ritz value lies at 2.9"):
        found.mean(torch.exp, largest=1)
