"""Rayleigh-Ritz approximation of eigenpairs, and the order in which they are wanted."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Which: TypeAlias = Literal["LM", "LA", "SA", "BE"]


def rayleigh_ritz(projected: Tensor, /) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of a matrix, ascending, and their coefficients in a basis.

        T Y = Y diag(values),  T = V A V'

    The Ritz vectors are the rows of Y'V.

    Args:
        projected: Matrix T of inner products of orthonormal rows V with their products, ``(m, m)``.
            Rounding may make it asymmetric.

    Returns:
        Values ``(m,)`` and columns Y ``(m, m)``, in float64 on the CPU.
    """
    projected = projected.cpu().double()
    values, coefficients = torch.linalg.eigh((projected + projected.mT) / 2)
    return values, coefficients


def preferred(which: Which, values: Tensor, /) -> Tensor:
    """Return the indices of ascending values, the most wanted first."""
    last = len(values) - 1
    if which == "LM":
        return values.abs().argsort(descending=True)
    if which == "BE":
        order = [i // 2 if i % 2 else last - i // 2 for i in range(last + 1)]
        return torch.tensor(order, dtype=torch.int64, device="cpu")
    ascending = torch.arange(last + 1, device="cpu")
    return ascending if which == "SA" else ascending.flip(0)


def wanted(which: Which, values: Tensor, k: int, /) -> Tensor:
    """Return the indices of the k wanted among ascending values, in the order of a result."""
    indices = preferred(which, values)[:k]
    return indices.sort(descending=True).values if which == "BE" else indices
