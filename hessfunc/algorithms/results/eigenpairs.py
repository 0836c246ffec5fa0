"""Eigenvalues with vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Result, shown
from hessfunc.numerics import rounding
from hessfunc.trees import Tree, leaves


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues with vectors, in the order that the algorithm states.

    Attributes:
        values: Ritz values, float64 ``(k,)``.
        vectors: a block of k orthonormal vectors.
        residuals: ``|A v_i - values_i v_i|``, float64 ``(k,)``; measured with A at the end.
        converged: whether the residual is within the stated tolerance, bool ``(k,)``.
        largest: the largest absolute Ritz value that was seen, the scale of rounding.
    """

    values: Tensor
    vectors: Tree
    residuals: Tensor
    converged: Tensor
    largest: float

    def _headline(self) -> dict[str, object]:
        done = f"{int(self.converged.sum())} of {len(self.converged)}"
        residuals = shown(self.residuals, 2)
        return {"values": shown(self.values), "residuals": residuals, "converged": done}

    @property
    def intervals(self) -> Tensor:
        """``[value - residual, value + residual]``, ``(k, 2)``: some eigenvalue lies in each.

        Widened by the rounding of the products. Nothing is promised about the index of that
        eigenvalue.
        """
        radius = self.residuals + rounding(
            max(torch.finfo(leaf.dtype).eps for leaf in leaves(self.vectors)), self.largest
        )
        return torch.stack([self.values - radius, self.values + radius], dim=1)
