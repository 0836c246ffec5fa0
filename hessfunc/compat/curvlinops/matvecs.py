"""Conversion between linear operators and matvecs on vector blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.trees import Matvec


def as_matvec(A: PyTorchLinearOperator | Tensor, /) -> tuple[Matvec, Tensor]:
    """Return the matvec of the symmetric part of a square matrix on flat vectors, and a vector.

    The symmetric part has the same trace, diagonal and quadratic forms as the matrix.

    Raises:
        ValueError: If the matrix is not square.
    """
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(
            f"the matrix has shape {tuple(A.shape)}, which is not square: pass a square operator "
            "or tensor"
        )
    like = torch.zeros(A.shape[1], dtype=A.dtype, device=A.device)
    if isinstance(A, Tensor):
        symmetric = (A + A.mT) / 2
        return lambda rows: rows @ symmetric, like
    if A.SELF_ADJOINT:
        return lambda rows: (A @ rows.mT).mT, like
    other = A.adjoint()
    return lambda rows: (A @ rows.mT + other @ rows.mT).mT / 2, like


def columns(leaves: Sequence[Tensor], /) -> list[Tensor]:
    """Return tensors with the axis of vectors first as tensors with this axis last."""
    return [leaf.movedim(0, -1) for leaf in leaves]


def block_of(X: Sequence[Tensor], names: Sequence[str], /) -> dict[str, Tensor]:
    """Return tensors with the axis of vectors last as a vector block."""
    return {name: x.movedim(-1, 0) for name, x in zip(names, X, strict=True)}
