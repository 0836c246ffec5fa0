"""Smoothed densities against those of the exact spectrum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.compat.curvlinops import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from hessfunc.compat.curvlinops.examples import TensorLinearOperator
from tests.reference.spectra import symmetric

# Lanczos ends after four steps, so that nodes are eigenvalues, and weights are near 1/4 each.
VALUES = torch.tensor([-1.0, 0.5, 2.0, 4.0]).double()
A = TensorLinearOperator(symmetric(VALUES.repeat(100)))


def integral(grid: Tensor, density: Tensor) -> float:
    return float(torch.trapezoid(density, grid))


def test_the_grid_covers_the_spectrum_and_the_density_has_its_peaks() -> None:
    torch.manual_seed(0)
    grid, density = lanczos_approximate_spectrum(A, 40, num_points=2000, num_repeats=3)
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([-1.25, 4.25]).double())
    assert integral(grid, density) == pytest.approx(1, abs=1e-3)
    sigma = 5.5 / 39 / math.sqrt(8 * math.log(3))
    for value in VALUES:
        mass = integral(*(x[(grid - value).abs() < 5 * sigma] for x in (grid, density)))
        assert mass == pytest.approx(0.25, abs=0.06)
        top = density[(grid - value).abs().argmin()]
        assert float(top) == pytest.approx(mass / math.sqrt(2 * math.pi) / sigma, rel=0.02)


def test_given_boundaries_are_taken() -> None:
    grid, _ = lanczos_approximate_spectrum(A, 8, boundaries=(None, 10.0), margin=0.0)
    assert (float(grid[0]), float(grid[-1])) == (pytest.approx(-1), 10.0)


def test_the_density_of_absolute_values_is_on_a_logarithmic_grid() -> None:
    torch.manual_seed(0)
    grid, density = lanczos_approximate_log_spectrum(
        A, 100, num_points=4000, num_repeats=2, margin=0.2
    )
    assert grid.log().diff().std() < 1e-10
    assert float(grid[0]) < 0.5
    assert float(grid[-1]) > 4
    assert integral(grid, density) == pytest.approx(1, abs=0.05)
    ends, _ = lanczos_approximate_log_spectrum(A, 10, boundaries=(0.1, 10.0), margin=0, epsilon=0.0)
    torch.testing.assert_close(ends[[0, -1]], torch.tensor([0.1, 10.0]).double())


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (LanczosApproximateSpectrumCached, "approximate_spectrum"),
        (LanczosApproximateLogSpectrumCached, "approximate_log_spectrum"),
    ],
)
def test_further_estimates_share_the_runs(kind: Any, method: str) -> None:
    calls = []

    class Counted(TensorLinearOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            calls.append(X[0].shape[-1])
            return super()._matmat(X)

    runs = kind(Counted(symmetric(VALUES.repeat(10))), 6)
    first = getattr(runs, method)(num_repeats=2)
    before = len(calls)
    again = getattr(runs, method)(num_repeats=2)
    narrow = getattr(runs, method)(num_repeats=1, kappa=50.0, num_points=100)
    assert len(calls) == before
    assert torch.equal(first[1], again[1])
    assert len(narrow[0]) == 100


@pytest.mark.parametrize(
    ("options", "name"),
    [({"ncv": 1}, "ncv"), ({"kappa": 1.0}, "kappa"), ({"num_repeats": 0}, "num")],
)
def test_wrong_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        lanczos_approximate_spectrum(A, **{"ncv": 8, **options})
