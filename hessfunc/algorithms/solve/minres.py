"""Minimal residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Unpack

import torch

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Solution, rounding
from hessfunc.algorithms.solve.system import Iterate, Solver, System
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows
from hessfunc.trees import Matvec, Tree


@validated
def minres(
    matvec: Matvec,
    b: Tree,
    *,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    start: Tree | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    **run: Unpack[RunOptions],
) -> Solution:
    """The solution of a symmetric system, definite or not, by minimal residuals.

        (A + damping I) x = b

    Each iterate has the least residual r'Mr over the Krylov space so far, with M the
    preconditioner. The 2-norm of the residual has a recurrence of its own, and the system is
    solved when

        |b - (A + damping I) x| <= max(rtol |b|, atol),

    as measured by one more product at the end. Where rounding has made the residual of the
    recurrence too small, the method starts again from the measured one, as long as that helps.
    Where it does not, the rounding of the products hides the tolerance, and the reason says so.

    Args:
        matvec: of A, block -> block, symmetric.
        b: a tree.
        damping: added to the diagonal of A; may be negative.
        preconditioner: block -> block, symmetric positive definite, close to the inverse of
            the absolute value of A + damping I.
        start: a tree to start from; zero by default, which saves a product.
        rtol: the relative tolerance of the residual.
        atol: the absolute tolerance of the residual.
        max_matvecs: the budget, the measurements of the residual included.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Solution`, with ``negative_curvature`` None. A singular system is solved if it has a
        solution. If it has none, the run stops at a solution of least r'Mr, not converged, and
        the reason says so.

    Raises:
        ValueError: an option is out of range, b or start is not finite, the preconditioner is not
            positive definite, or the matvec is not symmetric or not deterministic.
        FloatingPointError: a product is not finite.

    Cost: one matvec an iteration, and one at the end; three more, uncounted, where inner products
    show that the matvec may not be symmetric; 23 vectors of memory, besides those
    of a product.

    Source: Paige and Saunders 1975; residual vectors: Choi, Paige and Saunders 2011.
    """
    at_least(1, max_matvecs=max_matvecs)
    system = System.of(matvec, b, damping, preconditioner, rtol, atol, space=run.get("space"))
    method = MinimalResiduals(system=system, start=start)
    return run_method(method, system.products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class MinimalResiduals(Solver["_State"]):
    """Minimal residuals, which stop at a least-squares solution."""

    def init(self, products: Products, seed: int, /) -> _State:
        begun = self.system.begin(self.start)
        x = begun.x
        return _State(**vars(begun), lanczos=(x, x, x), search=(x, x))

    def iterate(self, state: _State, /) -> _State:
        return _iterate(self.system, state)

    def obstacle(self, state: _State, /) -> str:
        return _obstacle(state)


@dataclass(frozen=True, kw_only=True)
class _State(Iterate):
    """The Lanczos recurrence ``A v_k = beta_k z_{k-1} + alpha_k z_k + beta_{k+1} z_{k+1}``.

    Here v = M z and z'v = 1. The tridiagonal matrix is made triangular by reflections
    ``[c s; s -c]``; names are those of Paige and Saunders.

    Attributes:
        lanczos: z_{k-1}, z_k and v_k.
        search: w_{k-2} and w_{k-1}, the directions of x.
        beta: beta_k, zero for k = 1.
        reflection: c and s of step k - 1.
        carried: delta_bar_k and epsilon_k, which the last reflections leave in column k.
        phi_bar: the M-norm of the residual.
        phi_first: the M-norm of the residual with which the recurrence began.
        column: the longest column of the tridiagonal matrix.
        slope: |A r| / |r| of the residual with which the recurrence began, in M-norms.
    """

    lanczos: tuple[Rows, Rows, Rows] = field(metadata=DIVIDED)
    search: tuple[Rows, Rows] = field(metadata=DIVIDED)
    beta: float = 0.0
    reflection: tuple[float, float] = (-1.0, 0.0)
    carried: tuple[float, float] = (0.0, 0.0)
    phi_bar: float = 0.0
    phi_first: float = 0.0
    column: float = 0.0
    slope: float = 0.0


def _begin(system: System, state: _State) -> _State:
    """The first Lanczos vector, from the measured residual."""
    image, square = system.preconditioned(state.residual)
    length = math.sqrt(square)
    zeros = torch.zeros_like(state.x)
    return replace(
        state,
        lanczos=(zeros, state.residual / length, image / length),
        search=(zeros, zeros),
        beta=0.0,
        reflection=(-1.0, 0.0),
        carried=(0.0, 0.0),
        phi_bar=length,
        phi_first=length,
    )


def _iterate(system: System, state: _State) -> _State:
    if state.measured:
        state = _begin(system, state)
    before, z, v = state.lanczos
    product = system.product(v)
    length = float(system.space.norms(v))
    stretch = float(system.space.norms(product)) / length
    state = replace(state, largest=max(state.largest, stretch))
    state = system.compared(state, v, product, length)
    ahead = product - state.beta * before
    del product
    alpha = float(system.space.gram(v, ahead))
    ahead = ahead - alpha * z
    image, square = system.preconditioned(ahead)
    beta = math.sqrt(square)

    (c, s), (delta_bar, epsilon) = state.reflection, state.carried
    delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
    carried = (-c * beta, s * beta)
    state = replace(
        state,
        column=max(state.column, math.hypot(state.beta, alpha, beta)),
    )
    # |A r| / |r| of the residual before this step.
    slope = math.hypot(gamma_bar, carried[0])
    if not state.measured and _in_vain(system, state):
        (x, residual), length = state.origin, state.first
        return replace(state, x=x, residual=residual, length=length, stopped=True)
    if slope <= rounding(system.eps, state.column):
        return replace(state, stopped=True)
    state = replace(state, slope=slope if state.measured else state.slope)
    if slope <= min(_resolved(system, state), 0.01 * state.slope):
        return replace(state, inexact=True)

    gamma = math.hypot(gamma_bar, beta)
    c, s = gamma_bar / gamma, beta / gamma
    w = (v - epsilon * state.search[0] - delta * state.search[1]) / gamma
    # A product of length zero ends the Krylov space, and the residual is zero.
    scale = 1 / beta if beta > 0 else 0.0
    residual = s**2 * state.residual - (s * state.phi_bar * c * scale) * ahead
    return replace(
        state,
        x=state.x + (c * state.phi_bar) * w,
        residual=residual,
        length=float(system.space.norms(residual)),
        measured=False,
        lanczos=(z, scale * ahead, scale * image),
        search=(state.search[1], w),
        beta=beta,
        reflection=(c, s),
        carried=carried,
        phi_bar=s * state.phi_bar,
    )


def _in_vain(system: System, state: _State) -> bool:
    """Whether the steps so far are long, while the residual is no shorter than their rounding.

    As |A dx|^2 is the loss of |r|^2, this tells of an eigenvalue below 100 eps |A|.
    """
    step = float(system.space.norms(state.x - state.origin[0]))
    rounded = system.eps * state.largest * step / state.first
    return rounded >= 1e-4 and 1 - state.phi_bar / state.phi_first <= 0.5 * rounded


def _resolved(system: System, state: _State) -> float:
    """The |A r| / |r| that one recurrence can reach.

    As r becomes a null vector, rounding puts eps |A| |r| / |A r| of it in the Lanczos vectors.
    """
    return 3 * math.sqrt(system.eps) * state.column


def _obstacle(state: _State) -> str:
    return (
        f"a least-squares solution: A + damping I is singular and b is not in its range, up to "
        f"rounding, so that no residual is shorter than {state.length:.3g}; add damping"
    )
