"""Minimal residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Unpack

import torch

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve.solver import Solver
from hessfunc.algorithms.solve.system import Iterate, Steps, System
from hessfunc.numerics import rounding
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows
from hessfunc.trees import Matvec, Tree


@validated
def minres(
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
    **run: Unpack[RunOptions],
) -> Solution:
    """Solve a symmetric system, definite or indefinite, by minimal residuals.

        (A + damping I) x = b

    Each iterate has the least residual r'Mr over the Krylov space so far, with M the
    preconditioner. The residual has its own recurrence, which gives its 2-norm, and the system is
    solved when

        |b - (A + damping I) x| <= max(rtol |b|, atol),

    measured by one more product at the end. If rounding has made the residual of the recurrence
    too small, the method restarts from the measured residual, as long as restarts reduce it.
    Otherwise the rounding of the products hides the tolerance, and the reason says so.

    Examples:
        >>> A = torch.diag(torch.tensor([-2.0, 1.0, 4.0], dtype=torch.float64))
        >>> solution = hf.minres(hf.dense(A), torch.ones(3, dtype=torch.float64), rtol=1e-8)
        >>> solution.x.round(decimals=4)
        tensor([-0.5000,  1.0000,  0.2500], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products with A. The matrix
            must be symmetric.
        b: Right-hand side, a tree; with ``like``, a block of k right-hand sides.
        like: Tree with the structure of a vector, such as the parameters, if b is a block. Each
            column has its own recurrence, tolerance and reason to stop, and one call of the matvec
            multiplies the vectors of all columns that have not stopped.
        damping: Number that is added to the diagonal of A; may be negative.
        preconditioner: Function from a block of vectors to the block of their products with M, a
            symmetric positive definite matrix close to the inverse of the absolute value of
            A + damping I.
        start: Start vector, a tree like b. The default is zero, which saves a product.
        rtol: Relative tolerance: a column stops when its residual is at most
            max(rtol |b|, atol).
        atol: Absolute tolerance of the residual.
        max_matvecs: Budget, the largest number of matvecs of all columns together, including
            measurements of residuals. At least one per column.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Solution`, with the residual and the reason of each column, and ``negative_curvature``
        None. A singular system is solved if it has a
        solution. If it has none, the run stops at a solution of least r'Mr that has not converged,
        and the reason says so.

    Raises:
        ValueError: If an option is out of range, if ``b`` or ``start`` is not finite, if the
            preconditioner is not positive definite, or if the matvec is not symmetric or not
            deterministic.
        FloatingPointError: If a product is not finite.

    Cost: one matvec an iteration, and one at the end; three more, uncounted, if inner products
    show that the matvec may not be symmetric. Memory: 23 vectors, besides those of a product. For
    a block, all of it for each column, in as many passes as the slowest takes.

    Source: Paige and Saunders 1975; residual vectors: Choi, Paige and Saunders 2011.
    """
    systems = System.each(
        matvec, b, damping, preconditioner, rtol, atol, like=like, space=run.get("space")
    )
    at_least(len(systems), max_matvecs=max_matvecs)
    method = MinimalResiduals(systems=systems, start=start, is_block=like is not None)
    return run_method(method, systems[0].products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class MinimalResiduals(Solver["_State"]):
    """Minimal residuals that stop at a least-squares solution."""

    def first(self, begun: Iterate, /) -> _State:
        x = begun.x
        return _State(**vars(begun), lanczos=(x, x, x), search=(x, x))

    def iterate(self, system: System, state: _State, /) -> Steps[_State]:
        return _iterate(system, state)

    def obstacle(self, system: System, state: _State, /) -> str:
        return _obstacle(state)


@dataclass(frozen=True, kw_only=True)
class _State(Iterate):
    """State of the Lanczos recurrence before step k, with A in the place of A + damping I.

        A v_k = beta_k z_{k-1} + alpha_k z_k + beta_{k+1} z_{k+1},  v_k = M z_k,  z_k'v_k = 1

    Reflections ``[c s; s -c]`` make the tridiagonal matrix T triangular. The names are those of
    Paige and Saunders.

    Attributes:
        lanczos: Lanczos vectors z_{k-1}, z_k and v_k.
        search: Directions w_{k-2} and w_{k-1} of x.
        beta: Off-diagonal entry beta_k, zero for k = 1.
        reflection: Entries c and s of the reflection of step k - 1.
        carried: Entries delta_bar_k and epsilon_k that the last two reflections leave in column k.
        phi_bar: M-norm of the residual.
        phi_first: M-norm of the residual with which the recurrence began.
        column: Length of the longest column of T.
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


def _begin(system: System, state: _State) -> Steps[_State]:
    """Return the state with the first Lanczos vector, from the measured residual."""
    image, square = yield from system.preconditioned(state.residual)
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


def _iterate(system: System, state: _State) -> Steps[_State]:
    if state.measured:
        state = yield from _begin(system, state)
    before, z, v = state.lanczos
    product = yield from system.product(v)
    length = float(system.space.norms(v))
    stretch = float(system.space.norms(product)) / length
    if stretch > state.largest:
        state = replace(state, largest=stretch)
    state = system.compared(state, v, product, length)
    # beta_{k+1} z_{k+1} = A v_k - beta_k z_{k-1} - alpha_k z_k, with alpha_k = v_k'A v_k.
    ahead = product - state.beta * before
    del product
    alpha = float(system.space.gram(v, ahead))
    ahead = ahead - alpha * z
    image, square = yield from system.preconditioned(ahead)
    beta = math.sqrt(square)

    # The reflection of step k - 1 acts on the rows k - 1 and k of the columns k and k + 1 of T:
    #
    #     [c  s] [delta_bar_k  0         ]   [delta_k      epsilon_{k+1}  ]
    #     [s -c] [alpha_k      beta_{k+1}] = [gamma_bar_k  delta_bar_{k+1}]
    (c, s), (delta_bar, epsilon) = state.reflection, state.carried
    delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
    carried = (-c * beta, s * beta)
    if (column := math.hypot(state.beta, alpha, beta)) > state.column:
        state = replace(state, column=column)
    # |A r| / |r| = |(gamma_bar_k, delta_bar_{k+1})| for the residual r before step k, in M-norms.
    slope = math.hypot(gamma_bar, carried[0])
    if not state.measured and _in_vain(system, state):
        (x, residual), length = state.origin, state.first
        return replace(state, x=x, residual=residual, length=length, stopped=True)
    if slope <= rounding(system.eps, state.column):
        return replace(state, stopped=True)
    if state.measured:
        state = replace(state, slope=slope)
    if slope <= min(_resolved(system, state), 0.01 * state.slope):
        return replace(state, inexact=True)

    # The reflection of step k eliminates beta_{k+1}: c_k gamma_bar_k + s_k beta_{k+1} = gamma_k.
    gamma = math.hypot(gamma_bar, beta)
    c, s = gamma_bar / gamma, beta / gamma
    # v_k = gamma_k w_k + delta_k w_{k-1} + epsilon_k w_{k-2}, the columns of V = W R.
    w = (v - epsilon * state.search[0] - delta * state.search[1]) / gamma
    # beta_{k+1} = 0 ends the Krylov space: s_k = 0, and the residual is zero.
    scale = 1 / beta if beta > 0 else 0.0
    # phi_k = c_k phi_bar_k and phi_bar_{k+1} = s_k phi_bar_k give the updates
    # x_k = x_{k-1} + phi_k w_k and r_k = s_k^2 r_{k-1} - c_k phi_bar_{k+1} z_{k+1}.
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
    """Return whether the steps so far are long, but shorten the residual by no more than rounding.

    With dx the sum of the steps, |A dx|^2 = |r_0|^2 - |r_k|^2 <= eps |A| |dx| |r_0|. For
    eps |A| |dx| >= 1e-4 |r_0| this shows an eigenvalue below |A dx| / |dx| <= 100 eps |A|.
    """
    step = float(system.space.norms(state.x - state.origin[0]))
    rounded = system.eps * state.largest * step / state.first
    return rounded >= 1e-4 and 1 - state.phi_bar / state.phi_first <= 0.5 * rounded


def _resolved(system: System, state: _State) -> float:
    """Return the least |A r| / |r| that one recurrence can reach.

    As r approaches a null vector, rounding adds a part eps |A| |r| / |A r| of it to the Lanczos
    vectors.
    """
    return 3 * math.sqrt(system.eps) * state.column


def _obstacle(state: _State) -> str:
    return (
        f"a least-squares solution: A + damping I is singular and b is not in its range, up to "
        f"rounding, so that no residual is shorter than {state.length:.3g}; raise `damping`"
    )
