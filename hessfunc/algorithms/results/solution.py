"""The solution of a linear system."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.algorithms.results.result import Result
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Result):
    """A solution of ``(A + damping I) x = b``.

    Attributes:
        x: a tree like b.
        residual: ``|b - (A + damping I) x|``, as measured at the end; where it was not to be
            measured, a bound: the length by the recurrence, and what rounding may have added.
        converged: whether the residual is within the stated tolerance.
        negative_curvature: a direction p with ``p'(A + damping I) p <= 0`` and unit length, where
            one was met; None otherwise.
    """

    x: Tree
    residual: float
    converged: bool
    negative_curvature: Tree | None

    def _headline(self) -> dict[str, object]:
        return {
            "residual": f"{self.residual:.2g}",
            "converged": self.converged,
            "negative_curvature": self.negative_curvature is not None,
        }
