"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Unpack

from torch import Tensor

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve.solver import Solver
from hessfunc.algorithms.solve.system import Iterate, Steps, System
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows
from hessfunc.trees import Matvec, Tree


@validated
def cg(
    matvec: Matvec,
    b: Tree,
    *,
    like: Tree | None = None,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    start: Tree | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    measure: bool = True,
    **run: Unpack[RunOptions],
) -> Solution:
    """Solve a symmetric positive definite system by conjugate gradients.

        (A + damping I) x = b

    Each iterate has the least error in the norm of A + damping I over the Krylov space so far.
    The system is solved when

        |b - (A + damping I) x| <= max(rtol |b|, atol),

    measured by one more product at the end. If rounding has made the residual of the recurrence
    too small, the method restarts from the measured residual, as long as restarts reduce it.
    Otherwise the rounding of the products hides the tolerance, and the reason says so.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> b = torch.ones(10, dtype=torch.float64)
        >>> solution = hf.cg(matvec, b, damping=1.0, rtol=1e-8)
        >>> solution.x[:3].round(decimals=4)
        tensor([0.5000, 0.3333, 0.2500], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products with A. The matrix
            must be symmetric.
        b: Right-hand side, a tree; with ``like``, a block of k right-hand sides.
        like: Tree with the structure of a vector, such as the parameters, if b is a block. Each
            column has its own recurrence, tolerance and reason to stop, and one call of the matvec
            multiplies the vectors of all columns that have not stopped.
        damping: Number that is added to the diagonal of A.
        preconditioner: Function from a block of vectors to the block of their products with M, a
            symmetric positive definite matrix close to the inverse of A + damping I.
        start: Start vector, a tree like b. The default is zero, which saves a product.
        rtol: Relative tolerance: a column stops when its residual is at most
            max(rtol |b|, atol).
        atol: Absolute tolerance of the residual.
        max_matvecs: Budget, the largest number of matvecs of all columns together, including
            measurements of residuals. At least one per column.
        measure: Whether a product measures the residual at the end. Otherwise the result has the
            residual of the recurrence, increased by the possible effect of rounding. A product is
            then made only if this bound exceeds the tolerance. Use False only for a matvec that is
            known to be linear and deterministic.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Solution`, with the residual and the reason of each column. If p'(A + damping I)p is
        negative, or zero up to rounding, for a direction p, the column stops before the step along
        p. Then ``negative_curvature`` is p, and the reason states the curvature. ``x`` is the last
        iterate if the curvature is negative. If it is zero, ``x`` is the iterate of the least
        residual, since later iterates diverge along null vectors.

    Raises:
        ValueError: If an option is out of range, if ``b`` or ``start`` is not finite, if the
            preconditioner is not positive definite, or if the matvec is not symmetric or not
            deterministic.
        FloatingPointError: If a product is not finite.

    Cost: one matvec an iteration, and one at the end if ``measure``; three more, uncounted, if
    inner products show that the matvec may not be symmetric. Memory: 14 vectors, besides those of
    a product. For a block, matvecs and memory count per column; the number of passes is that of the
    slowest column.

    Source: Hestenes and Stiefel 1952; negative curvature: Steihaug 1983.
    """
    systems = System.each(
        matvec,
        b,
        damping,
        preconditioner,
        rtol,
        atol,
        like=like,
        space=run.get("space"),
        measure=measure,
    )
    at_least(len(systems), max_matvecs=max_matvecs)
    method = ConjugateGradients(systems=systems, start=start, is_block=like is not None)
    return run_method(method, systems[0].products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients(Solver["_State"]):
    """Conjugate gradients that stop at a direction of negative curvature."""

    def first(self, begun: Iterate, /) -> _State:
        return _State(**vars(begun), direction=begun.x, nearest=begun.x)

    def iterate(self, system: System, state: _State, /) -> Steps[_State]:
        return _iterate(system, state)

    def obstacle(self, system: System, state: _State, /) -> str:
        return _obstacle(system, state)

    def direction(self, state: tuple[_State, ...], /) -> Tensor | None:
        met = [(c.curvature, c.direction) for c in state if c.curvature is not None]
        return min(met, key=lambda pair: pair[0])[1] if met else None


@dataclass(frozen=True, kw_only=True)
class _State(Iterate):
    """State of conjugate gradients.

    Attributes:
        direction: Last direction p, at unit length.
        nearest: Iterate of the least residual since the recurrence began.
        least: Length of the least residual.
        stretch: Length of p before it was normalised.
        square: Form r'Mr of the residual r from which p was computed.
        curvature: Form p'(A + damping I)p of the unit p if it is not positive beyond rounding,
            else None.
    """

    direction: Rows = field(metadata=DIVIDED)
    nearest: Rows = field(metadata=DIVIDED)
    least: float = math.inf
    stretch: float = 1.0
    square: float = 1.0
    curvature: float | None = None


def _iterate(system: System, state: _State) -> Steps[_State]:
    space = system.space
    direction, square = yield from system.preconditioned(state.residual)
    if state.measured:
        state = replace(state, nearest=state.x, least=state.length)
    else:
        # p_k = M r_k + (r_k'M r_k / r_{k-1}'M r_{k-1}) p_{k-1}.
        direction = direction + (square / state.square * state.stretch) * state.direction
    length = float(space.norms(direction))
    unit = direction / length
    del direction
    image = yield from system.product(unit)
    curvature = float(space.gram(unit, image))
    largest = max(state.largest, float(space.norms(image)))
    # r'Mr / p'(A + damping I)p times p, which is this step times the unit vector p / length.
    step = square / (length * curvature) if curvature > 0 else 0.0
    if largest > state.largest:
        state = replace(state, largest=largest)
    state = system.compared(state, unit, image, 1.0)
    # With eps |A| step > |r|, the rounding of the update would exceed the residual.
    if curvature <= 0 or system.eps * largest * step > state.first:
        return _stopped(system, replace(state, direction=unit, curvature=curvature))
    x, residual = state.x + step * unit, state.residual - step * image
    left = float(space.norms(residual))
    nearer = left < state.least
    return replace(
        state,
        x=x,
        residual=residual,
        length=left,
        measured=False,
        direction=unit,
        stretch=length,
        square=square,
        nearest=x if nearer else state.nearest,
        least=min(left, state.least),
        path=state.path + step,
    )


def _stopped(system: System, state: _State) -> _State:
    if state.measured or _is_negative(system, state):
        return replace(state, stopped=True)
    return replace(state, x=state.nearest, length=state.least, stopped=True)


def _is_negative(system: System, state: _State) -> bool:
    """Return whether the curvature is negative beyond rounding."""
    return (state.curvature or 0.0) < -rounding(system.eps, state.largest)


def _obstacle(system: System, state: _State) -> str:
    assert state.curvature is not None
    if _is_negative(system, state):
        return (
            f"negative curvature: a unit p has p'(A + damping I)p = {state.curvature:.3g}; raise "
            f"the damping above {system.damping - state.curvature:.3g} at least, or use `minres`"
        )
    return (
        f"zero curvature, up to rounding: a unit p has p'(A + damping I)p = "
        f"{state.curvature:.1e}, with products rounded to {system.eps:.0e} of "
        f"{state.largest:.1e}; raise the damping, or use `minres`"
    )
