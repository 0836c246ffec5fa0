"""Solution of a linear system with one or several right-hand sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS, Achieved, shown
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Result):
    """Solution of ``(A + damping I) x = b`` for k right-hand sides b, the columns.

    Attributes:
        x: Solution, a tree with the structure of b: one vector, or a block of k vectors.
        residuals: Residual norm ``|b - (A + damping I) x|`` of each column, measured at the end of
            the run, float64 ``(k,)``. If the caller asked not to measure it, an upper bound, which
            adds the largest effect of rounding to the norm from the recurrence.
        solved: Whether each residual is within the tolerance of the run, bool ``(k,)``.
        reasons: Reason for which each column stopped.
        negative_curvature: Unit vector p with ``p'(A + damping I) p <= 0`` that the run met, or
            None. Of several, the vector of the least curvature.
    """

    x: Tree = field(metadata=VECTORS)
    residuals: Tensor
    solved: Tensor
    reasons: tuple[str, ...]
    negative_curvature: Tree | None = field(metadata=VECTORS)

    @property
    def residual(self) -> float:
        """Largest residual norm of all columns."""
        return float(self.residuals.max())

    @property
    def converged(self) -> bool:
        """Whether the residuals of all columns are within their tolerances."""
        return bool(self.solved.all())

    def _headline(self) -> dict[str, object]:
        met = {"negative_curvature": self.negative_curvature is not None}
        if len(self.reasons) == 1:
            return {"residual": f"{self.residual:.2g}", "converged": self.converged, **met}
        done = f"{int(self.solved.sum())} of {len(self.solved)}"
        return {"residuals": shown(self.residuals, 2), "converged": done, **met}

    def achieved(self) -> Achieved:
        return Achieved(converged=int(self.solved.sum()), wanted=len(self.solved))

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {
            "column": range(len(self.residuals)),
            "residual": self.residuals.tolist(),
            "solved": self.solved.tolist(),
            "reason": self.reasons,
        }
