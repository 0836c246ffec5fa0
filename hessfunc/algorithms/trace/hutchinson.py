"""The trace by independent probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.exact import exact_trace
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.probing import TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs, Estimate, leaf_fields
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, leaf_errors, sphere_error
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, ProbeKind, Rows, Space, rows_dtype
from hessfunc.trees import Matvec, Tree

# The spread of fewer random signs is not to be trusted: on [[0, 1], [1, 0]] all p samples are the
# same with probability 2^(1 - p).
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
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate the trace of a matrix by random probes (Girard-Hutchinson).

        tr A = E[w'Aw],  E[ww'] = I

    The estimate is the mean over probes. The variance of one probe is
    2 (|A|_F^2 - sum_i a_ii^2) for signs, 2 |A|_F^2 for normal probes, and
    2 n / (n + 2) (|A|_F^2 - tr(A)^2 / n) for the sphere, for a symmetric A. The standard error
    follows from that formula, estimated from the products themselves. That estimate is far more
    accurate than the spread of the samples, so that intervals cover at every level from 3 products
    on. Known eigenpairs need not be sampled:

        tr A = sum_i value_i + E[u'Au],  u = (I - VV') w.

    The same holds for a part K of the matrix with a known diagonal, if ``matvec`` leaves K out:

        tr (A + K) = tr K + E[w'Aw].

    Args:
        matvec: Function from a block of vectors to the block of their products.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of probes.
        kind: ``"signs"``, ``"normal"`` or ``"sphere"``. By default signs, unless all n unit
            vectors fit into the budget: these give the exact trace, at once or as soon as the
            random probes have cost as much.
        deflate: Eigenpairs of A, from `lanczos`. Their vectors must be orthonormal; they need not
            have converged.
        known: Diagonal of K, as a tree like one vector; the estimate is then of tr (A + K).
        block_size: Number of probes that are multiplied at once.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf`` (those of eigenpairs up to their
        residuals), and ``squared_frobenius`` from the same products, where no part is known. It
        says "converged" if and only if its 95 % interval is within the tolerance. Intervals of a
        run with a tolerance are widened by 1.1, since the run stops where its error looks small.

    Raises:
        ValueError: If an option is out of range, or if the eigenpairs are of other parameters.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a probe; the matvecs of the eigenpairs are not counted again. Memory: 3
    block_size vectors, or with signs 2 block_size and 5 in float64 if that is more. A normal or
    sphere probe takes about 8 ns an entry on one core, signs less.

    Source: Girard 1989; Hutchinson 1990.
    """
    at_least(2, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    method = Hutchinson(
        block_size=block_size,
        rtol=rtol,
        atol=atol,
        kind=kind or "signs",
        eigenpairs=_spanned(products.space, deflate),
        known=None if known is None else _sums(products.space, known),
    )
    if kind is not None:
        return run_method(method, products, run, max_matvecs=max_matvecs)
    exact = partial(exact_trace, known=method.known)
    return run_trace(method, products, run, max_matvecs=max_matvecs, exact=exact)


@dataclass(frozen=True, kw_only=True)
class Hutchinson(TraceProbing["_State"]):
    """Mean of quadratic forms of random probes.

    Attributes:
        kind: Distribution of the probes.
        eigenpairs: Span of known eigenpairs, which is not sampled.
        known: Trace of the part that the matvec leaves out, leaf by leaf: float64 ``(leaves,)``.
    """

    kind: ProbeKind
    eigenpairs: _Spanned
    known: Tensor | None = None

    changeable: ClassVar = TraceProbing.changeable | {"known"}
    fewest: ClassVar[int] = FEWEST_SAMPLES

    def options(self) -> dict[str, Any]:
        pairs = self.eigenpairs
        return {**super().options(), "eigenpairs": (pairs.parts, pairs.basis)}

    def init(self, products: Products, seed: int, /) -> _State:
        space = products.space
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
        images = products(probes)
        # P A w, with P = I - VV' the projector off the eigenvectors.
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
        # The sum of a sample is rounded, also where samples do not differ.
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
            **cost,
        )


@dataclass(frozen=True)
class _Spread:
    """Spread of the entries of ``w * Aw`` over probes of random signs (Welford 1962).

    Attributes:
        centre: Mean of each entry so far.
        squares: Sum over entries and probes of squared deviations from the means.
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
    """Samples so far, float64.

    Attributes:
        parts: ``w'Aw`` leaf by leaf, ``(p, leaves)``.
        squares: ``|Aw|^2``, ``(p,)``.
        inside: ``|PAw|^2`` with P the projector off the eigenvectors, ``(p,)``.
        spread: Spread of the entries of ``w * PAw``, for signs alone.
        seed: Seed of the probes.
    """

    parts: Tensor
    squares: Tensor
    inside: Tensor
    spread: _Spread
    seed: int


def _stderr(state: _State, kind: ProbeKind, dimension: int) -> float:
    """Return the standard error of the mean by the variance of each kind of probe.

    For signs, 2 (|A|_F^2 - sum_i a_ii^2) is twice the sum of the variances of the entries of
    ``w * Aw``. For few of them |A|_F^2 - tr(A)^2 / n takes its place, which is no smaller.
    """
    p = len(state.parts)
    if kind == "signs" and p >= _FEWEST_SIGNS:
        return math.sqrt(2 * state.spread.squares / ((p - 1) * p))
    quadratics = state.parts.sum(1)
    if kind == "normal" or (kind == "signs" and dimension <= 2):
        return math.sqrt(2 * float(state.inside.mean()) / p)
    if kind == "sphere":
        return sphere_error(quadratics, state.inside, dimension)
    return sphere_error(quadratics, state.inside, dimension) * math.sqrt(
        dimension / (dimension - 2)
    )


@dataclass(frozen=True)
class _Spanned:
    """What eigenpairs tell: orthonormal rows, the trace of each leaf and ``|AV|_F^2``."""

    basis: Tensor
    parts: Tensor
    squares: float

    def complement(self, space: Space, probes: Tensor, *, on_sphere: bool) -> Tensor:
        """The probes outside of the basis; back on the sphere of that complement if need be."""
        if not len(self.basis):
            return probes
        outer = probes
        for _ in range(2):
            outer = outer - space.combine(space.gram(outer, self.basis), self.basis)
        if on_sphere:
            radius = (space.n - len(self.basis)) ** 0.5
            outer = outer * (radius / space.norms(outer)).to(outer.dtype)[:, None]
        return outer


def _sums(space: Space, vector: Tree) -> Tensor:
    """Of the entries of each leaf."""
    wide = wide_dtype(space.device)
    sums = torch.stack([leaf.sum(dtype=wide).cpu().double() for leaf in space.tree_leaves(vector)])
    if not bool(sums.isfinite().all()):
        raise ValueError("known has entries that are NaN or infinite")
    return sums


def _spanned(space: Space, pairs: Eigenpairs | None) -> _Spanned:
    if pairs is None:
        none = space.zeros(0, rows_dtype(space))
        return _Spanned(none, torch.zeros(len(space.names), dtype=torch.float64, device="cpu"), 0.0)
    basis = space.rows(pairs.vectors, dtype=rows_dtype(space))
    if len(basis) >= space.n:
        raise ValueError("all eigenpairs are at hand: the trace is the sum of their values")
    values = pairs.values.cpu().double()
    return _Spanned(
        basis,
        (values[:, None] * space.by_leaf(basis, basis).cpu().double()).sum(0),
        float(values.square().sum() + pairs.residuals.square().sum()),
    )
