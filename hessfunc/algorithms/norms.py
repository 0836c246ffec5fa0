"""Norms of a matrix, from the products that a trace or a diagonal has made."""

from __future__ import annotations

import math

from torch import Tensor

from hessfunc.algorithms.products import Cost
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.statistics import standard_error
from hessfunc.spaces.space import Space


def squared_frobenius(samples: Tensor, space: Space, cost: Cost, /) -> Estimate:
    """Return an estimate of the squared Frobenius norm from samples ``|A w|^2``.

        |A|_F^2 = E |A w|^2,  E[ww'] = I

    For a symmetric A, it is the sum of the squared eigenvalues.

    Args:
        samples: Samples ``|A w|^2``, float64 ``(p,)``.
        space: Space of the vectors.
        cost: Cost of the products.
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
    """Return estimates of the squared norm of each row, from products with random signs.

        sum_k a_jk^2 = E (A w)_j^2

    The standard error is that of the samples, times 1 + sqrt(8 / p), which allows for their
    skewness: it is at most sqrt(8), that of the square of a normal variable.

    Args:
        mean: Mean of the samples ``(A w) * (A w)``, ``(n,)``.
        spread: Standard deviation of the samples, ``(n,)``.
        count: Number p of samples.
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
    """Return the cost of products that were made for a trace or a diagonal."""
    return Cost(**{**cost, "reason": f"from the products of the {what}"})
