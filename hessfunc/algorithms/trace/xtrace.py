"""XTrace estimator of a trace, from exchangeable leave-one-out low-rank approximations."""

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
from hessfunc.algorithms.statistics import (
    Complements,
    standard_error_of_mean,
)
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree

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
    """Estimate the trace of a symmetric matrix, definite or not, by XTrace.

    With probes w_i on the sphere of radius sqrt(n), and Q_i an orthonormal basis of the span of
    A w_j for all j != i,

        t_i = tr(Q_i' A Q_i) + c_i u_i' A u_i,  u_i = (I - Q_i Q_i') w_i,

    where c_i = (n - p + 1) / |u_i|^2 rescales u_i to the sphere of the complement. The estimate is
    the mean of the t_i over the p probes. If the spectrum decays, its variance is far below that of
    `hutchinson`. The variance is zero from rank(A) + 1 probes on.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> round(hf.xtrace(matvec, like, max_matvecs=20, seed=0).value, 6)
        55.0

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of products, two per probe.
        block_size: Number of probes that are multiplied at once.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, whose ``samples`` are the t_i, which are correlated. ``stderr`` is the maximum
        of the error of independent probes on the complements times 1.15, a jackknife error, and
        the size of the curvature that is lost when one product is left out. Its reason is
        "converged" if and only if its 95 % interval is within the tolerance. Standard errors of a
        run with a tolerance are multiplied by 1.1, since such a run stops where its error happens
        to look small. ``squared_frobenius`` comes from the same products.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric or not
            deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: two matvecs per probe. Memory: at most 9 vectors per probe.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825; the interval: Efron and Stein 1981.
    """
    at_least(4, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 16)
    method = XTrace(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XTrace(KeepsProbes, TraceProbing[SketchedProbes]):
    """Mean of the leave-one-out estimates, each from the sketch of all other products."""

    def init(self, products: Products, seed: int, /) -> SketchedProbes:
        return SketchedProbes.none(products.space, seed)

    def step(self, state: SketchedProbes, products: Products, room: int, /) -> SketchedProbes:
        most = min(products.space.n, self.most or products.space.n)
        width = min(self.block_size, room // 2, most - len(state.probes))
        return state.grown(products, width, "sphere")

    def estimate(self, state: SketchedProbes, space: Space, cost: Cost, /) -> Estimate:
        parts, complements = _leave_one_out(space, state)
        samples = parts.sum(1)
        two = _leave_two_out(space, state) if state.sketch.full_rank else None
        stderr = standard_error_of_mean(samples, two, complements, jackknife=_JACKKNIFE)
        return self.mean_of(parts, stderr, state.images, space, cost)


def _leave_one_out(space: Space, state: SketchedProbes) -> tuple[Tensor, Complements]:
    """Return the estimates t_i by leaf, float64 ``(p, leaves)``, and their complements.

    Leaving out the i-th product removes one unit direction Q s_i from the range of Q,

        Q_i Q_i' = Q (I - s_i s_i') Q',

    where s_i is orthogonal to all columns of C but the i-th, for A W = Q C. Here and below, s_i are
    coefficients with respect to Q, and s_i = 0 if the other products span the i-th.
    """
    sketch = state.sketch
    basis, basis_images = sketch.basis, sketch.images
    left_out = sketch.left_out()
    # u_i = w_i - Q x_i and A u_i = A w_i - A Q x_i,  x_i = (I - s_i s_i') Q'w_i.
    inside = space.gram(basis, state.probes).cpu().double()
    inside = inside - left_out * (left_out * inside).sum(0)
    outer = state.probes - space.combine(inside.mT, basis)
    outer_images = state.images - space.combine(inside.mT, basis_images)
    # The complement of Q_i has the dimension n - q + 1, or n - q if s_i = 0.
    dimension = space.n - len(basis) + left_out.norm(dim=0).round()
    rescaling = dimension / space.norms(outer).cpu().double().square()
    # tr(Q_i'AQ_i) = tr(Q'AQ) - (Q s_i)'A (Q s_i)
    missing = space.combine(left_out.mT, basis)
    missing_images = space.combine(left_out.mT, basis_images)
    lost = space.by_leaf(missing, missing_images).cpu().double()
    whole = space.by_leaf(basis, basis_images).sum(0).cpu().double()
    tests = rescaling[:, None] * space.by_leaf(outer, outer_images).cpu().double()
    # |(I - Q_i Q_i') A u_i|^2 = |A u_i|^2 - |Q'A u_i|^2 + (s_i'Q'A u_i)^2
    coefficients = space.gram(outer_images, basis).cpu().double()
    along = (coefficients * left_out.mT).sum(1).square()
    lengths = space.norms(outer_images).cpu().double().square() - coefficients.square().sum(1)
    # |(I - Q Q') A Q s_i|^2 = |A Q s_i|^2 - |Q'A Q s_i|^2
    inner = space.gram(missing_images, basis).cpu().double().square().sum(1)
    coupling = (space.norms(missing_images).cpu().double().square() - inner).clamp_min(0).sqrt()
    complements = Complements(
        dimension=space.n - len(basis) + 1,
        quadratics=tests.sum(1),
        squares=rescaling * (lengths.clamp_min(0) + along),
        lost=lost.sum(1),
        coupling=coupling,
    )
    return whole - lost + tests, complements


def _leave_two_out(space: Space, state: SketchedProbes) -> Tensor:
    """Return the estimates t_ij that leave out i and j, tested by probe i: float64 ``(p, p)``.

    Leaving out j as well removes one more unit direction Q e_ij from the range of Q,

        Q_ij Q_ij' = Q (I - s_i s_i' - e_ij e_ij') Q',
        e_ij = (s_j - g_ij s_i) / sqrt(1 - g_ij^2),  g_ij = s_i's_j,

    so that t_ij = tr(Q_ij'AQ_ij) + c_ij u_ij'Au_ij, with u_ij = (I - Q_ij Q_ij') w_i and
    c_ij = (n - p + 2) / |u_ij|^2, follows from p x p matrices alone. It extends the leave-one-out
    formulas of the paper, and requires linearly independent products. The diagonal has no meaning.
    """
    sketch = state.sketch
    S = sketch.left_out()
    H = space.gram(sketch.basis, sketch.images).cpu().double()
    inside = space.gram(sketch.basis, state.probes).cpu().double()
    quadratic = space.by_leaf(state.probes, state.images).sum(1).cpu().double()

    # Leave out i, as in `_leave_one_out`: u_i = w_i - Q x_i, x_i = (I - s_i s_i') Q'w_i, and
    # |u_i|^2 = n - |x_i|^2. With H = Q'AQ and C = Q'AW, whose column i is C_i:
    #     image_i = Q'A u_i = C_i - H x_i
    #     forms_i = u_i'A u_i = w_i'A w_i - x_i'(C_i + image_i)
    inside = inside - S * (S * inside).sum(0)
    lengths = space.n - inside.square().sum(0)
    image = sketch.factor - H @ inside
    forms = quadratic - (inside * (sketch.factor + image)).sum(0)

    # Leave out j as well: u_ij = u_i + a_ij Q e_ij, with e_ij'x_i = s_j'x_i / sine_ij.
    #     along_ij = a_ij = e_ij'Q'w_i = e_ij'x_i
    #     extra_ij = e_ij'H e_ij
    #     image_along_ij = e_ij'Q'A u_i
    #     u_ij'A u_ij = u_i'A u_i + 2 a_ij e_ij'Q'A u_i + a_ij^2 e_ij'H e_ij
    #     |u_ij|^2 = |u_i|^2 + a_ij^2
    #     tr(Q_ij'AQ_ij) = tr H - s_i'H s_i - e_ij'H e_ij
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
