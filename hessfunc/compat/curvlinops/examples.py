"""Operators of plain tensors, and the gradient of an empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfunc.compat.curvlinops.curvature import CurvatureLinearOperator
from hessfunc.compat.curvlinops.operator import Composed, PyTorchLinearOperator


class IdentityLinearOperator(Composed):
    """Identity matrix.

    Args:
        shape: Shape of each tensor of a vector.
        device: Device of the vectors.
        dtype: Dtype of the vectors.
    """

    SELF_ADJOINT = True

    def __init__(
        self, shape: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(torch.zeros((), dtype=dtype, device=device), shape, shape)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return X


class TensorLinearOperator(Composed):
    """Dense matrix ``(m, n)`` as an operator on flat vectors."""

    def __init__(self, A: Tensor) -> None:
        if A.dim() != 2:
            raise ValueError(f"a tensor of shape {tuple(A.shape)} is not a matrix: pass (m, n)")
        super().__init__(A, [(A.shape[1],)], [(A.shape[0],)])
        self.SELF_ADJOINT = A.shape[0] == A.shape[1] and torch.allclose(A, A.mT)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._A @ X[0]]

    def _adjoint(self) -> TensorLinearOperator:
        return TensorLinearOperator(self._A.mT)


class OuterProductLinearOperator(TensorLinearOperator):
    """Sum of outer products ``sum_i c_i a_i a_i'``.

    Args:
        c: Coefficients ``(k,)``.
        A: Vectors a_i as columns, ``(n, k)``.
    """

    def __init__(self, c: Tensor, A: Tensor) -> None:
        super().__init__(A)
        PyTorchLinearOperator.__init__(self, [(len(A),)], [(len(A),)])
        self._c, self.SELF_ADJOINT = c, True

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._A @ (self._c[:, None] * (self._A.mT @ X[0]))]


def gradient_and_loss(
    model_func: Any,
    loss_func: Callable[[Any, Any], Tensor],
    params: Sequence[Tensor] | Mapping[str, Tensor],
    data: Iterable[Any],
    num_data: int | None = None,
    batch_size_fn: Callable[[Any], int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return the gradient, a list of tensors, and the loss of the data set.

    Arguments are those of `CurvatureLinearOperator`.
    """
    risk = CurvatureLinearOperator(
        model_func,
        loss_func,
        params,
        data,
        check_deterministic=False,
        num_data=num_data,
        batch_size_fn=batch_size_fn,
    )
    return risk.gradient_and_loss()
