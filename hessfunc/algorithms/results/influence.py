"""Influence of training examples on the losses of query examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import Achieved
from hessfunc.options import validated


@dataclass(frozen=True, kw_only=True, repr=False)
class Influence(Result):
    """Scores of m training examples for q queries, with the residuals of the linear systems.

        S[i, j] = g_i' (A + damping I)^-1 g_j

    A positive score means that a larger weight of the training example lowers the loss of the
    query.

    Attributes:
        scores: Scores S, float64 ``(q, m)``, in the order of the queries and training examples.
        damping: Number that was added to the diagonal of A.
        residuals: Norm ``|g_i - (A + damping I) x_i|`` of the residual of each query, float64
            ``(q,)``. With a projection on the top singular directions, an upper bound that
            contains the part of g_i outside of them.
        solved: Whether the residual of each solve was within the tolerance, bool ``(q,)``.
        query_norms: Norm ``|g_i|`` of the gradient of each query, float64 ``(q,)``.
        train_norms: Norm ``|g_j|`` of the gradient of each training example, float64 ``(m,)``.
        by_leaf: Part of the scores of each leaf, float64 ``(q, m)`` by name, which add up to
            the scores; None if not requested.
        by_token: Part of the scores of each token of a training example, float64 ``(q, m, T)``,
            which add up to the scores; None if not requested.
    """

    scores: Tensor
    damping: float
    residuals: Tensor
    solved: Tensor
    query_norms: Tensor
    train_norms: Tensor
    by_leaf: dict[str, Tensor] | None
    by_token: Tensor | None = None

    @property
    def relative_residuals(self) -> Tensor:
        """Residual of each query relative to the norm of its gradient, float64 ``(q,)``."""
        return torch.where(self.query_norms > 0, self.residuals / self.query_norms, 0.0)

    @property
    def converged(self) -> bool:
        """Whether the residuals of all solves were within the tolerance."""
        return bool(self.solved.all())

    @property
    def error_bounds(self) -> Tensor:
        """Bound of the error of each score for a positive semi-definite A, float64 ``(q, m)``.

        The error is ``r_i' (A + damping I)^-1 g_j``, at most ``|r_i| |g_j| / damping``. Without
        damping the bound is infinite.
        """
        return _bounds(torch.outer(self.residuals, self.train_norms), self.damping)

    @validated
    def top(self, k: int, /) -> tuple[Tensor, Tensor]:
        """Return the k training examples whose weight lowers the loss of each query most.

        Returns:
            Indices ``(q, k)`` of the training examples with the largest scores, in descending
            order, and these scores ``(q, k)``.
        """
        return _ordered(self.scores, k, largest=True)

    @validated
    def bottom(self, k: int, /) -> tuple[Tensor, Tensor]:
        """Return the k training examples whose weight raises the loss of each query most.

        Returns:
            Indices ``(q, k)`` of the training examples with the smallest scores, in ascending
            order, and these scores ``(q, k)``.
        """
        return _ordered(self.scores, k, largest=False)

    def _headline(self) -> dict[str, object]:
        return {
            "shape": tuple(self.scores.shape),
            "damping": f"{self.damping:.3g}",
            "relative_residual": f"{float(self.relative_residuals.max()):.2g}",
            "converged": f"{int(self.solved.sum())} of {len(self.solved)}",
        }

    def achieved(self) -> Achieved:
        return Achieved(converged=int(self.solved.sum()), wanted=len(self.solved))

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        queries, examples = self.scores.shape
        parts = {} if self.by_leaf is None else self.by_leaf
        return {
            "query": [i for i in range(queries) for _ in range(examples)],
            "example": list(range(examples)) * queries,
            "score": self.scores.flatten().tolist(),
            **{name: part.flatten().tolist() for name, part in parts.items()},
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class SelfInfluence(Result):
    """Influence of each training example on its own loss.

        s[j] = g_j' (A + damping I)^-1 g_j

    Attributes:
        scores: Scores s, float64 ``(m,)``, not negative for a positive semi-definite A.
        damping: Number that was added to the diagonal of A.
        residuals: Norm ``|g_j - (A + damping I) x_j|`` of the residual of each example, float64
            ``(m,)``.
        solved: Whether each residual was within the tolerance, bool ``(m,)``.
        norms: Norm ``|g_j|`` of the gradient of each example, float64 ``(m,)``.
    """

    scores: Tensor
    damping: float
    residuals: Tensor
    solved: Tensor
    norms: Tensor

    @property
    def converged(self) -> bool:
        """Whether the residuals of all examples are within the tolerance."""
        return bool(self.solved.all())

    @property
    def error_bounds(self) -> Tensor:
        """Bound of the error of each score for a positive semi-definite A, float64 ``(m,)``.

        The error is at most ``|r_j| |g_j| / damping``. Without damping the bound is infinite.
        """
        return _bounds(self.residuals * self.norms, self.damping)

    @validated
    def top(self, k: int, /) -> tuple[Tensor, Tensor]:
        """Return the indices ``(k,)`` of the largest scores in descending order, and the scores."""
        return _ordered(self.scores, k, largest=True)

    def _headline(self) -> dict[str, object]:
        return {
            "examples": len(self.scores),
            "damping": f"{self.damping:.3g}",
            "largest": f"{float(self.scores.max()):.6g}",
            "converged": f"{int(self.solved.sum())} of {len(self.solved)}",
        }

    def achieved(self) -> Achieved:
        return Achieved(converged=int(self.solved.sum()), wanted=len(self.solved))

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {
            "example": range(len(self.scores)),
            "score": self.scores.tolist(),
            "residual": self.residuals.tolist(),
            "norm": self.norms.tolist(),
        }


def _bounds(products: Tensor, damping: float) -> Tensor:
    return products / damping if damping > 0 else torch.full_like(products, torch.inf)


def _ordered(scores: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    examples = scores.shape[-1]
    if not 1 <= k <= examples:
        raise ValueError(f"k={k}: choose a number from 1 to {examples}, that of training examples")
    values, indices = scores.sort(dim=-1, descending=largest, stable=True)
    return indices[..., :k], values[..., :k]
