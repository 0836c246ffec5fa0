"""Intervals of eigenvalues."""

import pytest
import torch

from hessfunc.algorithms.results import Eigenpairs


def pairs(dtype: torch.dtype) -> Eigenpairs:
    return Eigenpairs(
        values=torch.tensor([5.0, -2.5], dtype=torch.float64),
        vectors={"a": torch.eye(2, dtype=torch.float64), "b": torch.zeros(2, 1, dtype=dtype)},
        residuals=torch.tensor([1e-3, 0.5], dtype=torch.float64),
        converged=torch.tensor([True, False]),
        largest=5.0,
        matvecs=12,
        passes=4,
        reason="budget exhausted",
        seed=0,
    )


def test_intervals_reach_a_residual_around_the_values() -> None:
    expected = torch.tensor([[4.999, 5.001], [-3.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(pairs(torch.float64).intervals, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intervals_allow_for_the_rounding_of_the_coarsest_leaf(dtype: torch.dtype) -> None:
    low, high = pairs(dtype).intervals.T
    assert bool((high - low >= 2 * pairs(dtype).residuals + torch.finfo(dtype).eps * 5.0).all())


def test_the_headline_counts_what_has_converged() -> None:
    assert "1 of 2" in repr(pairs(torch.float32))
