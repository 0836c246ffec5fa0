"""Hutch++ estimator of a trace, from a sketch of the range and probes outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.probing import KeepsProbes, TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.sketch import SketchedProbes, vectors_that_fit
from hessfunc.algorithms.statistics import sphere_error
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Matvec, Tree


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
    """Estimate the trace of a symmetric matrix by Hutch++.

        tr A = tr(Q'AQ) + E[c u'Au],  u = (I - QQ') g,  c = (n - q) / |u|^2

    Q is an orthonormal basis of q vectors of the span of products with random vectors. The probes g
    are other random vectors, on the sphere of radius sqrt(n); c rescales u to the sphere of the
    complement of Q. A third of the budget each goes to the random vectors, to Q and to the probes.
    When the basis grows, all earlier probes are projected again, at no further product.

    The probes are independent of Q. Therefore the standard error is that of quadratic forms on a
    sphere, estimated from the products themselves, and the interval is Student's. `xtrace` is more
    accurate for the same number of products, but its error is harder to estimate.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> round(hf.hutchpp(matvec, like, max_matvecs=30, seed=0).value, 6)
        55.0

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of products, three per probe.
        block_size: Number of probes, and of random vectors for Q, that a round adds.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, with ``squared_frobenius`` from the same products. Its reason is "converged" if
        and only if its 95 % interval is within the tolerance. Standard errors of a run with a
        tolerance are multiplied by 1.1, since such a run stops where its error happens to look
        small.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric or not
            deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: three matvecs per probe. Memory: at most 8 vectors per probe and 3 block_size more.

    Source: Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649.
    """
    at_least(6, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 11)
    method = HutchPP(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class HutchPP(KeepsProbes, TraceProbing[SketchedProbes]):
    """Trace on a sketched range, and quadratic forms of independent probes outside of it."""

    def init(self, products: Products, seed: int, /) -> SketchedProbes:
        return SketchedProbes.none(products.space, seed)

    def step(self, state: SketchedProbes, products: Products, room: int, /) -> SketchedProbes:
        space, p = products.space, len(state.probes)
        most = min(self.most or space.n, space.n - 1)
        width = min(self.block_size, room // 3, most - p)
        if width < 1:
            return state
        # Even indices are random vectors for the sketch, odd indices are probes.
        indices = [*range(2 * p, 2 * (p + width), 2), *range(2 * p + 1, 2 * (p + width), 2)]
        rows = space.probes(indices, kind="sphere", seed=state.seed, dtype=rows_dtype(space))
        images = products(rows)
        return SketchedProbes(
            torch.cat([state.probes, rows[width:]]),
            torch.cat([state.images, images[width:]]),
            state.sketch.extended(space, products, images[:width]),
            state.seed,
        )

    def estimate(self, state: SketchedProbes, space: Space, cost: Cost, /) -> Estimate:
        parts, outside = _samples(space, state)
        samples, basis = parts.sum(1), state.sketch.basis
        quadratics = samples - float(space.by_leaf(basis, state.sketch.images).sum())
        stderr = sphere_error(quadratics, outside, space.n - len(basis))
        return self.mean_of(parts, stderr, state.images, space, cost)


def _samples(space: Space, state: SketchedProbes) -> tuple[Tensor, Tensor]:
    """Return the estimate of each probe by leaf, and the squared lengths of the projected products.

    With P = I - QQ', u = P g and c = (n - q) / |u|^2:

        parts = tr(Q'AQ) + c u'Au, float64 ``(p, leaves)``;  c |PAu|^2, float64 ``(p,)``.
    """
    basis, basis_images = state.sketch.basis, state.sketch.images
    # u = g - Q x and A u = A g - A Q x,  x = Q'g.
    inside = space.gram(state.probes, basis)
    outer = state.probes - space.combine(inside, basis)
    outer_images = state.images - space.combine(inside, basis_images)
    rescaling = (space.n - len(basis)) / space.norms(outer).cpu().double().square()
    whole = space.by_leaf(basis, basis_images).sum(0).cpu().double()
    parts = whole + rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    projected = outer_images - space.combine(space.gram(outer_images, basis), basis)
    return parts, rescaling * space.norms(projected).cpu().double().square()
