"""Hutchinson's estimator of a diagonal, from independent probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.norms import squared_row_norms
from hessfunc.algorithms.probing import DiagonalProbing, run_diagonal
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import DiagonalEstimate
from hessfunc.algorithms.statistics import FEWEST_SAMPLES, rounding_of_sum
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# Number of random signs below which all samples of an entry may agree by chance.
_FEWEST_SIGNS = 8


@validated
def hutchinson_diagonal(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    **run: Unpack[RunOptions],
) -> DiagonalEstimate:
    """Estimate the diagonal of a matrix by random signs.

        diag A = E[w * Aw],  entries of w are +1 or -1

    The estimate is the mean of w * Aw over the probes w. The variance of one sample of entry j is
    the sum of a_jk^2 over k != j. The standard error is that of the samples, entry by entry.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> estimate = hf.hutchinson_diagonal(matvec, like, max_matvecs=4, seed=0)
        >>> estimate.value  # exact, because A is diagonal
        tensor([ 1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10.], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when a 95 % bound of the error is at most
            rtol |value|, both in the 2-norm over all entries. Without rtol the whole budget is
            used.
        max_matvecs: Budget, the largest number of probes.
        block_size: Number of probes that are multiplied at once.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `DiagonalEstimate`, with ``squared_row_norms`` from the same products.

    Raises:
        ValueError: If an option is out of range.
        FloatingPointError: If a product is not finite.

    Cost: one matvec per probe. Memory: 4 block_size + 12 vectors in float64, and block_size more.

    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    at_least(2, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    method = HutchinsonDiagonal(block_size=block_size, rtol=rtol)
    return run_diagonal(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class HutchinsonDiagonal(DiagonalProbing["_State"]):
    """Mean of the entries of ``w * Aw`` over probes of random signs."""

    fewest: ClassVar[int] = FEWEST_SAMPLES

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(1, wide_dtype(products.space.device))[0]
        return _State(_Moments(0, none, none), _Moments(0, none, none), seed)

    def count(self, state: _State, /) -> int:
        return state.diagonal.count

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, first = products.space, state.diagonal.count
        indices = range(first, first + min(room, self.block_size))
        probes = space.probes(indices, kind="signs", seed=state.seed, dtype=rows_dtype(space))
        images = products.as_given(probes)
        return _State(
            state.diagonal.extended(probes * images),
            state.squares.extended(images.square()),
            state.seed,
        )

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> DiagonalEstimate:
        diagonal, squares, count = state.diagonal, state.squares, state.diagonal.count
        rounding = rounding_of_sum(products_eps(space)) * (diagonal.mean.abs() + diagonal.spread)
        spread = diagonal.spread
        spread = without_chance(space, spread, rounding, count)
        stderr = (spread / math.sqrt(count) + rounding) * self.widening
        return DiagonalEstimate(
            value=space.unravel(diagonal.mean),
            stderr=space.unravel(stderr),
            degrees=count - 1,
            squared_row_norms=squared_row_norms(squares.mean, squares.spread, count, space, cost),
            **cost,
        )


def without_chance(space: Space, spread: Tensor, rounding: Tensor, count: int, /) -> Tensor:
    """Return standard deviations in which no entry is too small by chance.

    An entry whose few samples agree by chance gets the root mean square of all entries.

    Args:
        space: Space of the vectors.
        spread: Standard deviation of each entry, from products with random signs, ``(n,)``.
        rounding: Rounding of each entry, ``(n,)``.
        count: Number of samples.
    """
    if count >= _FEWEST_SIGNS:
        return spread
    typical = space.summed(spread.square().sum()).div(space.n).sqrt()
    return torch.where(spread * math.sqrt(count) <= rounding, typical, spread)


@dataclass(frozen=True)
class _Moments:
    """Mean and sum of squared deviations of samples, entry by entry.

    Attributes:
        count: Number of samples.
        mean: Means, ``(n,)``.
        deviations: Sums of squared deviations from the means, ``(n,)``.
    """

    count: int
    mean: Rows = field(metadata=DIVIDED)
    deviations: Rows = field(metadata=DIVIDED)

    def extended(self, samples: Tensor) -> _Moments:
        """Return the moments with more samples, given as rows (Chan, Golub and LeVeque 1979)."""
        # With d = mean_k - mean_m of k new and m old samples:
        #     mean = mean_m + d k / (m + k),  S = S_m + S_k + d^2 m k / (m + k)
        samples = samples.to(self.mean)
        k, count = len(samples), self.count + len(samples)
        mean = samples.mean(0)
        shift = mean - self.mean
        deviations = (samples - mean).square().sum(0)
        return _Moments(
            count,
            self.mean + shift * (k / count),
            self.deviations + deviations + shift.square() * (self.count * k / count),
        )

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each entry; infinite for a single sample."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self.deviations / (self.count - 1)).sqrt()


@dataclass(frozen=True)
class _State:
    """State of a run.

    Attributes:
        diagonal: Moments of the samples ``w * Aw``.
        squares: Moments of the samples ``(Aw) * (Aw)``.
        seed: Seed of the probes.
    """

    diagonal: _Moments
    squares: _Moments
    seed: int
