"""Recurrence of block Lanczos: a step, and the restart from the best Ritz vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hessfunc.algorithms.basis import orthonormal
from hessfunc.algorithms.eigen.convergence import residuals, wanted_ritz
from hessfunc.algorithms.eigen.lanczos_state import Problem, State
from hessfunc.algorithms.eigen.ritz import kept_by_restart, wanted
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.symmetry import SYMMETRIC, refuse_asymmetric
from hessfunc.numerics import rounding


def block_step(problem: Problem, products: Products, state: State) -> State:
    """Multiply the next block, and split the products into new columns of T and a new block."""
    space, j, basis = problem.space, state.size, state.basis
    last = basis[j:].brought(space).to(problem.dtype)
    images = products(last)
    # For a symmetric A, V A X' = C'. Only the last block of V is coupled with X, except right after
    # a restart.
    coupled = state.coupling[:, int(state.coupling.any(0).int().argmax()) if j else 0 :]
    own = space.gram(images, last)
    block, factor, inner = orthonormal(
        space,
        images,
        basis,
        threshold=lambda longest: rounding(problem.eps, max(state.longest, longest)),
        predicted=torch.cat([coupled.to(own), own], dim=1),
    )
    # A X' = [V; X]' columns + Q' F with the next block Q, so that columns = [V A X'; X A X'].
    columns = inner.mT
    above, corner = columns[:j], columns[j:]
    # The recurrence gives V A X' = C' for a symmetric A. Right after a restart, T is therefore the
    # arrowhead matrix of Wu and Simon: diag(values), bordered by C and C'.
    difference = above - state.coupling.mT
    # The rounding of a product has no preferred direction. Of its squared length, V shows j / n.
    shown = float(torch.linalg.vector_norm(difference))
    asymmetry = max(math.hypot(state.asymmetry, shown), shown * (space.n / max(j, 1)) ** 0.5)
    # T <- [V; X] A [V; X]', and C <- [0 F]. Between them the two keep A V' = V' T + X' C.
    left = torch.cat([state.projected, above.mT])
    right = torch.cat([above, (corner + corner.mT) / 2])
    following = replace(
        state,
        basis=basis.append(block, workspace(problem, state)),
        projected=torch.cat([left, right], dim=1),
        coupling=torch.cat([factor.new_zeros(len(factor), j), factor], dim=1),
        steps=state.steps + 1,
        failure=None,
        asymmetry=asymmetry,
    )
    # The dtype of the vectors does not show that a model computes in bfloat16. Its products are
    # symmetric only up to SYMMETRIC; with a looser rtol, larger differences must be let through.
    tolerance = max(SYMMETRIC, 10 * problem.eps, 2 * problem.method.rtol)
    skew = (corner - corner.mT).abs().max()
    largest = max(float(skew), float(difference.abs().max()) if j else 0.0)
    refuse_asymmetric(largest, following.longest, tolerance)
    return following if len(block) else _fresh_block(problem, following)


def workspace(problem: Problem, state: State) -> int:
    """Return the number of vectors in the workspace: one more if a vector may come from outside."""
    width = len(state.basis) - state.size
    return state.basis_size + max(problem.method.block_size, width) + (not state.trusted)


def _fresh_block(problem: Problem, state: State) -> State:
    """Return the state with a random block outside of the invariant subspace that V spans.

    The run is finished instead if the last such block has changed no wanted value.
    """
    space, values = problem.space, wanted_ritz(problem, state)[0]
    floor = rounding(problem.eps, state.largest)
    nothing_new = (
        state.closed is not None
        and len(values) == problem.method.k == len(state.closed)
        and bool(((values - state.closed).abs() <= floor).all())
    )
    if nothing_new or state.size == space.n:
        return replace(state, closed=values, finished=True)
    width = min(problem.method.block_size, space.n - state.size)
    indices = range(state.probes, state.probes + width)
    rows = space.probes(indices, kind="sphere", seed=state.seed_of_starts, dtype=problem.dtype)
    block, _, _ = orthonormal(space, rows, state.basis, threshold=lambda _: 1e-3)
    return replace(
        state,
        basis=state.basis.append(block, workspace(problem, state)),
        coupling=torch.zeros(len(block), state.size, dtype=torch.float64, device="cpu"),
        probes=state.probes + width,
        steps=0,
        closed=values,
        finished=len(block) == 0,
    )


def restarted(problem: Problem, state: State) -> State:
    """Shrink the basis to its outer Ritz vectors, in its own memory, and keep the next block.

    With T Y = Y D for the kept Ritz pairs, the recurrence A V' = V' T + X' C turns into

        A (Y'V)' = (Y'V)' D + X' (C Y),

    the restart of Wu and Simon: T becomes the diagonal D, and C becomes C Y.
    """
    values, vectors = state.ritz
    block = state.basis[state.size :].brought(problem.space).clone()
    indices = wanted(problem.method.which, values, problem.method.k)
    unconverged = indices[residuals(problem, state) > 1]
    kept = kept_by_restart(values, indices, unconverged, room=state.basis_size - len(block))
    rotation = vectors[:, kept]
    rotated = state.basis[: state.size].rotate(problem.space, rotation, problem.dtype)
    return replace(
        state,
        basis=rotated.append(block, workspace(problem, state)),
        projected=values[kept].diag(),
        coupling=state.coupling @ rotation,
        before=state.largest,
    )
