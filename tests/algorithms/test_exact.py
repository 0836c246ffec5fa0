"""Small matrices are multiplied by all unit vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hessfunc as hf
from tests.reference.spectra import symmetric


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("estimator", [hf.hutchinson, hf.xtrace, hf.xnystrace, hf.hutchpp])
def test_traces(estimator: Callable[..., hf.results.Estimate], n: int) -> None:
    matrix = symmetric(torch.linspace(1, 2, n))
    found = estimator(hf.dense(matrix), torch.zeros(n).double(), block_size=20, seed=0)
    # A single product is made twice, as no other one tells whether products are random.
    assert (found.matvecs, found.passes) == ((n, 1) if n > 1 else (2, 2))
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-13)
    low, high = found.interval()
    assert low <= float(matrix.trace()) <= high
    assert high - low < 1e-12
    assert found.squared_frobenius is not None
    assert found.squared_frobenius.value == pytest.approx(float(matrix.square().sum()))


@pytest.mark.parametrize("n", [1, 2, 20, 60])
@pytest.mark.parametrize("estimator", [hf.xdiag, hf.hutchinson_diagonal])
def test_diagonals(estimator: Callable[..., hf.results.DiagonalEstimate], n: int) -> None:
    matrix = symmetric(torch.linspace(-1, 2, n))
    found = estimator(hf.dense(matrix), torch.zeros(n).double(), seed=0)
    torch.testing.assert_close(found.value, matrix.diagonal())
    assert found.matvecs == max(n, 2)
    torch.testing.assert_close(found.squared_row_norms.value, matrix.square().sum(0))


def test_a_budget_below_the_dimension_is_kept() -> None:
    found = hf.xtrace(hf.dense(torch.eye(10)), torch.zeros(10), max_matvecs=6, seed=0)
    assert found.matvecs == 6


def test_the_trace_of_a_matrix_that_is_not_symmetric_by_unit_vectors() -> None:
    B = torch.arange(9, dtype=torch.float64).view(3, 3)
    found = hf.hutchinson(lambda v: v @ B.mT, torch.zeros(3, dtype=torch.float64), max_matvecs=5)
    assert found.value == pytest.approx(12)
    assert found.matvecs == 4
