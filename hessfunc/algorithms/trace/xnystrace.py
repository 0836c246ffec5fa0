"""XNysTrace estimator of a trace, from leave-one-out Nystrom approximations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.probing import KeepsProbes, TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.sketch import vectors_that_fit
from hessfunc.algorithms.statistics import (
    Complements,
    standard_error_of_mean,
)
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Factor of the jackknife error, calibrated on ten spectra (bench/results/coverage.md).
_JACKKNIFE = 1.2


@validated
def xnystrace(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate the trace of a positive semi-definite matrix, such as a GGN, by XNysTrace.

    With probes w_i on the sphere of radius sqrt(n), and the Nystrom approximation
    N_i = A W_i (W_i' A W_i)^-1 W_i' A from all probes W_i but w_i,

        t_i = tr N_i + c_i u_i' (A - N_i) u_i,

    where u_i is the component of w_i orthogonal to the other probes, and
    c_i = (n - p + 1) / |u_i|^2 rescales u_i to the sphere of their complement. The estimate is the
    mean of the t_i over the p probes. A probe costs one product, while `xtrace` needs two. The
    variance is zero from rank(A) + 1 probes on.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> round(hf.xnystrace(matvec, like, max_matvecs=10, seed=0).value, 6)
        55.0

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric positive
            semi-definite.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of probes.
        block_size: Number of probes that are multiplied at once.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, whose ``samples`` are the t_i, which are correlated. ``stderr`` is the maximum
        of the error of independent probes on the complements times 1.15, a jackknife error, and
        the spread of the curvature that is lost when one product is left out. Its reason is
        "converged" if and only if its 95 % interval is within the tolerance. Standard errors of a
        run with a tolerance are multiplied by 1.1, since such a run stops where its error happens
        to look small. ``squared_frobenius`` comes from the same products.

    Raises:
        ValueError: If an option is out of range, if the matrix has a negative eigenvalue, or if
            the matvec is not symmetric or not deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: one matvec per probe. Memory: at most 6 vectors per probe.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825, here with an eigendecomposition of
    the core W'AW; the interval: Efron and Stein 1981.
    """
    at_least(3, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 9)
    method = XNysTrace(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XNysTrace(KeepsProbes, TraceProbing["_State"]):
    """Mean of the leave-one-out estimates, each from the Nystrom approximation of other probes."""

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(0, rows_dtype(products.space))
        return _State(none, none, seed)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, p = products.space, len(state.probes)
        width = min(self.block_size, room, min(space.n, self.most or space.n) - p)
        if width < 1:
            return state
        indices = range(p, p + width)
        probes = space.probes(indices, kind="sphere", seed=state.seed, dtype=rows_dtype(space))
        images = products(probes)
        return _State(
            torch.cat([state.probes, probes]), torch.cat([state.images, images]), state.seed
        )

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if len(state.probes) == products.space.n:
            return "exact: the probes span the whole space"
        return super().verdict(state, products, room)

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        eps = products_eps(space)
        approximation = _nystrom(space, state, eps)
        parts, complements = _leave_one_out(space, state, approximation)
        samples = parts.sum(1)
        spanned = len(samples) == space.n
        two = _leave_two_out(approximation)
        stderr = 0.0
        if not spanned:
            stderr = standard_error_of_mean(samples, two, complements, jackknife=_JACKKNIFE)
        # Shifting A before the approximation adds a bias of the order of the rounding.
        return self.mean_of(parts, stderr, state.images, space, cost, halves=2)


@dataclass(frozen=True)
class _State:
    """State of a run, with p probes.

    Attributes:
        probes: Probes w_i, rows ``(p, n)``.
        images: Products A w_i, rows ``(p, n)``.
        seed: Seed of the probes.
    """

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    seed: int


@dataclass(frozen=True)
class _Nystrom:
    """Nystrom approximation N = F F' of A_s = A + shift I, and its downdates.

    Leaving out probe i removes the direction F b_i:  N_i = F (I - b_i b_i') F'.

    Attributes:
        factor: Rows F', ``(p, n)``.
        gram: F'F, float64 ``(p, p)``.
        directions: Unit columns b_i, float64 ``(p, p)``.
        residuals: ``w_i' (A_s - N_i) w_i``, float64 ``(p,)``.
        probes_inverse: Inverse of the Gram matrix W'W of the probes, float64 ``(p, p)``.
        shift: Shift that makes A_s positive definite beyond rounding.
        n: Dimension of the matrix.
    """

    factor: Tensor
    gram: Tensor
    directions: Tensor
    residuals: Tensor
    probes_inverse: Tensor
    shift: float
    n: int


def _nystrom(space: Space, state: _State, eps: float) -> _Nystrom:
    """Return the Nystrom approximation from all probes.

        F' = K W'A_s,  K = (L + shift)^-1/2 V' R^-T,

    with W'W = R'R and the eigendecomposition R^-T W'AW R^-1 = V L V'. Since
    K'K = (W'A_sW)^-1, F F' = A_sW (W'A_sW)^-1 W'A_s.
    """
    # The core in an orthonormal basis W R^-1 of the probes is no worse conditioned than A.
    gram = space.gram(state.probes, state.probes).cpu().double()
    triangle_inverse = torch.linalg.inv(torch.linalg.cholesky(gram, upper=True))
    core = space.gram(state.probes, state.images).cpu().double()
    core = triangle_inverse.mT @ ((core + core.mT) / 2) @ triangle_inverse
    values, vectors = torch.linalg.eigh(core)
    largest = float(values.abs().max())
    _refuse_indefinite(values, max(1e-6, 100 * eps) * largest)
    shift = 10 * eps * largest or torch.finfo(torch.float64).tiny
    weights = (vectors / (values.clamp_min(0) + shift).sqrt()).mT @ triangle_inverse.mT
    factor = space.combine(weights, state.images + shift * state.probes)
    # With the columns k_i of K: F'w_j = K^-T e_j is orthogonal to k_i for j != i, so b_i is
    # k_i / |k_i|. Since k_i'F'w_i = 1, w_i'(A_s - N_i)w_i = (b_i'F'w_i)^2 = 1 / |k_i|^2.
    lengths = weights.norm(dim=0)
    return _Nystrom(
        factor=factor,
        gram=space.gram(factor, factor).cpu().double(),
        directions=weights / lengths,
        residuals=lengths**-2,
        probes_inverse=triangle_inverse @ triangle_inverse.mT,
        shift=shift,
        n=space.n,
    )


def _refuse_indefinite(values: Tensor, tolerance: float) -> None:
    """Raise if the smallest Ritz value is negative beyond rounding."""
    if float(values[0]) < -tolerance:
        raise ValueError(
            f"the matrix is not positive semi-definite: its Ritz values range from "
            f"{float(values[0]):.3g} to {float(values[-1]):.3g}. Take `xtrace`, or the trace of a "
            "positive semi-definite matrix such as `ggnvp(loss)`"
        )


def _leave_one_out(
    space: Space, state: _State, approximation: _Nystrom
) -> tuple[Tensor, Complements]:
    """Return the estimates t_i by leaf, float64 ``(p, leaves)``, and their complements.

    They are those of A_s, less tr(shift I) = shift n.
    """
    # u_i = sum_j (G^-1)_ij w_j / (G^-1)_ii with G = W'W is orthogonal to w_j for j != i.
    inverse = approximation.probes_inverse
    outer = space.combine(inverse / inverse.diagonal()[:, None], state.probes)
    missing = space.combine(approximation.directions.mT, approximation.factor)
    rescaling = (space.n - len(outer) + 1) / space.norms(outer).cpu().double().square()
    # tr N_i = tr(FF') - |F b_i|^2
    whole = space.by_leaf(approximation.factor, approximation.factor).sum(0).cpu().double()
    whole -= approximation.shift * torch.tensor(space.sizes, dtype=torch.float64, device="cpu")
    # (A_s - N_i) u_i = (A_s - N_i) w_i = F b_i sqrt(r_i), with r_i = w_i'(A_s - N_i)w_i, since
    # A_s - N_i is zero on the other probes.
    scale = rescaling * approximation.residuals.sqrt()
    tests = scale[:, None] * space.by_leaf(outer, missing).cpu().double()
    # N - N_i = F b_i b_i'F' has the only eigenvector F b_i, so that nothing is coupled to it.
    lost = space.by_leaf(missing, missing).cpu().double()
    complements = Complements(
        dimension=space.n - len(outer) + 1,
        quadratics=tests.sum(1),
        squares=rescaling * approximation.residuals * lost.sum(1),
        lost=lost.sum(1),
        coupling=torch.zeros(len(outer), dtype=torch.float64, device="cpu"),
    )
    return whole - lost + tests, complements


def _leave_two_out(approximation: _Nystrom) -> Tensor:
    """Return the estimates t_ij that leave out i and j, tested by probe i: float64 ``(p, p)``.

    Leaving out j as well removes one more direction F e_ij:

        N_ij = F (I - b_i b_i' - e_ij e_ij') F',
        e_ij = (b_j - g_ij b_i) / sqrt(1 - g_ij^2),  g_ij = b_i'b_j,

    so that t_ij = tr N_ij + (n - p + 2) u_ij'(A_s - N_ij)u_ij / |u_ij|^2 - shift n follows from
    p x p matrices alone. It extends the leave-one-out formulas of the paper. The diagonal has no
    meaning.
    """
    b, inverse = approximation.directions, approximation.probes_inverse
    p = len(b)
    # tr N_ij = tr(F'F) - |F b_i|^2 - |F e_ij|^2, with `first` = |F b_i|^2, `second` = |F e_ij|^2.
    cosine = b.mT @ b
    sine_squared = (1 - cosine.square()).clamp_min(torch.finfo(torch.float64).eps)
    lost = b.mT @ approximation.gram @ b
    first = lost.diagonal()
    second = (first - 2 * cosine * lost + cosine.square() * first[:, None]) / sine_squared
    # Schur complements of the 2 x 2 blocks (i, j) of G^-1 = (W'W)^-1 and of M^-1 = (W'A_sW)^-1:
    #     1 / |u_ij|^2 = (G^-1)_ii - (G^-1)_ij^2 / (G^-1)_jj
    #     w_i'(A_s - N_ij)w_i = 1 / ((M^-1)_ii - (M^-1)_ij^2 / (M^-1)_jj) = r_i / (1 - g_ij^2),
    # since (M^-1)_ij = k_i'k_j and r_i = 1 / (M^-1)_ii; u_ij gives the same form as w_i.
    inverse_lengths = inverse.diagonal()[:, None] - inverse.square() / inverse.diagonal()
    residuals = approximation.residuals[:, None] / sine_squared
    whole = approximation.gram.trace() - approximation.shift * approximation.n
    tests = (approximation.n - p + 2) * inverse_lengths * residuals
    return whole - first[:, None] - second + tests
