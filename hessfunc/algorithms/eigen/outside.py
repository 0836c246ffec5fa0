"""Search for wanted eigenvalues outside of a Krylov space."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.eigen.recurrence import Problem, State, tolerances, wanted_ritz, workspace
from hessfunc.algorithms.eigen.ritz import preferred, rayleigh_ritz, wanted
from hessfunc.algorithms.products import Products
from hessfunc.numerics import rounding

# The 1 % quantile of chi2_1.
_UNLIKELY = 1.57e-4
# More than n / _UNLIKELY for any n.
_PLENTY = 1e40


def proved(problem: Problem, products: Products, state: State, room: int) -> State:
    """Return a trusted state, or one with a random vector that leads to a wanted eigenvalue.

    Lanczos steps from a random vector outside of the basis stop when (a) they meet a value that
    belongs among the wanted ones, (b) such a value would very likely have appeared by now, or (c)
    their own outermost value has converged, as in a run without a start. They keep two vectors.
    """
    space, (inside, _) = problem.space, wanted_ritz(problem, state)
    tolerance = float(tolerances(problem, inside, state).max())
    known = state.basis[: state.size]
    rows = space.probes(
        [state.probes], kind="sphere", seed=state.seed_of_starts, dtype=problem.dtype
    )
    first, _, _ = orthonormal(space, rows, known, threshold=lambda _: 0.0)
    row, before = first, first[:0]
    diagonal, off = list[float](), list[float]()
    for step in range(1, room + 1):
        if not len(row):
            # The rest of the space is invariant.
            return replace(state, trusted=True, proved=True)
        following, factor, inner = orthonormal(
            space,
            products(row),
            known,
            Basis(before),
            Basis(row),
            threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
        )
        diagonal.append(float(inner[0, -1]))
        values, vectors = rayleigh_ritz(_tridiagonal(diagonal, off))
        outermost = preferred(problem.method.which, values)[: 1 + (problem.method.which == "BE")]
        if _better(problem, state, inside, values) is not None:
            coupling = torch.zeros(1, state.size, dtype=torch.float64, device="cpu")
            # The probe is orthogonal to V; it must be orthogonal to the next block X as well.
            fresh, _, _ = orthonormal(space, first.clone(), state.basis, threshold=lambda _: 1e-6)
            return replace(
                state,
                basis=state.basis.append(fresh, workspace(problem, state)),
                coupling=torch.cat([state.coupling, coupling[: len(fresh)]]),
                probes=state.probes + 1,
                steps=0,
                owed=step,
                failure=None,
            )
        off.append(float(factor.norm()))
        # The residual of a Ritz vector y of m steps is beta_{m+1} |e_m'y|.
        converged = off[-1] * vectors[-1, outermost].abs() <= tolerance
        seen = _least_seen(problem, inside, values, diagonal, off) * space.n < _UNLIKELY
        if seen or bool(converged.all()):
            return replace(state, trusted=True, proved=True)
        before, row = row, following
    return state


def _least_seen(
    problem: Problem, inside: Tensor, values: Tensor, diagonal: list[float], off: list[float]
) -> float:
    """Return an upper bound of (x'u)^2, for a unit eigenvector x of a wanted, unmet eigenvalue.

    Here u is the unit vector at which the recurrence began, and p_j are the orthonormal polynomials
    of the recurrence, with q_j = p_j(A) u. Since x'q_j = p_j(edge) x'u, Bessel's inequality gives

        (x'u)^2 <= 1 / sum_j p_j(edge)^2.

    For a random u, n (x'u)^2 is nearly chi2_1. A bound below its 1 % quantile therefore shows that
    such an x is unlikely.
    """
    seen = math.inf
    for edge in _edges(problem, inside):
        if float(values[0]) <= edge <= float(values[-1]):
            return 1.0
        # beta_{j+1} p_{j+1}(x) = (x - alpha_j) p_j(x) - beta_j p_{j-1}(x), with p_0 = 1.
        before, here, total = 0.0, 1.0, 1.0
        for i, (alpha, beta) in enumerate(zip(diagonal, off, strict=True)):
            if not beta > 0 or total > _PLENTY:
                break
            step = (edge - alpha) * here - (off[i - 1] if i else 0.0) * before
            before, here = here, step / beta
            total += here**2
        seen = min(seen, total)
    return 1 / seen


def _tridiagonal(diagonal: list[float], off: list[float]) -> Tensor:
    matrix = torch.tensor(diagonal, dtype=torch.float64, device="cpu").diag()
    if off:
        side = torch.tensor(off, dtype=torch.float64, device="cpu")
        matrix += side.diag(1) + side.diag(-1)
    return matrix


def missed_value(problem: Problem, products: Products, state: State, room: int) -> float | None:
    """Return a Ritz value from outside of the basis that should be a wanted one, or None."""
    space, (inside, _) = problem.space, wanted_ritz(problem, state)
    known = state.basis[: state.size]
    steps = min(room, space.n - state.size)
    rows = space.probes(
        [state.probes], kind="sphere", seed=state.seed_of_starts, dtype=problem.dtype
    )
    outside, images, values = rows[:0], rows[:0], inside[:0]
    for _ in range(steps):
        # Rows are orthonormalised in place, but these are products that must be kept.
        row, _, _ = orthonormal(space, rows.clone(), known, Basis(outside), threshold=lambda _: 0.0)
        if not len(row) or _would_be_seen(problem, inside, values, space.n):
            break
        rows = products(row)
        outside, images = torch.cat([outside, row]), torch.cat([images, rows])
        values = torch.linalg.eigvalsh(space.gram(outside, images).cpu().double())
    return _better(problem, state, inside, values)


def _better(problem: Problem, state: State, inside: Tensor, values: Tensor) -> float | None:
    """Return a value from outside of the basis that should be a wanted one, or None."""
    both = torch.cat([inside, values])
    order = both.argsort()
    best = order[wanted(problem.method.which, both[order], problem.method.k)]
    tolerance = float(tolerances(problem, inside, state).max())
    tolerance = max(tolerance, rounding(problem.eps, state.largest))
    new = both[best[best >= problem.method.k]]
    displaced = inside[[i for i in range(problem.method.k) if i not in best.tolist()]]
    pairs = zip(new.tolist(), displaced.tolist(), strict=True)
    return next((value for value, other in pairs if abs(value - other) > tolerance), None)


def _would_be_seen(problem: Problem, inside: Tensor, outside: Tensor, n: int) -> bool:
    """Return whether a copy of a wanted value would exceed the Ritz values outside by now.

    The squared part of its eigenvector in a random unit vector is at least 1e-4 / n, except once in
    a hundred. After s steps this part has grown by T_{s-1}(ratio)^2, with the Chebyshev polynomial
    T_m(ratio) = cosh(m acosh(ratio)) > exp(m acosh(ratio)) / 2.
    """
    steps = len(outside)
    if steps < 2:
        return False
    edges = _edges(problem, inside)
    centre = float(outside[0] + outside[-1]) / 2
    radius = float(outside[-1] - outside[0]) / 2
    ratio = min(abs(edge - centre) for edge in edges) / max(radius, 1e-300)
    if ratio <= 1:
        return False
    growth = (steps - 1) * math.acosh(min(ratio, 1e300))
    return 2 * growth - 2 * math.log(2) > math.log(1e4 * n)


def _edges(problem: Problem, inside: Tensor) -> tuple[float, ...]:
    """Return the values beyond which an eigenvalue is a wanted one."""
    least, k = float(inside[-1]), problem.method.k
    return {
        "LM": (abs(least), -abs(least)),
        "LA": (least,),
        "SA": (least,),
        "BE": (float(inside[(k - 1) // 2]), float(inside[(k + 1) // 2 if k > 1 else 0])),
    }[problem.method.which]
