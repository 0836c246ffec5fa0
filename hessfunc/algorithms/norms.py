"""Norms of a matrix, from products with probes that were made for something else."""

from __future__ import annotations

import math

from torch import Tensor

from hessfunc.algorithms.products import Cost
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.statistics import standard_error
from hessfunc.spaces.space import Space


def squared_frobenius(samples: Tensor, space: Space, cost: Cost, /) -> Estimate:
    """The squared Frobenius norm, of samples ``|A w|^2`` with E[ww'] = I.

    |A|_F^2 = E |A w|^2, and the sum of the squared eigenvalues of a symmetric A.
    """
    return Estimate(
        value=float(samples.mean()),
        stderr=standard_error(samples),
        degrees=len(samples) - 1,
        samples=samples,
        by_leaf={},
        n=space.n,
        **_from(cost, "trace"),
    )


def squared_row_norms(
    mean: Tensor, spread: Tensor, count: int, space: Space, cost: Cost, /
) -> DiagonalEstimate:
    """The squared norm of each row, of samples ``(A w) * (A w)`` with probes of random signs.

    sum_k a_jk^2 = E (A w)_j^2. The standard error is that of the samples, times
    1 + sqrt(8 / p): squares of normal variables have the skewness sqrt(8), and these no more.

    Args:
        mean: of the samples, ``(n,)``.
        spread: their standard deviation, ``(n,)``.
        count: the number of samples p.
        space: Space of the vectors.
        cost: Cost of the products.
    """
    stderr = spread / math.sqrt(count) * (1 + math.sqrt(8 / count))
    return DiagonalEstimate(
        value=space.unravel(mean),
        stderr=space.unravel(stderr),
        degrees=count - 1,
        **_from(cost, "diagonal"),
    )


def _from(cost: Cost, what: str) -> Cost:
    return Cost(**{**cost, "reason": f"from the products of the {what}"})
