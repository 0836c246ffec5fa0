"""Method of thick-restart Lanczos: its rounds, the check of its pairs, and its results."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hessfunc.algorithms.driver import Method
from hessfunc.algorithms.eigen.convergence import (
    have_converged,
    known_error,
    residuals,
    wanted_pairs,
    wanted_ritz,
)
from hessfunc.algorithms.eigen.lanczos_state import LanczosOptions, Pairs, Problem, State, initial
from hessfunc.algorithms.eigen.outside import certified, proved
from hessfunc.algorithms.eigen.recurrence import block_step, restarted
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.display import Achieved
from hessfunc.numerics import rounding
from hessfunc.randomness import uniforms
from hessfunc.spaces.space import Space

# Share by which the basis grows in a round: the Ritz values after each round cost m^3 flops.
_GROWTH_A_ROUND = 1 / 16
# Smaller than any scale of a matrix.
_TINY = 1e-300
# Probes have the keys (seed, index, leaf) with no negative index, so this key is free.
_KEY_OF_MIXTURE = -1
# Frames between a warning and the caller of `lanczos`.
_CALLER = 5
# Number of steps from a fresh vector outside of an invariant subspace that must find no better
# value.
_STEPS_TO_TRUST = 8


@dataclass(frozen=True, kw_only=True)
class Lanczos(LanczosOptions, Method[State, Eigenpairs]):
    """Thick-restart Lanczos; the options are those of `lanczos`."""

    changeable: ClassVar = frozenset({"basis_device", "basis_bytes", "rtol", "atol", "search"})

    def options(self) -> dict[str, Any]:
        return {**super().options(), "basis_dtype": str(self.basis_dtype)}

    def init(self, products: Products, seed: int, /) -> State:
        return initial(Problem(self, products.space), seed)

    def step(self, state: State, products: Products, room: int, /) -> State:
        return _round(Problem(self, products.space), products, state, room)

    def verdict(self, state: State, products: Products, room: int, /) -> str | None:
        return _verdict(Problem(self, products.space), state, last=room < 1)

    def finish(
        self, state: State, products: Products, reason: str, room: int, /
    ) -> tuple[State, str]:
        """Check the pairs by a product, and search outside of the basis for repeated eigenvalues.

        The reason states the number of pairs that fail the check, or an eigenvalue that was missed.
        """
        problem = Problem(self, products.space)
        before, error = products.matvecs, known_error(problem, state)
        if state.failure is None and error is None:
            state = replace(state, failure=_failure(problem, products, state))
        room -= products.matvecs - before
        before = products.matvecs
        pairs = _measured(problem, products, state, room)
        state, room = replace(state, pairs=pairs), room - (products.matvecs - before)
        missing = int((~have_converged(problem, state, pairs)).sum())
        if reason.startswith("converged") and missing:
            noise = max(state.noise, (state.failure or 0.0) / self.k**0.5)
            rounded = max(problem.eps, noise / max(state.largest, _TINY))
            return state, (
                f"the residuals of {missing} pairs cannot reach the tolerance: products are "
                f"rounded to {rounded:.0e} |A|; take a looser rtol, or float64"
            )
        if not (state.trusted or state.finished or missing):
            reason += (
                ", before a random vector could show that no wanted eigenvalue lies outside of "
                "the Krylov space of `start`: raise max_matvecs, or omit `start`"
            )
            warnings.warn(reason, stacklevel=_CALLER)
        elif (
            reason.startswith("converged")
            and self.block_size < self.k
            and self.search
            and state.certificate is None
        ):
            if state.finished:
                # A random vector has led to no other wanted value before its space was invariant.
                return replace(state, certificate=0.0), reason
            state, missed = certified(problem, products, state, room)
            if missed is not None:
                reason += (
                    f", but {missed:.6g} was met outside of the basis: repeated eigenvalues were "
                    f"missed, take block_size={min(2 * self.block_size + 2, self.k)} or more; or "
                    "rtol is too loose for close eigenvalues"
                )
                warnings.warn(reason, stacklevel=_CALLER)
        return state, reason

    def achieved(self, state: State, space: Space, cost: Cost, /) -> Achieved:
        # The result would combine vectors; Ritz values and residuals need only the small matrix.
        if state.size < self.k:
            return Achieved(converged=0, wanted=self.k)
        problem = Problem(self, space)
        converged = int((residuals(problem, state) <= 1).sum())
        value = float(wanted_ritz(problem, state)[0][0])
        return Achieved(value=value, converged=converged, wanted=self.k)

    def result(self, state: State, space: Space, cost: Cost, /) -> Eigenpairs:
        problem = Problem(self, space)
        pairs = state.pairs or wanted_pairs(problem, state)
        return Eigenpairs(
            values=pairs.values,
            vectors=space.vectors(pairs.rows),
            residuals=pairs.residuals,
            converged=have_converged(problem, state, pairs),
            largest=state.largest,
            certificate=state.certificate,
            **cost,
        )


def _round(problem: Problem, products: Products, state: State, room: int) -> State:
    # A resumed run may keep its basis on another device than the interrupted one.
    # A state that is not copied keeps its Ritz pairs, which the verdict has computed.
    if (basis := state.basis.on(problem.method.basis_device)) is not state.basis:
        state = replace(state, basis=basis)
    furthest = _furthest(problem, state)
    if _is_settled(problem, state, furthest):
        return _examined(problem, products, state, room)
    count, state = _steps_until_look(problem, state, furthest)
    for _ in range(count):
        width = len(state.basis) - state.size
        if state.size + width > state.basis_size:
            state = restarted(problem, state)
        if width > room or state.finished:
            break
        state = block_step(problem, products, state)
        room -= width
    state.basis.settle(problem.space)
    return state


def _furthest(problem: Problem, state: State) -> float:
    """Return the largest residual in units of its tolerance, infinite before there are k pairs."""
    return math.inf if state.size < problem.method.k else float(residuals(problem, state).max())


def _steps_until_look(problem: Problem, state: State, furthest: float) -> tuple[int, State]:
    """Return the number of block steps of the next round, and the state that remembers this look.

    Residuals shrink about geometrically, so that two looks predict when they reach the tolerance.
    The next look is halfway, because convergence accelerates. After the first restart it
    accelerates little: a look that is far is an eighth of the way ahead, and at the latest at the
    next restart, which needs the Ritz pairs in any case.
    """
    most = max(1, int(_GROWTH_A_ROUND * state.size / problem.method.block_size))
    if state.size < problem.method.k:
        return most, state
    now = math.log(max(furthest, _TINY))
    before, larger = state.looked
    seen = replace(state, looked=(state.steps, now))
    if not (state.steps > before and 0 < now < larger < math.inf):
        return most, seen
    predicted = now * (state.steps - before) / (larger - now)
    if state.before:
        until_restart = (state.basis_size - state.size) // problem.method.block_size
        most = max(most, min(int(predicted / 8), until_restart))
    return max(1, min(most, int(predicted / 2))), seen


def _examined(problem: Problem, products: Products, state: State, room: int) -> State:
    """Return the state after one check of a recurrence whose residuals have converged.

    The first check is one product, which measures the rounding of products unless it is known. If
    this rounding is below the tolerance, the residuals must fall below the difference of the two.
    The second check concerns a given start, which may lie in an invariant subspace.
    """
    if not _is_checked(problem, state):
        failure = _failure(problem, products, state)
        noise = max(state.noise, failure / problem.method.k**0.5)
        pairs = wanted_pairs(problem, state)
        checked = replace(pairs, residuals=pairs.residuals + failure)
        if bool(have_converged(problem, state, checked).all()):
            return replace(state, failure=failure)
        return replace(state, failure=failure, noise=noise)
    return proved(problem, products, state, room)


def _is_checked(problem: Problem, state: State) -> bool:
    """Return whether the error of the recurrence is known or has been measured."""
    return state.failure is not None or known_error(problem, state) is not None


def _failure(problem: Problem, products: Products, state: State) -> float:
    """Return the error of the recurrence for a random combination of the wanted Ritz vectors."""
    space, pairs = problem.space, wanted_pairs(problem, state)
    values, rows, mixture = pairs.values, pairs.rows, _mixture(state, len(pairs.values))
    # With T Y = Y diag(values): A V' Y m = V' Y (values * m) + X' C Y m for a mixture m.
    predicted = space.combine((mixture * values)[None], rows)
    if state.size < len(state.basis):
        leak = (state.coupling @ wanted_ritz(problem, state)[1] @ mixture)[None]
        predicted += state.basis[state.size :].combine(space, leak, problem.dtype)
    return float(space.norms(products(space.combine(mixture[None], rows)) - predicted))


def _mixture(state: State, count: int) -> Tensor:
    signs = uniforms(count, state.seed_of_starts, _KEY_OF_MIXTURE, device=torch.device("cpu")) < 0.5
    return torch.where(signs, 1.0, -1.0).double()


def _measured(problem: Problem, products: Products, state: State, room: int) -> Pairs:
    """Return the wanted pairs with residuals checked by products.

    The recurrence predicts A times any combination of Ritz vectors. One product with a random
    combination has measured the error of this prediction, and the error is added to each residual.
    If the error exceeds rounding, or a residual then exceeds the tolerance, each vector is
    multiplied. Without that product, the error is known to be negligible.
    """
    pairs = wanted_pairs(problem, state)
    if state.failure is None:
        return replace(pairs, residuals=pairs.residuals + (known_error(problem, state) or 0.0))
    values, rows = pairs.values, pairs.rows
    floor = rounding(problem.eps, state.largest) * len(values) ** 0.5
    checked = replace(pairs, residuals=pairs.residuals + state.failure)
    trusted = state.failure <= floor and bool(have_converged(problem, state, checked).all())
    if trusted or room < len(values):
        return checked
    # Blocks bound the memory of sharded rows, which are gathered one block at a time.
    images = torch.cat([products(part) for part in rows.split(problem.method.block_size)])
    images.addcmul_(values.to(rows)[:, None], rows, value=-1)
    return replace(pairs, residuals=problem.space.norms(images).cpu())


def _is_settled(problem: Problem, state: State, furthest: float) -> bool:
    """Return whether the residuals of the recurrence reach the tolerance or cannot shrink."""
    if state.size < problem.method.k:
        return False
    if state.finished:
        return True
    if state.steps < (_STEPS_TO_TRUST if state.closed is not None else state.owed):
        return False
    return furthest <= 1


def _verdict(problem: Problem, state: State, *, last: bool) -> str | None:
    """Return why the run is finished, or None. If ``last``, no product remains for a check."""
    if not _is_settled(problem, state, _furthest(problem, state)):
        return None
    if not (last or (_is_checked(problem, state) and (state.trusted or state.finished))):
        return None
    if state.finished:
        return "converged: the basis spans an invariant subspace"
    return "converged: all residuals are within the tolerance"
