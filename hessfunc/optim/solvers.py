"""Solvers of one parameter tensor's Newton equation."""

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
    """A step of one parameter tensor, before the learning rate.

    Attributes:
        value: of the parameter's shape.
        matvecs: products that were spent.
        converged: whether it solves the equation within the tolerance.
        negative_curvature: whether the matrix turned out not to be positive definite.
    """

    value: Tensor
    matvecs: int = 0
    converged: bool = True
    negative_curvature: bool = False


# (block, b, alpha) -> the solution of [(1 - alpha) H + alpha I] d = b.
Solver: TypeAlias = Callable[[Any, Tensor, float], Direction]


@validated
def conjugate_gradients(
    *, rtol: float = 1e-5, atol: float = 1e-8, max_matvecs: int = 200
) -> Solver:
    """The solver of ``[(1 - alpha) H + alpha I] d = b`` by conjugate gradients.

    Where the budget is spent, or a direction has no positive curvature, d is the last iterate;
    where that comes before the first step, d = b.

    Args:
        rtol: the relative tolerance of the residual.
        atol: the absolute tolerance of the residual.
        max_matvecs: the budget for one parameter tensor.

    Raises:
        ValueError: an option is out of range; (from the solver) b is not finite.
        FloatingPointError: (from the solver) a product is not finite.

    Cost: that of `cg` without a measurement, one matvec an iteration.

    Source: Nocedal and Wright 2006, Numerical Optimization, algorithm 7.1.
    """
    at_least(0, rtol=rtol, atol=atol)
    at_least(1, max_matvecs=max_matvecs)

    def solve(block: Any, b: Tensor, alpha: float) -> Direction:
        found = cg(
            scale(_matvec(block), 1 - alpha),
            b,
            damping=alpha,
            rtol=rtol,
            atol=atol,
            max_matvecs=max_matvecs,
            measure=False,
        )
        return Direction(
            value=found.x if bool(found.x.any()) else b,
            matvecs=found.matvecs,
            converged=found.converged,
            negative_curvature=found.negative_curvature is not None,
        )

    return solve


@validated
def direct() -> Solver:
    """The solver of ``[(1 - alpha) H + alpha I] d = b`` by the block's own inverse.

        d = 1 / (1 - alpha) (H + alpha / (1 - alpha) I)^-1 b

    Raises:
        TypeError: (from the solver) the block has no ``inverse_matvec(v, damping)``.
        ValueError: (from the solver) b is not finite, or the solution is not: H is singular.

    Cost: one inverse product.
    """

    def solve(block: Any, b: Tensor, alpha: float) -> Direction:
        inverse = getattr(block, "inverse_matvec", None)
        if inverse is None:
            raise TypeError(
                f"a {type(block).__name__} has no inverse_matvec: take blocks with factors, such "
                "as those of kfac, or solve by conjugate_gradients()"
            )
        found: Tensor = inverse(b[None], alpha / (1 - alpha))[0] / (1 - alpha)
        if not math.isfinite(float(found.sum())):
            raise ValueError(
                "b or the solution has entries that are NaN or infinite: where the block is "
                f"singular, raise alpha={alpha}"
            )
        return Direction(found)

    return solve


def _matvec(block: Any) -> Matvec:
    """The matvec of a block, which may itself be one."""
    return getattr(block, "matvec", block)
