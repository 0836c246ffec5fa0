"""Maximisation over logarithms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfunc.recipes.laplace.tuning import maximise

D = torch.float64
BEST = torch.tensor([1.0, -2.0], dtype=D)


def _smooth(x: Tensor) -> Tensor:
    return -(x - BEST).cosh().sum()


def test_the_maximum_is_found() -> None:
    point, reason = maximise(_smooth, torch.zeros(2, dtype=D), max_steps=50, tolerance=1e-8)
    torch.testing.assert_close(point, BEST, rtol=0, atol=1e-8)
    assert reason.startswith("converged")


def test_a_small_budget_is_reported() -> None:
    _, reason = maximise(_smooth, torch.zeros(2, dtype=D), max_steps=1, tolerance=1e-12)
    assert reason.startswith("did not converge")


def test_a_divergence_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="no maximum"):
        maximise(lambda x: x.sum(), torch.zeros(1, dtype=D), max_steps=200, tolerance=1e-12)
