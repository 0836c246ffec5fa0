"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Unpack

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Solution, rounding
from hessfunc.algorithms.solve.system import Iterate, Solver, System
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space
from hessfunc.trees import Matvec, Tree


@validated
def cg(
    matvec: Matvec,
    b: Tree,
    *,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    start: Tree | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    measure: bool = True,
    **run: Unpack[RunOptions],
) -> Solution:
    """The solution of a symmetric positive definite system, by conjugate gradients.

        (A + damping I) x = b

    Each iterate has the least error in the norm of A + damping I over the Krylov space so far.
    The system is solved when

        |b - (A + damping I) x| <= max(rtol |b|, atol),

    as measured by one more product at the end. Where rounding has made the residual of the
    recurrence too small, the method starts again from the measured one, as long as that helps.
    Where it does not, the rounding of the products hides the tolerance, and the reason says so.

    Args:
        matvec: of A, block -> block, symmetric.
        b: a tree.
        damping: added to the diagonal of A.
        preconditioner: block -> block, symmetric positive definite, close to the inverse of
            A + damping I.
        start: a tree to start from; zero by default, which saves a product.
        rtol: the relative tolerance of the residual.
        atol: the absolute tolerance of the residual.
        max_matvecs: the budget, the measurements of the residual included.
        measure: measure the residual at the end. Else that of the recurrence is taken, with all
            that rounding may have added to it, and a product is made only where this is too long:
            for a matvec that is known to be linear and deterministic.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Solution`. Where a direction p has p'(A + damping I)p <= 0, or zero up to rounding, the
        run stops before the step along p: p is in ``negative_curvature``, and the reason tells
        the curvature. Then ``x`` is the last iterate; where the curvature is zero, the one of the
        least residual, as later ones run away along null vectors.

    Raises:
        ValueError: an option is out of range, b or start is not finite, the preconditioner is not
            positive definite, or the matvec is not symmetric or not deterministic.
        FloatingPointError: a product is not finite.

    Cost: one matvec an iteration, and one at the end if ``measure``; three more, uncounted, where
    inner products show that the matvec may not be symmetric; 12 vectors of memory,
    besides those of a product.

    Source: Hestenes and Stiefel 1952; negative curvature: Steihaug 1983.
    """
    at_least(1, max_matvecs=max_matvecs)
    system = System.of(
        matvec, b, damping, preconditioner, rtol, atol, space=run.get("space"), measure=measure
    )
    method = ConjugateGradients(system=system, start=start)
    return run_method(method, system.products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients(Solver["_State"]):
    """Conjugate gradients, which stop at a direction of negative curvature."""

    def init(self, products: Products, seed: int, /) -> _State:
        begun = self.system.begin(self.start)
        return _State(**vars(begun), direction=begun.x, nearest=begun.x)

    def iterate(self, state: _State, /) -> _State:
        return _iterate(self.system, state)

    def obstacle(self, state: _State, /) -> str:
        return _obstacle(self.system, state)

    def result(self, state: _State, space: Space, cost: Cost, /) -> Solution:
        direction = None if state.curvature is None else state.direction
        return self.system.solution(state, cost, direction)


@dataclass(frozen=True, kw_only=True)
class _State(Iterate):
    """The state of conjugate gradients.

    Attributes:
        direction: the last direction p, of unit length.
        stretch: Length of p as it was made.
        square: r'Mr of the residual from which p was made.
        nearest: the iterate of the least residual since the recurrence began.
        least: the length of that residual.
        curvature: p'(A + damping I)p of unit p, where it is not positive beyond rounding.
    """

    direction: Rows = field(metadata=DIVIDED)
    nearest: Rows = field(metadata=DIVIDED)
    least: float = math.inf
    stretch: float = 1.0
    square: float = 1.0
    curvature: float | None = None


def _iterate(system: System, state: _State) -> _State:
    space = system.space
    direction, square = system.preconditioned(state.residual)
    if state.measured:
        state = replace(state, nearest=state.x, least=state.length)
    else:
        direction = direction + (square / state.square * state.stretch) * state.direction
    length = float(space.norms(direction))
    unit = direction / length
    del direction
    image = system.product(unit)
    curvature = float(space.gram(unit, image))
    largest = max(state.largest, float(space.norms(image)))
    step = square / (length * curvature) if curvature > 0 else 0.0
    state = system.compared(replace(state, largest=largest), unit, image, 1.0)
    # The rounding of a product with too long a step would be longer than the residual.
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
    """Whether the curvature is negative beyond rounding."""
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
