"""The trace of a positive semi-definite matrix, by leave-one-out Nystrom approximations."""

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
from hessfunc.algorithms.sketch import vectors_that_fit
from hessfunc.algorithms.statistics import (
    STOPPED,
    Complements,
    leaf_errors,
    rounding_of_sum,
    standard_error_of_mean,
)
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Rows, Space, products_eps, rows_dtype
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
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Estimate] | None = None,
    checkpoint: Directory = None,
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
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Estimate` after each round; returning True stops.
        checkpoint: a directory that keeps the state, for a run that was killed to go on from.

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
    products = Products.of(matvec, like, space)
    space = products.space
    at_least(0, rtol=rtol, atol=atol)
    at_least(3, max_matvecs=max_matvecs)
    at_least(1, block_size=block_size)
    store = Checkpoint.of(checkpoint, "xnystrace", products, seed, block_size=block_size)
    seed = store.seed
    tolerance = rtol is not None or atol is not None
    random = random_budget(products, max_matvecs, tolerance=tolerance)

    def exact() -> Estimate:
        return exact_trace(products, seed, max_matvecs=max_matvecs, block_size=block_size)

    if not random:
        return judged(exact(), rtol, atol)
    most = vectors_that_fit(space, 9)
    eps = products_eps(space, rows_dtype(space))

    def step(state: _State, room: int) -> _State:
        p = len(state.probes)
        width = min(block_size, room, min(space.n, most) - p)
        if width < 1:
            return state
        indices = range(p, p + width)
        probes = space.probes(indices, kind="sphere", seed=seed, dtype=rows_dtype(space))
        images = products(probes)
        return _State(torch.cat([state.probes, probes]), torch.cat([state.images, images]))

    def found(state: _State, reason: str) -> Estimate:
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
        stderr = (stderr + rounding) * (STOPPED if tolerance else 1.0)
        squares = space.norms(state.images).cpu().double().square()
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
        if len(state.probes) == space.n:
            return "exact: the probes span the whole space"
        if len(state.probes) >= most:
            return f"no more than {most} probes fit in memory: `hutchinson` keeps none"
        if len(state.probes) < _FEWEST_PROBES:
            return None
        return narrow_enough(found(state, "running"), rtol, atol)

    none = space.zeros(0, rows_dtype(space))
    state, reason = drive(
        _State(none, none),
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
    """Rows: probes W and products AW."""

    probes: Rows
    images: Rows


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
