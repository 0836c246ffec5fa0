"""Norms of a matrix, from the products that a trace or a diagonal has made."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfunc.algorithms.products import Cost
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.results.estimate import leaf_fields
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


def squared_diagonal(samples: Tensor, space: Space, cost: Cost, /) -> Estimate:
    """Return an unbiased estimate of the sum of the squares of the diagonal, and of each leaf.

        sum_j a_jj^2 = E <d_i, d_k>,  i != k

    for independent samples d_i of the diagonal. The square of their mean would be too large by its
    variance. The standard error is that of the jackknife.

    Args:
        samples: Samples d_i of the diagonal, ``(p, n)``.
        space: Space of the vectors.
        cost: Cost of the products.

    Source: Hoeffding 1948; Efron and Stein 1981.
    """
    p = len(samples)
    total = samples.sum(0, keepdim=True)
    squares = space.by_leaf(samples, samples).cpu().double()
    others = space.by_leaf(samples, total.expand_as(samples)).cpu().double() - squares
    if p < 2:
        value, left_out = squares.sum(0), squares
        stderr = torch.full_like(value, math.inf)
        whole = math.inf
    else:
        pairs = others.sum(0)
        value = pairs / (p * (p - 1))
        # Without sample i, the sum over pairs loses <d_i, d_k> and <d_k, d_i> for all k != i.
        left_out = (pairs - 2 * others) / max(1, (p - 1) * (p - 2))
        factor = (p - 1) / math.sqrt(p)
        stderr = factor * left_out.std(0) if p > 2 else torch.full_like(value, math.inf)
        whole = factor * float(left_out.sum(1).std()) if p > 2 else math.inf
    return Estimate(
        value=float(value.sum()),
        stderr=whole,
        degrees=max(1, p - 1),
        samples=left_out.sum(1),
        **leaf_fields(space, value, stderr.tolist()),
        **_from(cost, "diagonal"),
    )


def _from(cost: Cost, what: str) -> Cost:
    """Return the cost of products that were made for a trace or a diagonal."""
    return Cost(**{**cost, "reason": f"from the products of the {what}"})
