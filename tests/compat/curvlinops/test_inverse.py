"""Inverses of operators against dense inverses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from hessfunc.compat.curvlinops import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
    SubmatrixLinearOperator,
)
from hessfunc.compat.curvlinops.examples import TensorLinearOperator
from tests.compat.curvlinops.problem import matrix
from tests.reference.spectra import symmetric

POSITIVE = symmetric(torch.linspace(0.5, 1.8, 8).double())


def operator(dense: Tensor = POSITIVE) -> TensorLinearOperator:
    return TensorLinearOperator(dense)


def test_each_inverse_is_the_dense_one() -> None:
    expected = torch.linalg.inv(POSITIVE)
    for inverse in (
        CGInverseLinearOperator(operator(), tolerance=1e-10),
        CGInverseLinearOperator(operator(), eps=0, max_iter=50, max_tridiag_iter=50),
        LSMRInverseLinearOperator(operator(), atol=1e-12, btol=1e-12),
        NeumannInverseLinearOperator(operator(), num_terms=60),
        NeumannInverseLinearOperator(operator(), num_terms=60, scale=0.8),
    ):
        torch.testing.assert_close(matrix(inverse), expected, rtol=1e-4, atol=1e-6)
        assert (inverse @ torch.ones(8).double()).shape == (8,)
        torch.testing.assert_close(matrix(inverse.T), expected, rtol=1e-4, atol=1e-6)


def test_a_preconditioner_and_a_start_reach_cg() -> None:
    exact = torch.linalg.inv(POSITIVE)
    right = torch.ones(8).double()
    inverse = CGInverseLinearOperator(
        operator(),
        tolerance=1e-10,
        max_iter=3,
        preconditioner=lambda columns: exact @ columns,
        initial_guess=torch.ones(8).double(),
    )
    torch.testing.assert_close(inverse @ right, exact @ right)


def test_a_budget_gives_the_iterate_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rough = CGInverseLinearOperator(operator(), max_iter=2) @ torch.ones(8).double()
    # The first iterates of conjugate gradients, from the definition.
    x, r = torch.zeros(8).double(), torch.ones(8).double()
    p = r
    for _ in range(2):
        step = (r @ r) / (p @ POSITIVE @ p)
        x, new = x + step * p, r - step * POSITIVE @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    torch.testing.assert_close(rough, x)
    indefinite = symmetric(torch.linspace(-1.0, 1.0, 8).double())
    with pytest.warns(UserWarning, match="have not converged"):
        CGInverseLinearOperator(operator(indefinite)) @ torch.ones(8).double()
    with pytest.raises(TypeError, match="no option 'maxiter'"):
        CGInverseLinearOperator(operator(), maxiter=3)


def test_lsmr_inverts_what_is_not_symmetric() -> None:
    dense = POSITIVE + 0.3 * torch.ones(8, 8).double().triu(1)
    inverse = LSMRInverseLinearOperator(operator(dense), atol=1e-13, btol=1e-13)
    torch.testing.assert_close(matrix(inverse), torch.linalg.inv(dense), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(matrix(inverse.T), torch.linalg.inv(dense.mT), rtol=1e-6, atol=1e-8)
    assert len(inverse._lsmr_info) == 8


def test_a_diverging_series_is_named() -> None:
    with pytest.raises(ValueError, match="scale=9 if|scale=9: pass|diverges with scale=9"):
        NeumannInverseLinearOperator(operator(), num_terms=2000, scale=9.0) @ torch.ones(8).double()
    wild = NeumannInverseLinearOperator(operator(), num_terms=2000, scale=9.0, check_nan=False)
    assert not (wild @ torch.ones(8).double()).isfinite().all()


def test_an_operator_that_is_not_square_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="not square"):
        CGInverseLinearOperator(SubmatrixLinearOperator(operator(), [0], [1, 2]))
