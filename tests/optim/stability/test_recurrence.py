from __future__ import annotations

import math

import pytest
import torch

from hessfunc.optim.stability.recurrence import (
    Recurrence,
    averaged,
    heavy_ball,
    lion,
    looking_ahead,
    nesterov,
)


def radius(r: Recurrence, lr: float, s: float) -> float:
    """Return the spectral radius of one step on s w^2 / 2."""
    M = torch.tensor([[r.rho - lr * r.q * s, -lr * r.p], [r.b * s, r.a]], dtype=torch.float64)
    return float(torch.linalg.eigvals(M).abs().max())


CASES = [
    Recurrence(),
    Recurrence(rho=0.7),
    heavy_ball(0.9),
    heavy_ball(0.9, 0.4),
    nesterov(0.8),
    averaged(0.95),
    looking_ahead(0.9, of_gradient=0.1, of_average=0.9),
    looking_ahead(0.9, of_gradient=0.4, of_average=0.3),
    lion(0.9, 0.99),
    # A complex pair of eigenvalues leaves the unit disc here.
    lion(0.99, 0.9),
    Recurrence(a=0.5, b=0.3, p=2.0, q=0.4, rho=0.9),
]


@pytest.mark.parametrize("recurrence", CASES, ids=str)
def test_the_spectral_radius_passes_one_at_the_limit(recurrence: Recurrence) -> None:
    limit = recurrence.limit(0.05)
    assert all(radius(recurrence, 0.05, ratio * limit) <= 1 for ratio in (0.01, 0.3, 0.7, 0.999))
    assert radius(recurrence, 0.05, 1.001 * limit) > 1


def test_limits_have_closed_forms() -> None:
    assert Recurrence().limit(0.1) == pytest.approx(20)
    assert heavy_ball(0.9).limit(0.1) == pytest.approx(38)
    assert nesterov(0.9).limit(0.1) == pytest.approx(38 / 2.8)
    assert averaged(0.9).limit(1e-3) == pytest.approx(38e3)
    assert looking_ahead(0.9, of_gradient=0.1, of_average=0.9).limit(0.1) == pytest.approx(
        3.8 / (0.1 * 2.8 * 0.1)
    )
    assert lion(0.9, 0.99).limit(0.1) == pytest.approx(3.98 / 0.019)


def test_a_momentum_that_ignores_the_gradient_is_stable_and_one_against_it_is_not() -> None:
    assert heavy_ball(0.9, dampening=1.0).limit(0.1) == math.inf
    assert heavy_ball(0.9, dampening=2.0).limit(0.1) == 0
