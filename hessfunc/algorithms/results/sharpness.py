"""Result of a search for critical sharpness."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.algorithms.results.result import Result


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
