"""Result of a check of a matvec."""

from __future__ import annotations

from dataclasses import dataclass

from hessfunc.algorithms.results.result import Saved
from hessfunc.display import Displayed


@dataclass(frozen=True, repr=False)
class Check(Displayed, Saved):
    """Result of `check`, which is true if there is no problem.

    Differences are relative to the length of a product.

    Attributes:
        nondeterminism: Largest difference of two products with the same vector.
        nonlinearity: Largest difference of A(2x - 3y) and 2Ax - 3Ay.
        asymmetry: Largest difference of y'Ax and x'Ay.
        inconsistency: Difference of the products and finite differences of the gradient; None if
            no gradient was given, or if the gradient is random.
        resolution: Difference of the two finite differences that agree best. A smaller error of the
            product cannot be detected. None if ``inconsistency`` is None.
        consistent: Whether the product is the derivative of the gradient; None if no gradient was
            given, or if kinks of the loss or rounding leave it undecided.
        tolerance: Largest difference that is accepted.
        problems: Description of each problem, with its usual causes; empty if there is none.
        notes: Observations that look like a problem and are none.
    """

    nondeterminism: float
    nonlinearity: float
    asymmetry: float
    inconsistency: float | None
    resolution: float | None
    consistent: bool | None
    tolerance: float
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.problems or self.notes:
            return "\n".join(self.problems + self.notes)
        passed = "linear, symmetric and deterministic"
        if self.inconsistency is None or self.resolution is None:
            return passed
        shown = max(self.inconsistency, self.resolution)
        return (
            f"{passed}, and the derivative of the gradient up to {100 * shown:.1g} % of the length "
            "of a product, the resolution of the finite differences"
        )

    def _headline(self) -> dict[str, object]:
        names = ("nondeterminism", "nonlinearity", "asymmetry", "inconsistency", "tolerance")
        differences = {name: getattr(self, name) for name in names}
        return {
            "passed": bool(self),
            **{name: f"{x:.2g}" for name, x in differences.items() if x is not None},
            "consistent": "unknown" if self.consistent is None else self.consistent,
            **({"problems": "; ".join(self.problems)} if self.problems else {}),
            **({"notes": "; ".join(self.notes)} if self.notes else {}),
        }
