"""Result of a check of a matvec."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What `check` found; true where nothing is wrong.

    Attributes:
        nondeterminism: the largest difference of two equal products.
        nonlinearity: the largest difference of A(2x - 3y) and 2Ax - 3Ay.
        asymmetry: the difference of y'Ax and x'Ay.
        inconsistency: the difference from finite differences of the gradient; None where no
            gradient was given, or it is random.
        resolution: Difference of the two finite differences that agree best: a smaller error of the
            product would not be seen. None where ``inconsistency`` is.
        consistent: whether the product is the derivative of the gradient; None where that was not
            asked, or where kinks of the loss or rounding leave it undecided.
        tolerance: that each of them, relative to the size of the products, must not exceed.
        problems: what is wrong, and what usually causes it; empty if nothing is.
        notes: what looks wrong and is not.
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
            "of a product, which is what finite differences show here"
        )
