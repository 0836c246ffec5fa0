"""Solvers of the Newton equation of one parameter tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from hessfunc.algorithms.solve.cg import cg
from hessfunc.options import at_least, validated
from hessfunc.transforms.matvecs.arithmetic import scale
from hessfunc.trees import Matvec


@dataclass(frozen=True)
class Direction:
    """Newton direction of one parameter tensor, before multiplication by the learning rate.

    Attributes:
        value: Direction, with the shape of the parameter.
        matvecs: Number of products used.
        converged: Whether the direction solves the equation within the tolerance.
        negative_curvature: Whether the matrix proved not to be positive definite.
    """

    value: Tensor
    matvecs: int = 0
    converged: bool = True
    negative_curvature: bool = False


# Function (block, b, alpha) -> solution d of [(1 - alpha) H + alpha I] d = b.
Solver: TypeAlias = Callable[[Any, Tensor, float], Direction]


@validated
def conjugate_gradients(
    *, rtol: float = 1e-5, atol: float = 1e-8, max_matvecs: int = 200
) -> Solver:
    """Make a solver of ``[(1 - alpha) H + alpha I] d = b`` by conjugate gradients.

    If the budget is exhausted or a search direction has no positive curvature, d is the last
    iterate. If this happens before the first step, d = b.

    Args:
        rtol: Relative tolerance of the residual.
        atol: Absolute tolerance of the residual.
        max_matvecs: Largest number of products for one parameter tensor.

    Returns:
        A solver ``(block, b, alpha) -> Direction``.

    Raises:
        ValueError: If an option is out of range. The solver raises it if b is not finite.
        FloatingPointError: If a product is not finite. Raised by the solver.

    Cost: one matvec for each iteration, as in `cg` with ``measure=False``.

    Source: Nocedal and Wright 2006, Numerical Optimization, algorithm 7.1.
    """
    at_least(0, rtol=rtol, atol=atol)
    at_least(1, max_matvecs=max_matvecs)

    def solve(block: Any, b: Tensor, alpha: float) -> Direction:
        solution = cg(
            scale(_matvec(block), 1 - alpha),
            b,
            damping=alpha,
            rtol=rtol,
            atol=atol,
            max_matvecs=max_matvecs,
            measure=False,
        )
        return Direction(
            value=solution.x if bool(solution.x.any()) else b,
            matvecs=solution.matvecs,
            converged=solution.converged,
            negative_curvature=solution.negative_curvature is not None,
        )

    return solve


@validated
def direct() -> Solver:
    """Make a solver of ``[(1 - alpha) H + alpha I] d = b`` by the inverse of the block.

        d = 1 / (1 - alpha) (H + alpha / (1 - alpha) I)^-1 b

    Returns:
        A solver ``(block, b, alpha) -> Direction``.

    Raises:
        TypeError: If the block has no ``inverse_matvec(v, damping)``. Raised by the solver.
        ValueError: If b or the solution is not finite, because H is singular. Raised by the
            solver.

    Cost: one product with the inverse.
    """

    def solve(block: Any, b: Tensor, alpha: float) -> Direction:
        inverse = getattr(block, "inverse_matvec", None)
        if inverse is None:
            raise TypeError(
                f"a {type(block).__name__} has no inverse_matvec: use blocks with factors, such "
                "as those of `kfac`, or pass `solve=conjugate_gradients()`"
            )
        # (1 - alpha) H + alpha I = (1 - alpha) (H + alpha / (1 - alpha) I).
        solution: Tensor = inverse(b[None], alpha / (1 - alpha))[0] / (1 - alpha)
        if not math.isfinite(float(solution.sum())):
            raise ValueError(
                "b or the solution has entries that are NaN or infinite: if the block is "
                f"singular, increase alpha from {alpha}"
            )
        return Direction(solution)

    return solve


def _matvec(block: Any) -> Matvec:
    """Return the matvec of a block; a block without one is itself a matvec."""
    return getattr(block, "matvec", block)
