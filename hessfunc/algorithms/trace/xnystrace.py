"""The trace of a positive semi-definite matrix, by leave-one-out Nystrom approximations."""

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
from hessfunc.algorithms.sketch import vectors_that_fit
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
    """The trace of a positive semi-definite matrix, such as a GGN, by XNysTrace.

    With probes w_i on the sphere of radius sqrt(n), and the Nystrom approximation
    N_i = A W_i (W_i' A W_i)^-1 W_i' A from all probes but w_i,

        t_i = tr N_i + c_i u_i' (A - N_i) u_i,

    where u_i is the part of w_i outside of the other probes, and c_i = (n - p + 1) / |u_i|^2
    puts it back on its sphere. The estimate is the mean of t_i. One product a probe, where
    `xtrace` needs two; the variance is zero from rank + 1 probes on.

    Args:
        matvec: block -> block, symmetric positive semi-definite.
        like: a tree that says what vectors look like.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget: so many probes at the most.
        block_size: how many probes are multiplied at once.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`. ``samples`` are the t_i, which are correlated; ``stderr`` is the largest of
        three errors: that of independent probes on the complements times 1.15, a jackknife, and
        the curvature that a left-out product loses. Intervals of a run with a tolerance are
        widened by 1.1, since it stops where its error looks small. It says "converged" if and
        only if its 95 % interval is within the tolerance. ``squared_frobenius`` comes from the
        same products.

    Raises:
        ValueError: an option is out of range; the matrix has a negative eigenvalue.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: one matvec a probe; the memory of 6 vectors a probe at its peak.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825, by an eigendecomposition of the
    core; the interval: Efron and Stein 1981.
    """
    at_least(3, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 9)
    method = XNysTrace(block_size=block_size, rtol=rtol, atol=atol, most=most)
    return run_trace(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XNysTrace(TraceProbing["_State"]):
    """Mean of leave-one-out estimates, each with the Nystrom approximation of all other probes."""

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(0, rows_dtype(products.space))
        return _State(none, none, seed)

    def count(self, state: _State, /) -> int:
        return len(state.probes)

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

    def finish(
        self, state: _State, products: Products, reason: str, room: int, /
    ) -> tuple[_State, str]:
        refuse_asymmetric(products, state.probes, state.images)
        return state, reason

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        eps = products_eps(space, rows_dtype(space))
        approximation = _nystrom(space, state, eps)
        parts, complements = _leave_one_out(space, state, approximation)
        samples = parts.sum(1)
        spanned = len(samples) == space.n
        two = _leave_two_out(approximation)
        stderr = 0.0
        if not spanned:
            stderr = standard_error_of_mean(samples, two, complements, jackknife=_JACKKNIFE)
        # The shift of the approximation biases it by as much.
        rounding = rounding_of_sum(eps, halves=2) * float(parts.abs().sum(1).mean())
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
    """Rows: probes W and products AW."""

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    seed: int


@dataclass(frozen=True)
class _Nystrom:
    """The approximation ``F F'`` of ``A + shift I``, and how it looks without each probe.

    Without probe i it loses the direction ``F b_i``: it is ``F (I - b_i b_i') F'``.

    Attributes:
        factor: rows F'.
        gram: F'F, float64 ``(p, p)``.
        directions: unit columns b_i, float64 ``(p, p)``.
        residuals: ``w_i' (A + shift I - N_i) w_i``, float64 ``(p,)``.
        probes_inverse: the inverse of the gram matrix of the probes, float64 ``(p, p)``.
        shift: that makes the matrix positive definite beyond rounding.
        n: the dimension.
    """

    factor: Tensor
    gram: Tensor
    directions: Tensor
    residuals: Tensor
    probes_inverse: Tensor
    shift: float
    n: int


def _nystrom(space: Space, state: _State, eps: float) -> _Nystrom:
    # The core in an orthonormal basis of the probes is no worse conditioned than A.
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
    if float(values[0]) < -tolerance:
        raise ValueError(
            "the matrix is not positive semi-definite: a Ritz value is "
            f"{float(values[0]):.3g}, the largest {float(values[-1]):.3g}. Take `xtrace`, or a "
            "matrix that is positive, such as the GGN"
        )


def _leave_one_out(
    space: Space, state: _State, approximation: _Nystrom
) -> tuple[Tensor, Complements]:
    """Return the estimates t_i, leaf by leaf: float64 ``(p, leaves)``, and their complements."""
    inverse = approximation.probes_inverse
    outer = space.combine(inverse / inverse.diagonal()[:, None], state.probes)
    missing = space.combine(approximation.directions.mT, approximation.factor)
    rescaling = (space.n - len(outer) + 1) / space.norms(outer).cpu().double().square()
    whole = space.by_leaf(approximation.factor, approximation.factor).sum(0).cpu().double()
    whole -= approximation.shift * torch.tensor(space.sizes, dtype=torch.float64, device="cpu")
    # (A + shift I - N_i) u_i is the missing direction times the root of the residual.
    scale = rescaling * approximation.residuals.sqrt()
    tests = scale[:, None] * space.by_leaf(outer, missing).cpu().double()
    lost = space.by_leaf(missing, missing).cpu().double()
    complements = Complements(
        dimension=space.n - len(outer) + 1,
        quadratics=tests.sum(1),
        squares=rescaling * approximation.residuals * lost.sum(1),
        lost=lost.sum(1),
    )
    return whole - lost + tests, complements


def _leave_two_out(approximation: _Nystrom) -> Tensor:
    """The estimates t_ij that leave out both i and j, tested by i: float64 ``(p, p)``."""
    b, inverse = approximation.directions, approximation.probes_inverse
    p = len(b)
    cosine = b.mT @ b
    sine_squared = (1 - cosine.square()).clamp_min(torch.finfo(torch.float64).eps)
    lost = b.mT @ approximation.gram @ b
    first = lost.diagonal()
    second = (first - 2 * cosine * lost + cosine.square() * first[:, None]) / sine_squared
    lengths = inverse.diagonal()[:, None] - inverse.square() / inverse.diagonal()
    residuals = approximation.residuals[:, None] / sine_squared
    whole = approximation.gram.trace() - approximation.shift * approximation.n
    return whole - first[:, None] - second + (approximation.n - p + 2) * lengths * residuals
