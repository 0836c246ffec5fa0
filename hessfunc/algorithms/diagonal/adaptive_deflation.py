"""Diagonal of a symmetric matrix by the cheapest mixture of deflation and random signs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import torch
from torch import Tensor

from hessfunc.algorithms.adaptive_deflation import BLOCK, AdaptiveDeflation
from hessfunc.algorithms.deflation import PILOT, Deflation
from hessfunc.algorithms.diagonal.hutchinson import hutchinson_diagonal, without_chance
from hessfunc.algorithms.diagonal.xdiag import xdiag
from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.krylov import Krylov
from hessfunc.algorithms.norms import squared_diagonal, squared_row_norms
from hessfunc.algorithms.probing import DiagonalProbing, run_diagonal
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Density, DiagonalEstimate, Eigenpairs
from hessfunc.algorithms.sketch import vectors_that_fit
from hessfunc.algorithms.span import Span
from hessfunc.algorithms.statistics import rounding_of_sum, standard_error
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, eigenpairs_or_density, validated
from hessfunc.spaces.space import ProbeKind, Space, products_eps
from hessfunc.trees import Matvec, Tree

# Number of entries of samples that are formed at once.
_PIECE = 2**17

DiagonalMethod: TypeAlias = Literal["auto", "hutchinson", "xdiag"]
_OTHERS = {"hutchinson": hutchinson_diagonal, "xdiag": xdiag}


@validated(start=eigenpairs_or_density)
def diagonal(
    matvec: Matvec,
    like: Tree,
    *,
    method: DiagonalMethod = "auto",
    rtol: float | None = None,
    max_matvecs: int = 100,
    start: Eigenpairs | Density | None = None,
    block_size: int | None = None,
    **run: Unpack[RunOptions],
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric matrix, definite or not, in few products.

    With an orthonormal basis Q, P = I - QQ', B = PAP, and S = B - G M G' as in `trace`,

        diag A = diag(A - B) + diag(G M G') + E[w * Sw],  entries of w are +1 or -1.

    No interval of this run holds at several stops together: it stops by the 2-norm of all errors,
    for which no confidence sequence is known. For sums over leaves, ``trace(...,
    confidence="anytime")`` has one in each item of ``by_leaf``.

    The first two parts are exact. Four probes w measure the variance, and Q grows by Krylov
    vectors for as long as a vector saves more than one probe.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> hf.diagonal(matvec, like, max_matvecs=20, seed=0).value.round(decimals=3)
        tensor([ 1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10.], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric.
        like: Tree that shows the structure of a vector.
        method: ``"auto"`` for the estimator above, ``"hutchinson"`` for `hutchinson_diagonal`, or
            ``"xdiag"``.
        rtol: Relative tolerance: the run stops when a 95 % bound of the error is at most
            rtol |value|, both in the 2-norm over all entries. Without rtol the whole budget is
            used.
        max_matvecs: Budget, the largest number of products.
        start: Eigenpairs of A, from `lanczos`, or a density of A, from `slq` with
            ``keep_basis=True``, that belong to Q from the beginning. One product checks that
            they are those of A. A density adds the whole Krylov space of one of its probes. For
            ``"auto"`` only.
        block_size: Number of probes that are multiplied at once: 4 by default, or the default of
            the other estimator. Krylov vectors are multiplied one by one.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `DiagonalEstimate`, whose ``stderr`` is that of the samples w * Sw, entry by entry, with
        Student's quantile of p - 1 degrees of freedom for p probes, and a bound of the residuals of
        ``start``. ``by_leaf`` holds the sum over each leaf, and ``sum_of_squares`` an unbiased
        estimate of ``sum_j a_jj^2``. ``squared_row_norms`` comes from the same products, unless
        eigenpairs are given. Standard errors of a run with a tolerance are multiplied by 1.1.

    Raises:
        ValueError: If an option is out of range, if ``start`` belongs to another matrix, or if the
            matvec is not symmetric or not deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a probe or Krylov vector, and one that checks ``start``, whose own matvecs are
    not counted again. Memory: at
    most 3 vectors per product, and 4 in float64.

    Source: Bekas, Kokiopoulou and Saad 2007; Chen and Hallman 2022, arXiv 2205.01736.
    """
    if method not in get_args(DiagonalMethod):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(DiagonalMethod))}")
    if start is not None and method != "auto":
        raise ValueError(f"start has no use for method={method!r}: pass method='auto'")
    if method != "auto":
        blocks: Any = {} if block_size is None else {"block_size": block_size}
        return _OTHERS[method](matvec, like, rtol=rtol, max_matvecs=max_matvecs, **blocks, **run)
    at_least(2, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    pairs, density = (None, start) if isinstance(start, Density) else (start, None)
    adaptive = AdaptiveDiagonal(
        block_size=BLOCK if block_size is None else block_size,
        rtol=rtol,
        most=vectors_that_fit(products.space, 12),
        span=Span.of(products.space, pairs, "start"),
        krylov=Krylov.of(products.space, density, "start"),
    )
    return run_diagonal(adaptive, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class AdaptiveDiagonal(AdaptiveDeflation[DiagonalEstimate], DiagonalProbing[Deflation]):
    """Diagonal of the deflated part, and samples ``w * Sw`` of the rest."""

    fewest: ClassVar[int] = 2 * PILOT
    kind: ClassVar[ProbeKind] = "signs"
    of_diagonal: ClassVar[bool] = True

    def samples(self, state: Deflation, space: Space, /) -> _Samples:
        return _Samples.of(space, state, self.span)

    def images(self, state: Deflation, samples: _Samples, space: Space, most: int, /) -> Tensor:
        return samples.images[:most]

    def tolerance(self, samples: _Samples, space: Space, /) -> float:
        return (self.rtol or 0.0) * float(space.norms(samples.value[None]))

    def probes_within(self, tolerance: float, samples: _Samples, /) -> float:
        # With p probes, the error in the 2-norm is about (norm / p)^(1/2).
        return samples.norm * (self.widening / tolerance) ** 2

    def estimate(self, state: Deflation, space: Space, cost: Cost, /) -> DiagonalEstimate:
        samples, p = self.samples(state, space), len(state.probes)
        spread = samples.spread
        rounding = rounding_of_sum(products_eps(space)) * (samples.exact.abs() + spread)
        spread = without_chance(space, spread, rounding, p)
        stderr = (spread / math.sqrt(p) + rounding) * self.widening
        # diag(A^2) = diag(AQQ'A) + E (A P w) * (A P w), since E ww' = I and P^2 = P.
        squares = state.unprojected.to(samples.exact).square()
        rows = squared_row_norms(
            state.row_squares[0] + squares.mean(0), squares.std(0), p, space, cost
        )
        sums = space.by_leaf(samples.probes, samples.images).cpu().double()
        exact = space.by_leaf(samples.exact[None], torch.ones_like(samples.exact)[None])[0].cpu()
        leaf_rounding = space.by_leaf(rounding[None], torch.ones_like(rounding)[None])[0].tolist()
        leaf_stderr = [
            math.hypot(self.widening * (standard_error(of_leaf) + rounded), bound)
            for of_leaf, rounded, bound in zip(
                sums.unbind(1), leaf_rounding, self.span.leaf_bounds(space).tolist(), strict=True
            )
        ]
        names = space.names
        return DiagonalEstimate(
            value=space.unravel(samples.value),
            stderr=space.unravel(torch.hypot(stderr, self.span.bounds().to(stderr))),
            degrees=p - 1,
            squared_row_norms=None if len(self.span) else rows,
            by_leaf=dict(zip(names, (exact + sums.mean(0)).tolist(), strict=True)),
            leaf_stderr=dict(zip(names, leaf_stderr, strict=True)),
            sum_of_squares=squared_diagonal(samples.exact + samples.random, space, cost),
            **cost,
        )


@dataclass(frozen=True)
class _Samples:
    """Samples of the diagonal, an exact and a random part.

    Attributes:
        probes: Signs w, ``(p, n)``.
        images: Products S w, ``(p, n)``.
        exact: Diagonal of the deflated part, ``(n,)``.
        mean: Mean of the samples ``w * Sw``, ``(n,)``.
        squares: Sum of their squared deviations from the mean, ``(n,)``.
        norm: Sum of the variances of all entries of a sample, which estimates ``|S|_F^2`` without
            the diagonal.
    """

    probes: Tensor
    images: Tensor
    exact: Tensor
    mean: Tensor
    squares: Tensor
    norm: float

    @classmethod
    def of(cls, space: Space, state: Deflation, span: Span) -> _Samples:
        images, weights = state.sampled(space)
        wide, p = wide_dtype(space.device), len(images)
        # diag(G M G') is the sum of the rows g * (M g).
        inner = (state.ends * space.combine(weights, state.ends)).sum(0, dtype=wide)
        mean, squares = space.zeros(2, wide)
        # Samples in the wide dtype are formed for a few columns at once, which fit in the cache.
        for begin in range(0, space.width, width := _PIECE // max(1, p) + 1):
            columns = slice(begin, begin + width)
            random = (state.probes[:, columns] * images[:, columns]).to(wide)
            mean[columns] = random.mean(0)
            squares[columns] = random.sub_(mean[columns]).square_().sum(0)
        return cls(
            probes=state.probes,
            images=images,
            exact=span.diagonal().to(wide) + state.diagonal[0] + inner,
            mean=mean,
            squares=squares,
            norm=float(space.summed(squares.sum())) / max(1, p - 1),
        )

    @property
    def random(self) -> Tensor:
        """Samples ``w * Sw``, ``(p, n)``."""
        return (self.probes * self.images).to(self.exact)

    @property
    def value(self) -> Tensor:
        return self.exact + self.mean

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each entry of a sample; infinite for a single sample."""
        p = len(self.probes)
        return (self.squares / (p - 1)).sqrt() if p > 1 else torch.full_like(self.exact, torch.inf)

    def rounding(self, space: Space) -> float:
        """Return the length of the rounding of the value."""
        return rounding_of_sum(products_eps(space)) * float(space.norms(self.value[None]))
