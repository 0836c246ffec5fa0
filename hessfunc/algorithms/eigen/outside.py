"""Search for wanted eigenvalues outside of a Krylov space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.eigen.convergence import tolerances, wanted_ritz
from hessfunc.algorithms.eigen.lanczos_state import Problem, State
from hessfunc.algorithms.eigen.recurrence import workspace
from hessfunc.algorithms.eigen.ritz import preferred, wanted
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.recurrences import eigenpairs_of
from hessfunc.numerics import rounding

# Probability at which a given start is trusted.
_UNLIKELY = 0.01
# Probability at which a certificate is complete.
_CERTIFIED = 0.05
# A certificate is given up if all of its products would leave a larger probability.
_HOPELESS = 0.5
# More than n / _UNLIKELY**2 for any n.
_PLENTY = 1e40


@dataclass(frozen=True)
class _Outside:
    """Lanczos recurrence of PAP from a random unit vector u, where P projects out the rows V.

    Attributes:
        first: Vector u, one row.
        diagonal: Diagonal of the tridiagonal matrix.
        off: Entries beside the diagonal, one more than the matrix has; 0 at the end if u and its
            products span an invariant subspace.
    """

    first: Tensor
    diagonal: tuple[float, ...]
    off: tuple[float, ...]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, ascending, and their coefficients as columns."""
        return eigenpairs_of((self.diagonal, self.off))


def _recurrence(
    problem: Problem, products: Products, state: State, count: int
) -> Iterator[_Outside]:
    """Yield the recurrence after each of ``count`` products, until it ends by itself."""
    space, known = problem.space, state.basis[: state.size]
    rows = space.probes(
        [state.probes], kind="sphere", seed=state.seed_of_starts, dtype=problem.dtype
    )
    first, _, _ = orthonormal(space, rows, known, threshold=lambda _: 0.0)
    row, before = first, first[:0]
    outside = _Outside(first, (), ())
    for _ in range(count):
        if not len(row):
            return
        following, factor, inner = orthonormal(
            space,
            products(row),
            known,
            Basis(before),
            Basis(row),
            threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
        )
        outside = replace(
            outside,
            diagonal=(*outside.diagonal, float(inner[0, -1])),
            off=(*outside.off, float(factor.norm())),
        )
        yield outside
        before, row = row, following


def certified(
    problem: Problem, products: Products, state: State, room: int
) -> tuple[State, float | None]:
    """Return the state with its certificate, and a wanted value met outside of the basis or None.

    The certificate is the largest probability with which a random vector would not have shown a
    wanted eigenvalue outside of the basis by now, such as a copy of a repeated one. The search ends
    once it is below 5 %, or after one product if all of them would leave it above one half.
    """
    inside = wanted_ritz(problem, state)[0]
    missed, count = 1.0, min(problem.method.search, room)
    for outside in _recurrence(problem, products, state, count):
        values, _ = outside.ritz()
        if (met := _better(problem, state, inside, values)) is not None:
            return replace(state, certificate=1.0), met
        seen = _least_seen(problem, inside, values, outside)
        missed = _unseen(problem, state, seen)
        if missed <= _CERTIFIED:
            break
        # Each further product divides the bound by about as much as the first.
        if len(values) == 1 and _unseen(problem, state, seen**count) > _HOPELESS:
            break
    return replace(state, certificate=missed), None


def proved(problem: Problem, products: Products, state: State, room: int) -> State:
    """Return a trusted state, or one with a random vector that leads to a wanted eigenvalue.

    Lanczos steps from a random vector outside of the basis stop when (a) they meet a value that
    belongs among the wanted ones, (b) such a value would very likely have appeared by now, or (c)
    their own outermost value has converged, as in a run without a start. They keep two vectors.
    """
    space, inside = problem.space, wanted_ritz(problem, state)[0]
    tolerance = float(tolerances(problem, inside, state).max())
    missed = 0.0
    for outside in _recurrence(problem, products, state, room):
        values, vectors = outside.ritz()
        outermost = preferred(problem.method.which, values)[: 1 + (problem.method.which == "BE")]
        if _better(problem, state, inside, values) is not None:
            coupling = torch.zeros(1, state.size, dtype=torch.float64, device="cpu")
            # The probe is orthogonal to V; it must be orthogonal to the next block X as well.
            fresh, _, _ = orthonormal(
                space, outside.first.clone(), state.basis, threshold=lambda _: 1e-6
            )
            return replace(
                state,
                basis=state.basis.append(fresh, workspace(problem, state)),
                coupling=torch.cat([state.coupling, coupling[: len(fresh)]]),
                probes=state.probes + 1,
                steps=0,
                owed=len(values),
                failure=None,
            )
        missed = _unseen(problem, state, _least_seen(problem, inside, values, outside))
        # The residual of a Ritz vector y of m steps is beta_{m+1} |e_m'y|.
        converged = outside.off[-1] * vectors[-1, outermost].abs() <= tolerance
        if missed < _UNLIKELY or bool(converged.all()):
            break
    else:
        if room:
            return state
    return replace(state, trusted=True, certificate=missed)


def _unseen(problem: Problem, state: State, seen: float) -> float:
    """Return the probability that (x'u)^2 <= seen for a random unit vector u outside of the basis.

    With d dimensions outside, d (x'u)^2 is nearly chi2_1, whose distribution is erf(sqrt(t / 2)).
    """
    return math.erf(math.sqrt((problem.space.n - state.size) * seen / 2))


def _least_seen(problem: Problem, inside: Tensor, values: Tensor, outside: _Outside) -> float:
    """Return an upper bound of (x'u)^2, for a unit eigenvector x of a wanted, unmet eigenvalue.

    Here u is the unit vector at which the recurrence began, and p_j are the orthonormal polynomials
    of the recurrence, with q_j = p_j(A) u. Since x'q_j = p_j(edge) x'u, Bessel's inequality gives

        (x'u)^2 <= 1 / sum_j p_j(edge)^2.
    """
    seen = math.inf
    for edge in _edges(problem, inside):
        if float(values[0]) <= edge <= float(values[-1]):
            return 1.0
        # beta_{j+1} p_{j+1}(x) = (x - alpha_j) p_j(x) - beta_j p_{j-1}(x), with p_0 = 1.
        before, here, total, off = 0.0, 1.0, 1.0, 0.0
        for alpha, beta in zip(outside.diagonal, outside.off, strict=True):
            if not beta > 0:
                # An invariant subspace contains every eigenvector that u has a part of.
                return 0.0
            if total > _PLENTY:
                break
            before, here, off = here, ((edge - alpha) * here - off * before) / beta, beta
            total += here**2
        seen = min(seen, total)
    return 1 / seen


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


def _edges(problem: Problem, inside: Tensor) -> tuple[float, ...]:
    """Return the values beyond which an eigenvalue is a wanted one."""
    least, k = float(inside[-1]), problem.method.k
    return {
        "LM": (abs(least), -abs(least)),
        "LA": (least,),
        "SA": (least,),
        "BE": (float(inside[(k - 1) // 2]), float(inside[(k + 1) // 2 if k > 1 else 0])),
    }[problem.method.which]
