"""Traces, diagonals and norms: exact where they must be, unbiased elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.compat.curvlinops import (
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from hessfunc.compat.curvlinops.examples import TensorLinearOperator
from tests.reference.spectra import symmetric

N = 30
LOW_RANK = symmetric(torch.cat([torch.tensor([9.0, 4.0]), torch.zeros(N - 2)]).double())
DENSE = torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double()
TRACES = [hutchinson_trace, hutchpp_trace, xtrace]


@pytest.mark.parametrize("estimate", [hutchpp_trace, xtrace])
@pytest.mark.parametrize("made", [lambda A: A, TensorLinearOperator])
def test_sketches_are_exact_for_a_low_rank(estimate: Any, made: Any) -> None:
    found = estimate(made(LOW_RANK), 12)
    torch.testing.assert_close(found, LOW_RANK.trace())
    torch.testing.assert_close(xdiag(made(LOW_RANK), 12), LOW_RANK.diagonal())


@pytest.mark.parametrize("estimate", TRACES)
@pytest.mark.parametrize("count", [1, 6, 24])
def test_traces_are_unbiased_also_without_symmetry(estimate: Any, count: int) -> None:
    torch.manual_seed(0)
    for A in (DENSE, TensorLinearOperator(DENSE)):
        found = torch.stack([estimate(A, num_matvecs=count) for _ in range(40)])
        spread = max(float(found.std()) / 40**0.5, 1e-8)
        assert abs(float(found.mean() - DENSE.trace())) < 4 * spread


@pytest.mark.parametrize("estimate", [hutchinson_diag, xdiag])
def test_diagonals_are_unbiased_also_without_symmetry(estimate: Any) -> None:
    torch.manual_seed(0)
    found = torch.stack([estimate(TensorLinearOperator(DENSE), 8) for _ in range(60)])
    off = (found.mean(0) - DENSE.diagonal()) / (found.std(0) / 60**0.5)
    assert float(off.abs().max()) < 5


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("shape", [(N, N), (N, 7), (7, N)])
def test_norms_are_unbiased_for_every_shape(shape: tuple[int, int], distribution: Any) -> None:
    torch.manual_seed(0)
    A = DENSE[: shape[0], : shape[1]]
    for made in (A, TensorLinearOperator(A)):
        found = torch.stack([hutchinson_squared_fro(made, 5, distribution) for _ in range(60)])
        assert abs(float(found.mean() - A.square().sum())) < 4 * float(found.std()) / 60**0.5


def test_results_are_repeatable_in_the_dtype_of_the_operator() -> None:
    def all_of(A: Tensor) -> list[Tensor]:
        torch.manual_seed(3)
        return [
            *(estimate(A, 6) for estimate in TRACES),
            hutchinson_diag(A, 6),
            xdiag(A, 6),
            hutchinson_squared_fro(A, 6),
        ]

    first, second = all_of(DENSE.float()), all_of(DENSE.float())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {found.dtype for found in first} == {torch.float32}
    assert [found.dim() for found in first] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("estimate", [*TRACES, hutchinson_diag, hutchinson_squared_fro])
def test_wrong_options_are_named(estimate: Any) -> None:
    with pytest.raises(ValueError, match="choose 'rademacher' or 'normal'"):
        estimate(DENSE, 6, distribution="uniform")
    with pytest.raises(ValueError, match="num_matvecs"):
        estimate(DENSE, 0)
