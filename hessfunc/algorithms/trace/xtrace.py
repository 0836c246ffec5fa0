"""The trace by exchangeable leave-one-out low-rank approximations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.exact import exact_trace, is_small
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.results import Estimate, narrow_enough
from hessfunc.algorithms.rounds import Callback, Products, at_least, drive, products_eps, rows_dtype
from hessfunc.algorithms.sketch import Sketch, vectors_that_fit
from hessfunc.algorithms.trace.exchangeable import Spread, spread
from hessfunc.options import validated
from hessfunc.trees import Matvec, Rows, Space, Tree

__all__ = ["xtrace"]

# How the standard error lies between the two of `Spread`: calibrated by 1,000 seeds on six spectra.
_SHARE, _WIDENING = 0.4, 1.1
_FEWEST_PROBES = 10
# A run would stop where its error happens to look small: it must look smaller still.
_CAUTION = 1.15


@validated
def xtrace(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Estimate] | None = None,
    checkpoint: Directory = None,
) -> Estimate:
    """The trace of a symmetric matrix, positive or not, by XTrace.

    With probes w_i on the sphere of radius sqrt(n), and Q_i an orthonormal basis of the span of
    A w_j for all j but i,

        t_i = tr(Q_i' A Q_i) + c_i u_i' A u_i,  u_i = (I - Q_i Q_i') w_i,

    where c_i = (n - p + 1) / |u_i|^2 puts u_i back on its sphere. The estimate is the mean of
    t_i. The variance is far below Hutchinson's where the spectrum decays, and zero from rank + 1
    probes on.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget, two a probe.
        block_size: how many vectors are multiplied at once.
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Estimate` after each round; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `Estimate`. ``samples`` are the t_i, which are correlated; ``stderr`` lies between the
        naive error of their mean and the jackknife of the mean itself (geometric mean with
        weights 0.6 and 0.4, times 1.1). A run stops by its tolerance when the latter is narrow
        enough, by 15 %. With exactly as many probes as equal dominant eigenvalues the interval is
        too narrow still (70 to 90 % are covered for 5 to 30 of them); with a few more it holds.
        ``squared_frobenius`` comes from the same products.

    Raises:
        ValueError: an option is out of range.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: two matvecs a probe; the memory of 16 vectors a probe at its peak.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825; the interval: Efron and Stein 1981.
    """
    products = Products.of(matvec, like, space)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(4, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    store = Checkpoint.of(checkpoint, "xtrace", products, seed, block_size=block_size)
    seed = store.seed
    if is_small(products, max_matvecs):
        return exact_trace(products, seed)
    eps = products_eps(space, rows_dtype(space))
    most = vectors_that_fit(space, 16)

    def step(state: _State, room: int) -> _State:
        p = len(state.probes)
        width = min(block_size, room // 2, min(space.n, most) - p)
        if width < 1:
            return state
        indices = range(p, p + width)
        probes = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
        images = products(probes)
        return _State(
            torch.cat([state.probes, probes]),
            torch.cat([state.images, images]),
            state.sketch.extended(space, products, images),
        )

    def found(state: _State, reason: str, *, cautious: bool = False) -> Estimate:
        parts = _leave_one_out(space, state)
        samples = parts.sum(1)
        two = _leave_two_out(space, state) if state.sketch.full_rank else None
        errors = spread(samples, two)
        if len(samples) == space.n:
            errors = Spread(0.0, 0.0, space.n)
        rounding = 10 * eps * float(parts.abs().sum(1).mean())
        squares = space.norms(state.images).cpu().double().square()
        return Estimate(
            value=float(samples.mean()),
            stderr=(_stderr_to_stop(errors) if cautious else _stderr(errors)) + rounding,
            degrees=len(samples) - 1,
            samples=samples,
            by_leaf=dict(zip(space.names, parts.mean(0).tolist(), strict=True)),
            squared_frobenius=squared_frobenius(squares, products, seed),
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        if len(state.probes) == space.n:
            return "converged: the probes span the whole space"
        if len(state.probes) >= most:
            return f"no more than {most} probes fit in memory: `hutchinson` keeps none"
        if len(state.probes) < _FEWEST_PROBES or (rtol is None and atol is None):
            return None
        return narrow_enough(found(state, "running", cautious=True), rtol, atol)

    none = space.zeros(0, rows_dtype(space))
    state, reason = drive(
        _State(none, none, Sketch.empty(space)),
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
    """Rows: probes W and products AW, with a sketch of the products."""

    probes: Rows
    images: Rows
    sketch: Sketch


def _stderr(errors: Spread) -> float:
    return errors.complete if _resonates(errors) else errors.between(_SHARE, _WIDENING)


def _stderr_to_stop(errors: Spread) -> float:
    return math.inf if _resonates(errors) else _CAUTION * errors.complete


def _resonates(errors: Spread) -> bool:
    """Whether all hangs on one direction: as many probes as there are equal dominant eigenvalues.

    The two errors then differ by more than they do where a spectrum decays. A few probes more
    tell far better.
    """
    return errors.complete > math.sqrt(errors.probes) * errors.naive


def _leave_one_out(space: Space, state: _State) -> Tensor:
    """The estimates t_i, leaf by leaf: float64 ``(p, leaves)``."""
    sketch = state.sketch
    basis, basis_images = sketch.basis, sketch.images
    rank = len(basis)
    left_out = sketch.left_out()
    inside = space.gram(basis, state.probes).cpu().double()
    inside = inside - left_out * (left_out * inside).sum(0)
    outer = state.probes - space.combine(inside.mT, basis)
    outer_images = state.images - space.combine(inside.mT, basis_images)
    dimension = space.n - rank + left_out.norm(dim=0).round()
    rescaling = dimension / space.norms(outer).cpu().double().square()
    missing = space.combine(left_out.mT, basis)
    missing_images = space.combine(left_out.mT, basis_images)
    whole = space.by_leaf(basis, basis_images).sum(0)
    return (
        whole.cpu().double()
        - space.by_leaf(missing, missing_images).cpu().double()
        + rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    )


def _leave_two_out(space: Space, state: _State) -> Tensor:
    """The estimates t_ij that leave out both i and j, tested by i: float64 ``(p, p)``.

    All from small matrices: what s_j adds to s_i is one more direction e to be left out.
    """
    sketch = state.sketch
    S = sketch.left_out()
    H = space.gram(sketch.basis, sketch.images).cpu().double()
    inside = space.gram(sketch.basis, state.probes).cpu().double()
    quadratic = space.by_leaf(state.probes, state.images).sum(1).cpu().double()

    inside = inside - S * (S * inside).sum(0)
    lengths = space.n - inside.square().sum(0)
    image = sketch.factor - H @ inside
    forms = quadratic - (inside * (sketch.factor + image)).sum(0)

    cosine = S.mT @ S
    sine = (1 - cosine.square()).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    along = (S.mT @ inside).mT / sine
    SH = S.mT @ H @ S
    curvature = SH.diagonal()
    extra = (curvature - 2 * cosine * SH + cosine.square() * curvature[:, None]) / sine.square()
    SA = S.mT @ image
    image_along = (SA.mT - cosine * SA.diagonal()[:, None]) / sine
    forms = forms[:, None] + 2 * along * image_along + along.square() * extra
    rescaling = (space.n - len(S) + 2) / (lengths[:, None] + along.square())
    return H.trace() - curvature[:, None] - extra + rescaling * forms
