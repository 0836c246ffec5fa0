"""The diagonal by exchangeable leave-one-out low-rank approximations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.exact import (
    refuse_asymmetric,
)
from hessfunc.algorithms.norms import squared_row_norms
from hessfunc.algorithms.probing import DiagonalProbing, run_diagonal
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import DiagonalEstimate
from hessfunc.algorithms.sketch import Sketch, vectors_that_fit
from hessfunc.algorithms.statistics import rounding_of_sum
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree

# The leave-one-out estimates share their probes and are correlated: over 1,000 seeds on six
# spectra their naive standard error was too small by 1.0 to 1.3.
_WIDENING = 1.45
_FEWEST_PROBES = 10


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
    """The diagonal of a symmetric matrix, positive or not, by XDiag.

    With probes w_i of random signs, and Q_i an orthonormal basis of the span of A w_j for all j
    but i,

        d_i = diag(Q_i Q_i' A) + w_i * (I - Q_i Q_i') A w_i.

    The estimate is the mean of d_i. The variance is far below that of `hutchinson_diagonal` where
    the spectrum decays, and zero from rank + 1 probes on.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like.
        rtol: stop when a bound of the error is below rtol times the values, both in the 2-norm
            over all entries, with 95 % confidence. Without it the whole budget is used.
        max_matvecs: the budget, two a probe.
        block_size: how many vectors are multiplied at once.
        **run: Seed, space, callback and checkpoint, as in `RunOptions`.

    Returns:
        `DiagonalEstimate`; ``stderr`` is the jackknife standard error of the d_i widened by 1.45,
        since they are correlated. ``squared_row_norms`` come from the same products.

    Raises:
        ValueError: an option is out of range.
        MemoryError: not even two probes fit in memory.
        FloatingPointError: a product is not finite.

    Cost: two matvecs a probe; the memory of 9 vectors a probe at its peak.

    Source: Epperly, Tropp and Webber 2023, arXiv 2301.07825.
    """
    at_least(4, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    most = vectors_that_fit(products.space, 12)
    method = XDiag(block_size=block_size, rtol=rtol, most=most)
    return run_diagonal(method, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class XDiag(DiagonalProbing["_State"]):
    """Mean of leave-one-out diagonals, each with the sketch of all other products."""

    def init(self, products: Products, seed: int, /) -> _State:
        none = products.space.zeros(0, rows_dtype(products.space))
        return _State(none, none, Sketch.empty(products.space), seed)

    def count(self, state: _State, /) -> int:
        return len(state.probes)

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, p = products.space, len(state.probes)
        width = min(self.block_size, room // 2)
        width = width if self.most is None else min(width, self.most - p)
        if width < 1:
            return state
        indices = range(p, p + width)
        probes = space.probes(indices, kind="signs", seed=state.seed, dtype=rows_dtype(space))
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

    def estimate(self, state: _State, space: Space, cost: Cost, /) -> DiagonalEstimate:
        mean, spread = _mean_and_spread(space, state)
        p = len(state.probes)
        rounding = rounding_of_sum(products_eps(space, rows_dtype(space))) * (mean.abs() + spread)
        squares = state.images.to(mean).square()
        return DiagonalEstimate(
            value=space.unravel(mean),
            stderr=space.unravel(_WIDENING * spread / math.sqrt(p) + rounding),
            degrees=p - 1,
            squared_row_norms=squared_row_norms(squares.mean(0), _spread(squares), p, space, cost),
            **cost,
        )


@dataclass(frozen=True)
class _State:
    """Rows: probes W and products AW, with a sketch of the products."""

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    sketch: Sketch
    seed: int


def _mean_and_spread(space: Space, state: _State) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of the d_i, entry by entry: float64 ``(n,)``.

    With s_i = Q S_i the direction that only the i-th product adds, Q_i Q_i' = QQ' - s_i s_i', and
    d_i = diag(QQ'A) + s_i * (w_i (s_i'A w_i) - A s_i).
    """
    sketch = state.sketch
    wide = wide_dtype(space.device)
    whole = (sketch.basis * sketch.images).sum(0, dtype=wide)
    coefficients = sketch.left_out()
    alone = (coefficients * sketch.factor).sum(0).to(state.probes)
    missing = space.combine(coefficients.mT, sketch.basis)
    missing_images = space.combine(coefficients.mT, sketch.images)
    deviations = (missing * (alone[:, None] * state.probes - missing_images)).to(wide)
    mean = whole + deviations.mean(0)
    return mean, _spread(deviations)


def _spread(samples: Tensor) -> Tensor:
    if len(samples) == 1:
        return torch.full_like(samples[0], torch.inf)
    # A rank may hold no entry, of which torch would warn.
    return samples.std(0) if samples.numel() else samples[0]
