"""The trace by exchangeable leave-one-out low-rank approximations."""

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
from hessfunc.algorithms.statistics import (
    Complements,
    leaf_errors,
    rounding_of_sum,
    standard_error_of_mean,
)
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# An interval of fewer probes does not stop a run.
_FEWEST_PROBES = 10
# Factor of the jackknife error, calibrated on ten spectra (bench/results/coverage.md).
_JACKKNIFE = 1.1


@validated
def xtrace(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    **run: Unpack[RunOptions],
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
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`. ``samples`` are the t_i, which are correlated; ``stderr`` is the largest of
        three errors: that of independent probes on the complements times 1.15, a jackknife, and
        the curvature that a left-out product loses. Intervals of a run with a tolerance are
        widened by 1.1, since it stops where its error looks small. It says "converged" if and
        only if its 95 % interval is within the tolerance. ``squared_frobenius`` comes from the
        same products.

    Raises:
        ValueError: an option is out of range, or the matrix is not symmetric or not deterministic.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: two matvecs a probe; the memory of 9 vectors a probe at its peak.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825; the interval: Efron and Stein 1981.
    """
    at_least(4, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 16)
    method = XTrace(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XTrace(TraceProbing["_State"]):
    """Mean of leave-one-out estimates, each with the sketch of all other products."""

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(0, rows_dtype(products.space))
        return _State(none, none, Sketch.empty(products.space), seed)

    def count(self, state: _State, /) -> int:
        return len(state.probes)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, p = products.space, len(state.probes)
        width = min(self.block_size, room // 2, min(space.n, self.most or space.n) - p)
        if width < 1:
            return state
        indices = range(p, p + width)
        probes = space.probes(indices, kind="sphere", seed=state.seed, dtype=rows_dtype(space))
        images = products(probes)
        return _State(
            torch.cat([state.probes, probes]),
            torch.cat([state.images, images]),
            state.sketch.extended(space, products, images),
            state.seed,
        )

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        refuse_asymmetric(products, state.probes, state.images)
        return state, reason

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        parts, complements = _leave_one_out(space, state)
        samples = parts.sum(1)
        two = _leave_two_out(space, state) if state.sketch.full_rank else None
        stderr = standard_error_of_mean(samples, two, complements, jackknife=_JACKKNIFE)
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
    """Rows: probes W and products AW, with a sketch of the products."""

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    sketch: Sketch
    seed: int


def _leave_one_out(space: Space, state: _State) -> tuple[Tensor, Complements]:
    """Return the estimates t_i, leaf by leaf: float64 ``(p, leaves)``, and their complements.

    With s_i = Q S_i the unit direction that only the i-th product adds, Q_i Q_i' = QQ' - s_i s_i'.
    """
    sketch = state.sketch
    basis, basis_images = sketch.basis, sketch.images
    left_out = sketch.left_out()
    inside = space.gram(basis, state.probes).cpu().double()
    inside = inside - left_out * (left_out * inside).sum(0)
    outer = state.probes - space.combine(inside.mT, basis)
    outer_images = state.images - space.combine(inside.mT, basis_images)
    dimension = space.n - len(basis) + left_out.norm(dim=0).round()
    rescaling = dimension / space.norms(outer).cpu().double().square()
    missing = space.combine(left_out.mT, basis)
    missing_images = space.combine(left_out.mT, basis_images)
    lost = space.by_leaf(missing, missing_images).cpu().double()
    whole = space.by_leaf(basis, basis_images).sum(0).cpu().double()
    tests = rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    # |P_i A u|^2 with P_i = I - QQ' + s_i s_i'.
    coefficients = space.gram(outer_images, basis).cpu().double()
    along = (coefficients * left_out.mT).sum(1).square()
    lengths = space.norms(outer_images).cpu().double().square() - coefficients.square().sum(1)
    complements = Complements(
        dimension=space.n - len(basis) + 1,
        quadratics=tests.sum(1),
        squares=rescaling * (lengths.clamp_min(0) + along),
        lost=lost.sum(1),
    )
    return whole - lost + tests, complements


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
