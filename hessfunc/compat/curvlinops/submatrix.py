"""Submatrices of linear operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.operator import Composed, PyTorchLinearOperator
from hessfunc.options import validated


class SubmatrixLinearOperator(Composed):
    """Submatrix of an operator on flat vectors, with given rows and columns.

    Args:
        A: Operator.
        row_idxs: Indices of the rows, each once.
        col_idxs: Indices of the columns, each once.

    Raises:
        ValueError: If an index is out of range, or there twice.
    """

    @validated(**CHECKS)
    def __init__(
        self, A: PyTorchLinearOperator, row_idxs: Sequence[int], col_idxs: Sequence[int]
    ) -> None:
        self._A = A
        self.set_submatrix(row_idxs, col_idxs)

    @validated(**CHECKS)
    def set_submatrix(self, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        """Choose other rows and columns of the same operator."""
        A = self._A
        for name, indices, size in (
            ("row_idxs", row_idxs, A.shape[0]),
            ("col_idxs", col_idxs, A.shape[1]),
        ):
            if len(set(indices)) < len(indices) or not set(indices) <= set(range(size)):
                raise ValueError(
                    f"{name} must have distinct integers from 0 to {size - 1}: pass for instance "
                    f"{name}=[0]"
                )
        Composed.__init__(self, A, [(len(col_idxs),)], [(len(row_idxs),)], named=False)
        self._row_idxs, self._col_idxs = list(row_idxs), list(col_idxs)
        self.SELF_ADJOINT = A.SELF_ADJOINT and self._row_idxs == self._col_idxs

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        whole = X[0].new_zeros(self._A.shape[1], X[0].shape[-1])
        whole[self._col_idxs] = X[0]
        return [(self._A @ whole)[self._row_idxs]]

    def _adjoint(self) -> SubmatrixLinearOperator:
        return SubmatrixLinearOperator(self._A.adjoint(), self._col_idxs, self._row_idxs)
