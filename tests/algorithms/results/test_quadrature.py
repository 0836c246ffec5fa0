"""Bounds of integrals over spectral measures."""

from __future__ import annotations

import math

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.results import Density
from tests.algorithms.densities import BRACKETED, DECAY, diagonal, of_nodes


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("name", BRACKETED)
def test_bounds_enclose_what_the_quadrature_misses(name: str, steps: int) -> None:
    f, ends = BRACKETED[name]
    probes = hf.random_like(DECAY, 2, kind="sphere", seed=4).square() / len(DECAY)
    right = float((probes @ f(DECAY)).mean())
    estimate = diagonal(DECAY, 2, steps, seed=4).mean(f, **ends)
    low, high = estimate.bounds or (math.nan, math.nan)
    assert low - 1e-12 <= right <= high + 1e-12
    assert low <= estimate.value <= high
    assert estimate.interval()[0] <= low - estimate.stderr
    assert high + estimate.stderr <= estimate.interval()[1]


def test_bounds_close_as_steps_resolve_the_function() -> None:
    for name in ("log", "ratio", "exponential", "identity"):
        f, ends = BRACKETED[name]
        flat = torch.linspace(1, 2, 300, dtype=torch.float64)
        estimate = diagonal(flat, 2, 20, seed=0).mean(f, **ends)
        low, high = estimate.bounds or (math.nan, math.nan)
        assert high - low <= 1e-9 * abs(estimate.value)


@pytest.mark.parametrize("steps", [5, 10, 40])
def test_intervals_of_few_steps_cover_an_effective_dimension(steps: int) -> None:
    right, held = float((DECAY / (DECAY + 1e-6)).sum()), 0
    for seed in range(10):
        low, high = diagonal(DECAY, 4, steps, seed).effective_dimension(1e-6).interval()
        held += low <= right <= high
        assert 0.0 <= high - low <= 1200
    assert held >= 9


def test_a_function_that_is_not_finite_within_the_spectrum_has_no_bounds() -> None:
    estimate = diagonal(DECAY, 2, 10, seed=0).mean(torch.log)
    assert estimate.interval()[0] == -math.inf
    assert "without bounds" in estimate.reason
    pole = diagonal(DECAY, 2, 5, seed=0).mean(lambda x: x / (x + 1e-3))
    low, high = pole.interval()
    assert low <= float((DECAY / (DECAY + 1e-3)).mean()) <= high


def test_unknown_residuals_leave_bounds_unknown() -> None:
    found = Density(**{**vars(of_nodes([[1.0, 2.0]], [[0.5, 0.5]], 10)), "residuals": None})
    assert found.mean(torch.exp).interval() == (-math.inf, math.inf)
    low, high = found.mean(torch.exp, smallest=1.0, largest=2.0).bounds or (0.0, 0.0)
    assert math.exp(1) <= low < high <= math.exp(2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_pole_beside_a_node_leaves_no_bounds(steps: int) -> None:
    """The range of few steps is large, and 1 / x has its pole at a small part of it."""
    values = torch.logspace(0, -8, 200, dtype=torch.float64)
    for seed in range(3):
        found = hf.slq(lambda v: v * values, torch.zeros(200).double(), steps=steps, seed=seed)
        low, high = found.mean(torch.reciprocal).interval(0.95)
        assert low <= float((1 / values).mean()) <= high
