from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessfunc.algorithms.functions.accuracy import projected
from hessfunc.algorithms.recurrences import Recurrence

EPS = torch.finfo(torch.float64).eps


def recurrence_of(values: Tensor, weights: Tensor, steps: int) -> Recurrence:
    """The Lanczos recurrence of a diagonal matrix from a vector with these squared entries."""
    rows = [(weights / weights.sum()).sqrt()]
    alphas, betas = [], []
    for _ in range(steps):
        row = values * rows[-1]
        alphas.append(float(row @ rows[-1]))
        for _ in range(2):
            for other in rows:
                row = row - (row @ other) * other
        betas.append(float(row.norm()))
        rows.append(row / row.norm())
    return tuple(alphas), tuple(betas)


def test_bounds_of_the_inverse_are_those_of_its_residual() -> None:
    # For f = 1 / x the error is A^-1 times the residual, whose norm is beta |e_m'f(T) e_1|.
    values = torch.linspace(1, 4, 50).double()
    recurrence = recurrence_of(values, torch.ones(50).double(), 6)
    found = projected(recurrence, torch.reciprocal, smallest=1.0, largest=4.0, n=50, eps=EPS)
    residual = recurrence[1][-1] * abs(float(found.coefficients[-1]))
    assert found.upper == pytest.approx(residual / 1.0, rel=1e-6)
    assert found.lower == pytest.approx(residual / 4.0, rel=1e-6)
    assert found.ends == (1.0, 4.0)


def test_polynomials_of_a_lower_degree_have_no_error() -> None:
    values = torch.linspace(-2, 3, 40).double()
    recurrence = recurrence_of(values, torch.ones(40).double(), 4)
    found = projected(recurrence, lambda x: x**3 - x, smallest=None, largest=None, n=40, eps=EPS)
    # The default range is wider than the spectrum, and the polynomial is large at its ends.
    size = max(abs(end) for end in found.ends) ** 3
    assert found.upper <= 1e-12 * size


@pytest.mark.parametrize("f", [torch.abs, lambda x: torch.exp(5 * x)])
def test_the_default_range_is_that_of_the_ritz_pairs(f: Callable[[Tensor], Tensor]) -> None:
    values = torch.linspace(-1, 1, 200).double()
    weights = torch.rand(200, generator=torch.Generator().manual_seed(1)).double() + 0.1
    found = projected(
        recurrence_of(values, weights, 40), f, smallest=None, largest=None, n=200, eps=EPS
    )
    low, high = found.ends
    assert -1.1 < low <= -1
    assert 1 <= high < 1.1


def test_a_pole_within_the_range_has_no_bound() -> None:
    recurrence = recurrence_of(torch.linspace(1, 2, 30).double(), torch.ones(30).double(), 3)
    found = projected(recurrence, torch.log, smallest=0.0, largest=2.0, n=30, eps=EPS)
    assert found.upper == math.inf
    assert found.lower == 0


def test_a_step_moves_by_rounding_where_it_meets_a_ritz_value() -> None:
    recurrence: Recurrence = (1.0, 2.0), (1e-3, 0.0)
    for at, rounded in ((1.5, False), (2.000001, True)):
        found = projected(
            recurrence, lambda x, at=at: (x > at).double(), smallest=0.0, largest=3.0, n=2, eps=1e-6
        )
        assert (found.rounded > 1e-4) == rounded
        assert found.upper == 0
