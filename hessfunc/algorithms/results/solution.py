"""Solution of a linear system."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.algorithms.results.result import Result
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Result):
    """Solution of ``(A + damping I) x = b``.

    Attributes:
        x: Solution, a tree with the structure of b.
        residual: Residual norm ``|b - (A + damping I) x|``, measured at the end of the run. If the
            caller asked not to measure it, an upper bound, which adds the largest effect of
            rounding to the norm from the recurrence.
        converged: Whether the residual is within the tolerance of the run.
        negative_curvature: Unit vector p with ``p'(A + damping I) p <= 0`` that the run met, or
            None.
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
