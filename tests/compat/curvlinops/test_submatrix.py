"""Submatrices against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hessfunc.compat.curvlinops import SubmatrixLinearOperator
from hessfunc.compat.curvlinops.examples import TensorLinearOperator
from tests.compat.curvlinops.problem import matrix

DENSE = torch.arange(20.0).reshape(4, 5)


def test_products_are_those_of_the_submatrix() -> None:
    A = SubmatrixLinearOperator(TensorLinearOperator(DENSE), [2, 0], [4, 1, 3])
    expected = DENSE[[2, 0]][:, [4, 1, 3]]
    assert A.shape == (2, 3)
    torch.testing.assert_close(matrix(A), expected)
    torch.testing.assert_close(matrix(A.adjoint()), expected.mT)
    symmetric = TensorLinearOperator(DENSE[:, :4] + DENSE[:, :4].mT)
    assert SubmatrixLinearOperator(symmetric, [1, 2], [1, 2]).SELF_ADJOINT
    assert not SubmatrixLinearOperator(symmetric, [1, 2], [2, 1]).SELF_ADJOINT


def test_other_rows_and_columns_of_the_same_operator() -> None:
    A = SubmatrixLinearOperator(TensorLinearOperator(DENSE), [2], [4])
    A.set_submatrix([0, 1], [3])
    assert A.shape == (2, 1)
    torch.testing.assert_close(matrix(A), DENSE[[0, 1]][:, [3]])


@pytest.mark.parametrize("indices", [[0, 0], [-1], [5]])
def test_wrong_indices_are_refused(indices: Any) -> None:
    with pytest.raises(ValueError, match="col_idxs must have distinct integers from 0 to 4"):
        SubmatrixLinearOperator(TensorLinearOperator(DENSE), [0], indices)
