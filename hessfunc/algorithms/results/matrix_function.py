"""Product of a function of a matrix with vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS, Achieved, shown
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class MatrixFunction(Result):
    """Products ``f(A) b`` for k vectors b.

    Attributes:
        value: Products, a tree with the structure of b: one vector, or a block of k vectors.
        bounds: Lower and upper bounds of the error norm ``|f(A) b - value|`` of each vector,
            float64 ``(k, 2)``, under the range of the eigenvalues that the run assumed.
        solved: Whether each upper bound is within the tolerance of the run, bool ``(k,)``.
        steps: Number of Lanczos steps of each vector.
        reasons: Reason for which each vector stopped.
    """

    value: Tree = field(metadata=VECTORS)
    bounds: Tensor
    solved: Tensor
    steps: tuple[int, ...]
    reasons: tuple[str, ...]

    @property
    def errors(self) -> Tensor:
        """Upper bounds of the error norms, float64 ``(k,)``."""
        return self.bounds[:, 1]

    @property
    def error(self) -> float:
        """Largest upper bound of an error norm."""
        return float(self.errors.max())

    @property
    def converged(self) -> bool:
        """Whether the errors of all vectors are within their tolerances."""
        return bool(self.solved.all())

    def _headline(self) -> dict[str, object]:
        if len(self.reasons) == 1:
            return {"error": f"{self.error:.2g}", "converged": self.converged}
        done = f"{int(self.solved.sum())} of {len(self.solved)}"
        return {"errors": shown(self.errors, 2), "converged": done}

    def achieved(self) -> Achieved:
        return Achieved(converged=int(self.solved.sum()), wanted=len(self.solved))

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        low, high = self.bounds.T.tolist()
        return {
            "column": range(len(self.bounds)),
            "smallest_error": low,
            "largest_error": high,
            "solved": self.solved.tolist(),
            "steps": self.steps,
            "reason": self.reasons,
        }
