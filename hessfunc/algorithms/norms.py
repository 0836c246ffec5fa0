"""Norms of a matrix, from products with probes that were made for something else."""

from __future__ import annotations

import math

from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.statistics import standard_error


def squared_frobenius(samples: Tensor, products: Products, seed: int, /) -> Estimate:
    """The squared Frobenius norm, of samples ``|A w|^2`` with E[ww'] = I.

    |A|_F^2 = E |A w|^2, and the sum of the squared eigenvalues of a symmetric A.
    """
    return Estimate(
        value=float(samples.mean()),
        stderr=standard_error(samples),
        degrees=len(samples) - 1,
        samples=samples,
        by_leaf={},
        n=products.space.n,
        **products.cost("from the products of the trace", seed),
    )


def squared_row_norms(
    mean: Tensor, spread: Tensor, count: int, products: Products, seed: int, /
) -> DiagonalEstimate:
    """The squared norm of each row, of samples ``(A w) * (A w)`` with probes of random signs.

    sum_k a_jk^2 = E (A w)_j^2. The standard error is that of the samples, times
    1 + sqrt(8 / p): squares of normal variables have the skewness sqrt(8), and these no more.

    Args:
        mean: of the samples, ``(n,)``.
        spread: their standard deviation, ``(n,)``.
        count: the number of samples p.
        products: that were made.
        seed: of the probes.
    """
    stderr = spread / math.sqrt(count) * (1 + math.sqrt(8 / count))
    return DiagonalEstimate(
        value=products.space.unravel(mean),
        stderr=products.space.unravel(stderr),
        degrees=count - 1,
        **products.cost("from the products of the diagonal", seed),
    )
