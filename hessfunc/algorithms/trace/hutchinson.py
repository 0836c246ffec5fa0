"""Girard-Hutchinson estimator of a trace, from independent probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.checkpoint import Columns
from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.exact import exact_trace
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.probing import TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs, Estimate
from hessfunc.algorithms.results.estimate import Confidence, leaf_fields
from hessfunc.algorithms.span import Span
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, leaf_errors, sphere_error
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, ProbeKind, Rows, Space, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of random signs below which their sample variance is unreliable: for [[0, 1], [1, 0]] all
# p samples are equal with probability 2^(1 - p).
_FEWEST_SIGNS = 8


@validated
def hutchinson(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    kind: ProbeKind | None = None,
    deflate: Eigenpairs | None = None,
    known: Tree | None = None,
    block_size: int = 10,
    confidence: Confidence = "fixed",
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate the trace of a matrix by random probes (Girard-Hutchinson).

        tr A = E[w'Aw],  E[ww'] = I

    The estimate is the mean of w'Aw over the probes w. For a symmetric A, the variance of one
    sample is 2 (|A|_F^2 - sum_i a_ii^2) for signs, 2 |A|_F^2 for normal probes, and
    2 n / (n + 2) (|A|_F^2 - tr(A)^2 / n) for probes on the sphere. The standard error is that
    formula, with terms estimated from the products. It is far more accurate than the sample
    standard deviation, so intervals have their nominal coverage from 3 products on.

    Known eigenpairs (value_i, V_i) need not be sampled:

        tr A = sum_i value_i + E[u'Au],  u = (I - VV') w.

    A part K of the matrix with a known diagonal need not be sampled either, if ``matvec`` leaves
    K out:

        tr (A + K) = tr K + E[w'Aw].

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> trace = hf.hutchinson(matvec, like, max_matvecs=8, seed=0)
        >>> trace.value  # exact, because A is diagonal
        55.0

    Args:
        matvec: Function from a block of vectors to the block of their products.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of probes.
        kind: Distribution of the probes: ``"signs"``, ``"normal"`` or ``"sphere"``. By default
            signs. Without ``kind``, if the budget allows n products, the unit vectors give the
            exact trace, either at once or after the random probes have cost n products.
        deflate: Eigenpairs of A, from `lanczos`. Their vectors must be orthonormal; they need not
            have converged.
        known: Diagonal of K, a tree with the structure of one vector. The estimate is then that of
            tr (A + K).
        block_size: Number of probes that are multiplied at once.
        confidence: ``"fixed"`` for an interval at the end of the run, or ``"anytime"`` for
            intervals that hold simultaneously at all numbers of probes, so that a run may be
            stopped for any reason and resumed. They are about 1.6 times as wide, and infinite with
            fewer than 7 probes. They assume that the mean of the quadratic forms is close to
            normal.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf`` (parts of eigenpairs are accurate up
        to their residuals), and ``squared_frobenius`` from the same products unless ``known`` is
        given. Its reason is "converged" if and only if its 95 % interval is within the tolerance.
        Standard errors of a run with a tolerance are multiplied by 1.1, since such a run stops
        where its error happens to look small; those of ``"anytime"`` are not.

    Raises:
        ValueError: If an option is out of range, or if the eigenpairs belong to other parameters
            or to another matrix.
        FloatingPointError: If a product is not finite.

    Cost: one matvec per probe, and one that checks the eigenpairs, whose own matvecs are not
    counted again. Memory:
    3 block_size vectors, or, with signs, 2 block_size vectors and 5 vectors in float64 if that is
    more. Drawing a normal or sphere probe takes about 8 ns per entry on one core, signs less.

    Source: Girard 1989; Hutchinson 1990; confidence sequences: Lai 1976, Wang and Ramdas 2023,
    arXiv 2310.03722.
    """
    at_least(2, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    method = Hutchinson(
        block_size=block_size,
        rtol=rtol,
        atol=atol,
        kind=kind or "signs",
        confidence=confidence,
        eigenpairs=Span.of(products.space, deflate, "deflate"),
        known=None if known is None else _sums(products.space, known),
    )
    if kind is not None:
        return run_method(method, products, run, max_matvecs=max_matvecs)
    exact = partial(exact_trace, known=method.known)
    return run_trace(method, products, run, max_matvecs=max_matvecs, exact=exact)


@dataclass(frozen=True, kw_only=True)
class Hutchinson(TraceProbing["_State"]):
    """Mean of the quadratic forms of random probes.

    Attributes:
        kind: Distribution of the probes.
        eigenpairs: Span of the known eigenpairs, which is not sampled.
        known: Trace of the part that the matvec leaves out, by leaf, float64 ``(leaves,)``.
    """

    kind: ProbeKind
    eigenpairs: Span
    known: Tensor | None = None

    changeable: ClassVar = TraceProbing.changeable | {"known"}
    fewest: ClassVar[int] = FEWEST_SAMPLES

    def options(self) -> dict[str, Any]:
        return {**super().options(), "eigenpairs": Columns(self.eigenpairs.basis)}

    def init(self, products: Products, seed: int, /) -> _State:
        space = products.space
        self.eigenpairs.refuse_another_matrix(products)
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        parts = none.new_zeros(0, len(space.names))
        return _State(parts, none, none, _Spread.none(space, self.kind), seed)

    def count(self, state: _State, /) -> int:
        return len(state.parts)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, pairs, first = products.space, self.eigenpairs, len(state.parts)
        indices = range(first, first + min(room, self.block_size))
        drawn = space.probes(indices, kind=self.kind, seed=state.seed, dtype=rows_dtype(space))
        probes = pairs.complement(space, drawn, on_sphere=self.kind == "sphere")
        images = products.as_given(probes)
        # inside = P A u with P = I - VV': its squared length is the |A|_F^2 of the matrix PAP whose
        # trace is sampled, E |PAPw|^2 = |PAP|_F^2.
        inside = pairs.complement(space, images, on_sphere=False)
        spread = state.spread
        if self.kind == "signs":
            spread = spread.extended(space, drawn, inside)
        return _State(
            torch.cat([state.parts, space.by_leaf(probes, images).cpu().double()]),
            torch.cat([state.squares, space.norms(images).cpu().double().square()]),
            torch.cat([state.inside, space.norms(inside).cpu().double().square()]),
            spread,
            state.seed,
        )

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> Estimate:
        exact = self.eigenpairs.parts if self.known is None else self.eigenpairs.parts + self.known
        samples = exact.sum() + state.parts.sum(1)
        stderr = _stderr(state, self.kind, space.n - len(self.eigenpairs.basis))
        # Each sample is a rounded sum, even if all samples are equal.
        stderr += torch.finfo(rows_dtype(space)).eps * float(state.parts.abs().sum(1).mean())
        stderr *= self.widening
        frobenius = None
        if self.known is None:
            frobenius = squared_frobenius(self.eigenpairs.squares + state.squares, space, cost)
        return Estimate(
            value=float(samples.mean()),
            stderr=stderr,
            degrees=len(samples),
            samples=samples,
            **leaf_fields(space, exact + state.parts.mean(0), leaf_errors(state.parts, stderr)),
            squared_frobenius=frobenius,
            confidence=self.confidence,
            **cost,
        )


@dataclass(frozen=True)
class _Spread:
    """Moments of the entries of ``w * Aw`` over probes of random signs (Welford 1962).

    Attributes:
        centre: Mean of each entry so far, a wide row ``(1, n)``; no row for other probes.
        squares: Sum of squared deviations from the means, over all entries and probes.
        probes: Number of probes.
    """

    centre: Rows = field(metadata=DIVIDED)
    squares: float
    probes: int

    @classmethod
    def none(cls, space: Space, kind: ProbeKind) -> _Spread:
        wide = space.zeros(1 if kind == "signs" else 0, wide_dtype(space.device))
        return cls(wide, 0.0, 0)

    def extended(self, space: Space, signs: Tensor, images: Tensor) -> _Spread:
        """Return the moments with more probes and their products."""
        # Welford: m_p = m_(p-1) + (x - m_(p-1)) / p,  S_p = S_(p-1) + (x - m_(p-1)) (x - m_p).
        centre, squares, probes = self.centre[0], self.centre.new_zeros(()), self.probes
        for row, image in zip(signs, images, strict=True):
            probes += 1
            entries = (row * image).to(centre)
            deviation = entries - centre
            centre = centre + deviation / probes
            squares = squares + deviation @ (entries - centre)
        return _Spread(centre[None], self.squares + float(space.summed(squares)), probes)


@dataclass(frozen=True)
class _State:
    """Samples so far, of the probes u = P w with P = I - VV'.

    Attributes:
        parts: ``u'Au`` by leaf, float64 ``(p, leaves)``.
        squares: ``|Au|^2``, float64 ``(p,)``.
        inside: ``|PAu|^2``, float64 ``(p,)``.
        spread: Moments of the entries of ``w * PAu``, for random signs only.
        seed: Seed of the probes.
    """

    parts: Tensor
    squares: Tensor
    inside: Tensor
    spread: _Spread
    seed: int


def _stderr(state: _State, kind: ProbeKind, dimension: int) -> float:
    """Return the standard error of the mean, from the variance formula of each kind of probe.

    For signs, |A|_F^2 - sum_i a_ii^2 is the sum of the variances of the entries of ``w * Aw``. With
    fewer than 8 signs, the upper bound |A|_F^2 - tr(A)^2 / n replaces it.
    """
    p = len(state.parts)
    if kind == "signs" and p >= _FEWEST_SIGNS:
        # Entry i of w * Aw has the mean a_ii and the variance sum_(k != i) a_ik^2.
        return math.sqrt(2 * state.spread.squares / ((p - 1) * p))
    quadratics = state.parts.sum(1)
    if kind == "normal" or (kind == "signs" and dimension <= 2):
        # Var(w'Aw) = 2 |A|_F^2 = 2 E |Aw|^2
        return math.sqrt(2 * float(state.inside.mean()) / p)
    if kind == "sphere":
        return sphere_error(quadratics, state.inside, dimension)
    # E(|Aw|^2 - (w'Aw)^2 / d) >= (1 - 2 / d) (|A|_F^2 - tr(A)^2 / d) for signs in d dimensions.
    return sphere_error(quadratics, state.inside, dimension) * math.sqrt(
        dimension / (dimension - 2)
    )


def _sums(space: Space, vector: Tree) -> Tensor:
    """Return the sum of the entries of each leaf, float64 ``(leaves,)``."""
    wide = wide_dtype(space.device)
    sums = torch.stack([leaf.sum(dtype=wide).cpu().double() for leaf in space.tree_leaves(vector)])
    if not bool(sums.isfinite().all()):
        raise ValueError(
            "known has entries that are NaN or infinite: pass the finite diagonal of the part that "
            "the matvec leaves out"
        )
    return sums
