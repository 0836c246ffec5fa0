"""Power iteration with momentum and deflation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.results import Eigenpairs, rounding
from hessfunc.algorithms.rounds import (
    Callback,
    Products,
    at_least,
    drive,
    of_starts,
    products_eps,
    rows_dtype,
    unit_start,
)
from hessfunc.options import validated
from hessfunc.trees import Matvec, Rows, Space, Tree

__all__ = ["power_iteration"]

# Products between two looks at the residual.
_STEPS_A_ROUND = 4


@validated
def power_iteration(
    matvec: Matvec,
    like: Tree,
    *,
    k: int = 1,
    which: Literal["LM", "LA", "SA"] = "LM",
    momentum: float = 0.0,
    rtol: float = 1e-3,
    max_matvecs: int = 1000,
    start: Tree | None = None,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Eigenpairs] | None = None,
    checkpoint: Directory = None,
) -> Eigenpairs:
    """The largest eigenpairs of a symmetric matrix, one after another, by power iteration.

    With momentum b, and both vectors rescaled together,

        w_{t+1} = A w_t - b w_{t-1},        value = w'Aw / w'w.

    A pair is accepted when |A w - value w| <= rtol |value|; the next one is sought orthogonal to
    it. At the end the pairs are rotated within their span (Rayleigh-Ritz), at no product.
    `lanczos` takes far fewer products; this is the baseline, needs three vectors of memory, and
    is what stochastic variants build on.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        k: how many pairs, at most n.
        which: ``"LM"`` largest in absolute value; ``"LA"`` largest, ``"SA"`` smallest: the matrix
            is shifted by its dominant eigenvalue, found first.
        momentum: b, in units of the eigenvalue squared; best near (lambda_2 / 2)^2.
        rtol: the relative tolerance of residuals.
        max_matvecs: the budget.
        start: a tree to start from; random by default.
        seed: of the start.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Eigenpairs` after each round; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `Eigenpairs`; fewer than k, with the last one not converged, where the budget ends before.
        Residuals are those of products that were made: nothing is extrapolated.
        A dominant pair +a, -a does not converge, and is reported so.

    Raises:
        ValueError: an option is out of range.
        FloatingPointError: a product is not finite.

    Cost: one matvec an iteration; 2 k + 3 vectors of memory.

    Source: De Sa, He, Mitliagkas, Re and Xu 2017, arXiv 1707.02670.
    """
    products = Products.of(matvec, like, space)
    space = products.space
    if which not in ("LM", "LA", "SA"):
        raise ValueError(f"which={which!r}: choose 'LM', 'LA' or 'SA'; `lanczos` has 'BE'")
    if not 1 <= k <= space.n:
        raise ValueError(f"k={k}: the matrix has {space.n} eigenvalues, choose 1 to {space.n}")
    at_least(0, rtol=rtol, momentum=momentum)
    at_least(1, max_matvecs=max_matvecs)
    store = Checkpoint.of(
        checkpoint,
        "power_iteration",
        products,
        seed,
        k=k,
        which=which,
        momentum=momentum,
        start=start,
    )
    seed = store.seed
    dtype = rows_dtype(space)
    first = unit_start(space, start, seed)
    state = _State(
        current=first,
        previous=torch.zeros_like(first),
        image=None,
        vectors=first[:0],
        images=first[:0],
        shift=0.0 if which == "LM" else None,
    )

    eps = products_eps(space, dtype)

    def tolerance(values: Tensor, largest: float) -> Tensor:
        # A value that is zero up to rounding has converged when its residual is, too.
        floor = rounding(eps, largest)
        tiny = torch.where(values.abs() <= floor, floor, 0.0)
        return torch.maximum(rtol * values.abs(), tiny)

    def step(state: _State, room: int) -> _State:
        for _ in range(min(room, _STEPS_A_ROUND)):
            state = _iterate(space, products, state, momentum)
            value, residual = _quotient(space, state)
            if residual <= float(tolerance(value, _largest(space, state))):
                return _accept(space, state, which, float(value), seed)
        return state

    def found(state: _State, reason: str) -> Eigenpairs:
        values, vectors, residuals = _ritz(space, state, which, k)
        return Eigenpairs(
            values=values,
            vectors=space.vectors(vectors),
            residuals=residuals,
            converged=residuals <= tolerance(values, _largest(space, state)),
            largest=_largest(space, state),
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        done = len(state.vectors) == k
        return "converged: all residuals are within the tolerance" if done else None

    state, reason = drive(
        state,
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=max_matvecs,
        callback=callback,
        storage=store,
    )
    return found(state, reason)


@dataclass(frozen=True)
class _State:
    """Rows: the iterate, its predecessor and product, and the accepted vectors and products.

    ``shift`` is None until the dominant eigenvalue, which fixes it, is known.
    """

    current: Rows
    previous: Rows
    image: Rows | None
    vectors: Rows
    images: Rows
    shift: float | None


def _iterate(space: Space, products: Products, state: _State, momentum: float) -> _State:
    if state.image is None:
        return replace(state, image=products(state.current))
    moved = state.image + (state.shift or 0.0) * state.current - momentum * state.previous
    moved = _outside(space, moved, state.vectors)
    length = space.norms(moved).to(moved.dtype)[:, None]
    if not bool(length > 0):
        # A w = 0 exactly: w is an eigenvector of value 0, and stays.
        moved, length = state.current, torch.ones_like(length)
    current, previous = moved / length, state.current / length
    return replace(state, current=current, previous=previous, image=products(current))


def _quotient(space: Space, state: _State) -> tuple[Tensor, float]:
    """The Rayleigh quotient, and the residual outside of the accepted vectors."""
    assert state.image is not None
    value = space.gram(state.current, state.image)[0].cpu()
    residual = state.image - float(value) * state.current
    return value, float(space.norms(_outside(space, residual, state.vectors)))


def _largest(space: Space, state: _State) -> float:
    """The largest absolute eigenvalue, from below: the longest product that is at hand."""
    images = state.images if state.image is None else torch.cat([state.images, state.image])
    return float(space.norms(images).max()) if len(images) else 0.0


def _accept(space: Space, state: _State, which: str, value: float, seed: int) -> _State:
    assert state.image is not None
    vectors = torch.cat([state.vectors, state.current])
    images = torch.cat([state.images, state.image])
    if state.shift is None:
        state = replace(state, shift=abs(value) if which == "LA" else -abs(value))
        at_wrong_end = value < 0 if which == "LA" else value > 0
        if at_wrong_end:
            vectors, images = state.vectors, state.images
    state = replace(state, vectors=vectors, images=images)
    if len(state.vectors) == space.n:
        return state
    # A fresh probe for each pair; one more after the dominant pair was at the wrong end.
    index = len(state.vectors) + 1
    fresh = space.probes([index], kind="normal", seed=of_starts(seed), dtype=state.current.dtype)
    fresh = _outside(space, fresh, state.vectors)
    current = fresh / space.norms(fresh).to(fresh.dtype)[:, None]
    return replace(state, current=current, previous=torch.zeros_like(current), image=None)


def _outside(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        rows = rows - space.combine(space.gram(rows, basis), basis)
    return rows


def _ritz(space: Space, state: _State, which: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz in the span of all vectors whose product is known."""
    rows, images = state.vectors, state.images
    if state.image is not None and len(rows) < k:
        rows, images = torch.cat([rows, state.current]), torch.cat([images, state.image])
    projected = space.gram(rows, images).cpu().double()
    values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    order = {"LM": values.abs(), "LA": values, "SA": -values}[which].argsort(descending=True)
    values, rotation = values[order], rotation[:, order]
    rows = space.combine(rotation.mT, rows)
    residuals = space.combine(rotation.mT, images) - values.to(rows)[:, None] * rows
    return values, rows, space.norms(residuals).cpu()
