"""XDiag estimator of a diagonal, from exchangeable leave-one-out low-rank approximations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.norms import squared_row_norms
from hessfunc.algorithms.probing import DiagonalProbing, KeepsProbes, run_diagonal
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import DiagonalEstimate
from hessfunc.algorithms.sketch import SketchedProbes, vectors_that_fit
from hessfunc.algorithms.statistics import rounding_of_sum
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, products_eps
from hessfunc.trees import Matvec, Tree

# Factor of the standard error. Leave-one-out estimates share their probes, so they are correlated:
# over 1,000 seeds on six spectra their naive standard error was too small by factors 1.0 to 1.3.
_WIDENING = 1.45


@validated
def xdiag(
    matvec: Matvec,
    like: Tree,
    *,
    rtol: float | None = None,
    max_matvecs: int = 100,
    block_size: int = 10,
    **run: Unpack[RunOptions],
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric matrix, definite or not, by XDiag.

    With probes w_i of random signs, and Q_i an orthonormal basis of the span of A w_j for all
    j != i,

        d_i = diag(Q_i Q_i' A) + w_i * (I - Q_i Q_i') A w_i.

    The estimate is the mean of the d_i. If the spectrum decays, its variance is far below that of
    `hutchinson_diagonal`. The variance is zero from rank(A) + 1 probes on.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> hf.xdiag(matvec, like, max_matvecs=20, seed=0).value.round(decimals=3)
        tensor([ 1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10.], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric.
        like: Tree that shows the structure of a vector.
        rtol: Relative tolerance: the run stops when a 95 % bound of the error is at most
            rtol |value|, both in the 2-norm over all entries. Without rtol the whole budget is
            used.
        max_matvecs: Budget, the largest number of products, two per probe.
        block_size: Number of probes that are multiplied at once.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `DiagonalEstimate`, whose ``stderr`` is the jackknife standard error of the d_i times 1.45,
        since the d_i are correlated. ``squared_row_norms`` comes from the same products.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric or not
            deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: two matvecs per probe. Memory: at most 9 vectors per probe.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825.
    """
    at_least(4, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 12)
    method = XDiag(block_size=block_size, rtol=rtol, most=most)
    return run_diagonal(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XDiag(KeepsProbes, DiagonalProbing[SketchedProbes]):
    """Mean of the leave-one-out diagonals, each from the sketch of all other products."""

    def init(self, products: Products, seed: int, /) -> SketchedProbes:
        return SketchedProbes.none(products.space, seed)

    def step(self, state: SketchedProbes, products: Products, room: int, /) -> SketchedProbes:
        most = min(products.space.n, self.most or products.space.n)
        width = min(self.block_size, room // 2, most - len(state.probes))
        return state.grown(products, width, "signs")

    def estimate(self, state: SketchedProbes, space: Space, cost: Cost, /) -> DiagonalEstimate:
        mean, spread = _mean_and_spread(space, state)
        p = len(state.probes)
        rounding = rounding_of_sum(products_eps(space)) * (mean.abs() + spread)
        squares = state.images.to(mean).square()
        return DiagonalEstimate(
            value=space.unravel(mean),
            stderr=space.unravel(_WIDENING * spread / math.sqrt(p) + rounding),
            degrees=p - 1,
            squared_row_norms=squared_row_norms(squares.mean(0), _spread(squares), p, space, cost),
            **cost,
        )


def _mean_and_spread(space: Space, state: SketchedProbes) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of the d_i, entry by entry: float64 ``(n,)``.

    With the unit direction s_i that only the i-th product adds to the range of Q,

        Q_i Q_i' = QQ' - s_i s_i',  (I - Q_i Q_i') A w_i = s_i (s_i'A w_i),
        d_i = diag(QQ'A) + s_i * (w_i (s_i'A w_i) - A s_i).
    """
    sketch = state.sketch
    wide = wide_dtype(space.device)
    whole = (sketch.basis * sketch.images).sum(0, dtype=wide)
    # s_i = Q a_i with the columns a_i of `coefficients`, and s_i'A w_i = a_i'c_i for A w_i = Q c_i.
    coefficients = sketch.left_out()
    alone = (coefficients * sketch.factor).sum(0).to(state.probes)
    missing = space.combine(coefficients.mT, sketch.basis)
    missing_images = space.combine(coefficients.mT, sketch.images)
    deviations = (missing * (alone[:, None] * state.probes - missing_images)).to(wide)
    mean = whole + deviations.mean(0)
    return mean, _spread(deviations)


def _spread(samples: Tensor) -> Tensor:
    """Return the standard deviation of each entry; infinite for a single sample."""
    if len(samples) == 1:
        return torch.full_like(samples[0], torch.inf)
    # A rank may hold no entry, and torch warns about the standard deviation of an empty tensor.
    return samples.std(0) if samples.numel() else samples[0]
