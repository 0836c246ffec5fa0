"""The trace of a sketched range, and independent probes outside of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.exact import (
    refuse_asymmetric,
)
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.probing import TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Estimate, leaf_fields
from hessfunc.algorithms.sketch import Sketch, vectors_that_fit
from hessfunc.algorithms.statistics import leaf_errors, rounding_of_sum, sphere_error
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
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
    **run: Unpack[RunOptions],
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
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`; ``squared_frobenius`` comes from the same products.

    Raises:
        ValueError: an option is out of range.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: three matvecs a probe; the memory of 8 vectors a probe and 3 block_size more at its peak.

    Source: Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649.
    """
    at_least(6, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 11)
    method = HutchPP(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class HutchPP(TraceProbing["_State"]):
    """Trace of a sketched range, and quadratic forms of independent probes outside of it."""

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(0, rows_dtype(products.space))
        return _State(none, none, Sketch.empty(products.space), seed)

    def count(self, state: _State, /) -> int:
        return len(state.probes)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, p = products.space, len(state.probes)
        most = min(self.most or space.n, space.n - 1)
        width = min(self.block_size, room // 3, most - p)
        if width < 1:
            return state
        # Even indices are for the sketch, odd ones for the probes.
        indices = [*range(2 * p, 2 * (p + width), 2), *range(2 * p + 1, 2 * (p + width), 2)]
        rows = space.probes(indices, kind="sphere", seed=state.seed, dtype=rows_dtype(space))
        images = products(rows)
        return _State(
            torch.cat([state.probes, rows[width:]]),
            torch.cat([state.images, images[width:]]),
            state.sketch.extended(space, products, images[:width]),
            state.seed,
        )

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        refuse_asymmetric(products, state.probes, state.images)
        return state, reason

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        parts, outside = _samples(space, state)
        samples, basis = parts.sum(1), state.sketch.basis
        quadratics = samples - float(space.by_leaf(basis, state.sketch.images).sum())
        stderr = sphere_error(quadratics, outside, space.n - len(basis))
        eps = products_eps(space, rows_dtype(space))
        rounding = rounding_of_sum(eps) * float(parts.abs().sum(1).mean())
        stderr = (stderr + rounding) * self.widening
        squares = space.norms(state.images).cpu().double().square()
        return Estimate(
            value=float(samples.mean()),
            stderr=stderr,
            degrees=len(samples),
            samples=samples,
            **leaf_fields(space, parts.mean(0), leaf_errors(parts, stderr)),
            squared_frobenius=squared_frobenius(squares, space, cost),
            **cost,
        )


@dataclass(frozen=True)
class _State:
    """Rows: probes G and products AG, with a sketch that is independent of them."""

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    sketch: Sketch
    seed: int


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
