"""Results of searches for critical and for generalized sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS, Achieved, shown
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class Sharpness(Result):
    """Critical sharpness of a loss along a direction, and the cost of the search.

    Attributes:
        value: Critical sharpness, 2 / step.
        step: Smallest step against the direction that raises the loss.
        bounds: Largest step tried that did not raise the loss, and smallest step that did.
        evaluations: Number of evaluations of the loss. The search makes no product.
    """

    value: float
    step: float
    bounds: tuple[float, float]
    evaluations: int

    @property
    def converged(self) -> bool:
        """Whether the bounds are within the tolerance."""
        return self.reason.startswith("converged")

    def _headline(self) -> dict[str, object]:
        low, high = self.bounds
        return {
            "value": f"{self.value:.6g}",
            "bounds": f"[{low:.4g}, {high:.4g}]",
            "evaluations": self.evaluations,
        }

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        low, high = self.bounds
        return {**super()._columns(), "largest_step": [low], "smallest_step": [high]}


@dataclass(frozen=True, kw_only=True, repr=False)
class GeneralizedSharpness(Result):
    """Largest value of d'Ad that was found over the unit ball of a norm, a lower bound.

    Attributes:
        value: Largest d'Ad of all runs. The maximum over the ball is at least as large.
        gap: Frank-Wolfe gap 2 (|Ad|* - d'Ad) of the best run, which is 0 at a local maximum.
        direction: Direction d of the best run, a tree with |d| <= 1.
        values: Value of each run, float64 ``(runs,)``. Their spread shows how much the local maxima
            differ.
    """

    value: float
    gap: float
    direction: Tree = field(metadata=VECTORS)
    values: Tensor

    @property
    def converged(self) -> bool:
        """Whether the gap of each run is within the tolerance."""
        return self.reason.startswith("converged")

    def _headline(self) -> dict[str, object]:
        return {
            "value": f"{self.value:.6g}",
            "gap": f"{self.gap:.2g}",
            "values": shown(self.values),
        }

    def achieved(self) -> Achieved:
        return Achieved(value=self.value)

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {"run": range(len(self.values)), "value": self.values.tolist()}
