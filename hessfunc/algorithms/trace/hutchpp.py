"""The trace of a sketched range, and independent probes outside of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Checkpoint, Directory
from hessfunc.algorithms.driver import Callback, drive
from hessfunc.algorithms.exact import (
    exact_trace,
    random_budget,
    refuse_asymmetric,
    unit_vectors_left,
)
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Estimate, judged, leaf_fields, narrow_enough
from hessfunc.algorithms.sketch import Sketch, vectors_that_fit
from hessfunc.algorithms.statistics import STOPPED, leaf_errors, rounding_of_sum, sphere_error
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# An interval of fewer probes does not stop a run.
_FEWEST_PROBES = 10


@validated
def hutchpp(
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
    """The trace of a symmetric matrix, by Hutch++.

    With an orthonormal basis Q of the products of some random vectors, and other probes g_i on
    the sphere of radius sqrt(n),

        tr A = tr(Q'AQ) + E[c u'Au],  u = (I - QQ') g,  c = (n - q) / |u|^2,

    where Q has q rows, and c puts u on the sphere of the complement. Thirds of the budget go to
    the random vectors, to Q, and to the probes. A basis that grows is put to use on all probes,
    old ones too, without a product.

    The probes are independent of Q, so the standard error is that of quadratic forms on a sphere,
    which the products themselves give, and the interval is Student's. `xtrace` makes more of as
    many products, but its error is harder to know.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget.
        block_size: how many vectors of each kind join in one round.
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Estimate` after each round; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

    Returns:
        `Estimate`; ``squared_frobenius`` comes from the same products.

    Raises:
        ValueError: an option is out of range.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: three matvecs a probe; the memory of 8 vectors a probe and 3 block_size more at its peak.

    Source: Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649.
    """
    products = Products.of(matvec, like, space)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(6, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    store = Checkpoint.of(checkpoint, "hutchpp", products, seed, block_size=block_size)
    seed = store.seed
    tolerance = rtol is not None or atol is not None
    random = random_budget(products, max_matvecs, tolerance=tolerance)

    def exact() -> Estimate:
        return exact_trace(products, seed, max_matvecs=max_matvecs, block_size=block_size)

    if not random:
        return judged(exact(), rtol, atol)
    eps = products_eps(space, rows_dtype(space))
    most = min(vectors_that_fit(space, 11), space.n - 1)

    def step(state: _State, room: int) -> _State:
        p = len(state.probes)
        width = min(block_size, room // 3, most - p)
        if width < 1:
            return state
        # Even indices are for the sketch, odd ones for the probes.
        indices = [*range(2 * p, 2 * (p + width), 2), *range(2 * p + 1, 2 * (p + width), 2)]
        rows = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
        images = products(rows)
        return _State(
            torch.cat([state.probes, rows[width:]]),
            torch.cat([state.images, images[width:]]),
            state.sketch.extended(space, products, images[:width]),
        )

    def found(state: _State, reason: str) -> Estimate:
        parts, outside = _samples(space, state)
        samples = parts.sum(1)
        basis = state.sketch.basis
        quadratics = samples - float(space.by_leaf(basis, state.sketch.images).sum())
        stderr = sphere_error(quadratics, outside, space.n - len(basis))
        rounding = rounding_of_sum(eps) * float(parts.abs().sum(1).mean())
        squares = space.norms(state.images).cpu().double().square()
        stderr = (stderr + rounding) * (STOPPED if tolerance else 1.0)
        return Estimate(
            value=float(samples.mean()),
            stderr=stderr,
            degrees=len(samples),
            samples=samples,
            **leaf_fields(space, parts.mean(0), leaf_errors(parts, stderr)),
            squared_frobenius=squared_frobenius(squares, products, seed),
            **products.cost(reason, seed),
        )

    def verdict(state: _State) -> str | None:
        if len(state.probes) >= most:
            return f"no more than {most} probes fit in memory: `hutchinson` keeps none"
        if len(state.probes) < _FEWEST_PROBES:
            return None
        return narrow_enough(found(state, "running"), rtol, atol)

    none = space.zeros(0, rows_dtype(space))
    state, reason = drive(
        _State(none, none, Sketch.empty(space)),
        products=products,
        step=step,
        verdict=verdict,
        running=lambda state: found(state, "running"),
        max_matvecs=random,
        callback=callback,
        storage=store,
    )
    refuse_asymmetric(products, state.probes, state.images)
    estimate = judged(found(state, reason), rtol, atol)
    if unit_vectors_left(products, max_matvecs, random, estimate.reason):
        return judged(exact(), rtol, atol)
    return estimate


@dataclass(frozen=True)
class _State:
    """Rows: probes G and products AG, with a sketch that is independent of them."""

    probes: Rows
    images: Rows
    sketch: Sketch


def _samples(space: Space, state: _State) -> tuple[Tensor, Tensor]:
    """Return the estimates of each probe, and the squared lengths of ``PAu``, both float64.

    With P = I - QQ' and u = P g on the sphere of the complement, the estimates are tr(Q'AQ) + u'Au,
    leaf by leaf: ``(p, leaves)`` and ``(p,)``.
    """
    basis, basis_images = state.sketch.basis, state.sketch.images
    inside = space.gram(state.probes, basis)
    outer = state.probes - space.combine(inside, basis)
    outer_images = state.images - space.combine(inside, basis_images)
    rescaling = (space.n - len(basis)) / space.norms(outer).cpu().double().square()
    whole = space.by_leaf(basis, basis_images).sum(0).cpu().double()
    parts = whole + rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    projected = outer_images - space.combine(space.gram(outer_images, basis), basis)
    return parts, rescaling * space.norms(projected).cpu().double().square()
