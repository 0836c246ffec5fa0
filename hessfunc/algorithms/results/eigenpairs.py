"""Eigenvalues and eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS, Achieved, pins, shown
from hessfunc.numerics import rounding
from hessfunc.trees import Tree, leaves


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues and eigenvectors, in the order that the algorithm states.

    Attributes:
        values: Ritz values, float64 ``(k,)``.
        vectors: Block of k orthonormal Ritz vectors v_i.
        residuals: Residual norms ``|A v_i - values_i v_i|`` from products with A, plus the rounding
            of these products as far as the run shows it, float64 ``(k,)``.
        converged: Whether each residual is within the tolerance of the run, bool ``(k,)``.
        largest: Largest absolute Ritz value of the run, the scale of the rounding of products.
        certificate: Largest probability with which the run would have missed an eigenvalue equal to
            a wanted one, or None if it was not computed.
    """

    values: Tensor
    vectors: Tree = field(metadata=VECTORS)
    residuals: Tensor
    converged: Tensor
    largest: float
    certificate: float | None = None

    def _headline(self) -> dict[str, object]:
        done = f"{int(self.converged.sum())} of {len(self.converged)}"
        residuals = shown(self.residuals, 2)
        headline: dict[str, object] = {
            "values": shown(self.values),
            "residuals": residuals,
            "converged": done,
        }
        if self.certificate is not None:
            missed = f"a repeated eigenvalue would be missed with p = {self.certificate:.2g}"
            headline["certificate"] = missed
        return headline

    def _sparkline(self) -> str:
        radii = (self.intervals[:, 1] - self.values).tolist()
        return pins(self.values.tolist(), radii, title="eigenvalues with their intervals")

    def achieved(self) -> Achieved:
        return Achieved(
            value=float(self.values[0]) if len(self.values) else None,
            converged=int(self.converged.sum()),
            wanted=len(self.converged),
        )

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        low, high = self.intervals.T.tolist()
        return {
            "index": range(1, len(self.values) + 1),
            "value": self.values.tolist(),
            "low": low,
            "high": high,
            "residual": self.residuals.tolist(),
            "converged": self.converged.tolist(),
        }

    @property
    def intervals(self) -> Tensor:
        """Intervals ``[value - residual, value + residual]``, float64 ``(k, 2)``.

        Each interval contains an eigenvalue; the index of that eigenvalue is not known. The
        intervals are widened by the rounding of the products.
        """
        # |lambda - value| <= |A v - value v| for some eigenvalue lambda of a symmetric A, |v| = 1.
        radius = self.residuals + rounding(
            max(torch.finfo(leaf.dtype).eps for leaf in leaves(self.vectors)), self.largest
        )
        return torch.stack([self.values - radius, self.values + radius], dim=1)
