"""Standard errors of means of quadratic forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "FEWEST_SAMPLES",
    "STOPPED",
    "leaf_errors",
    "rounding_of_sum",
    "sphere_error",
    "standard_error",
]

# The interval of fewer samples does not stop a run, since the variance is too uncertain.
FEWEST_SAMPLES = 20
# A run that stops by a tolerance stops where its error happens to look small. Its standard errors
# are widened by this factor from the first round on, so that the interval that is compared with
# the tolerance is the one that is reported (bench/results/coverage.md).
STOPPED = 1.1


def rounding_of_sum(eps: float, /, *, halves: float = 0.5) -> float:
    """Return the relative standard error that rounding gives a sum of products.

    Products in 16 bits are rounded once, at the end, and their errors average out; those in 32 bits
    and more are rounded in every sum.

    Args:
        eps: Relative rounding of the products.
        halves: Factor of eps for products in 16 bits.
    """
    return (10 if eps < 1e-4 else halves) * eps


def sphere_error(quadratics: Tensor, squares: Tensor, dimension: int, /) -> float:
    """Return the standard error of a mean of quadratic forms on the sphere.

        Var(w'Aw) = 2 E(|Aw|^2 - (w'Aw)^2 / n)

    holds exactly for a symmetric A and w uniform on the sphere of radius sqrt(n). The right side
    is a mean of p terms, which are known far better than the p deviations of w'Aw from their own
    mean: with p degrees of freedom Student's intervals cover at every level, from p = 2 on, for
    flat spectra as for a single outlier.

    Args:
        quadratics: Samples of w'Aw, float64 ``(p,)``.
        squares: Samples of |Aw|^2, float64 ``(p,)``.
        dimension: n.
    """
    parts = (squares - quadratics.square() / dimension).clamp_min(0)
    return math.sqrt(2 * float(parts.mean()) / len(parts))


def standard_error(samples: Tensor, /) -> float:
    """Return the standard error of the mean of skewed samples, infinite for a single one.

        s / sqrt(p) (1 + |g| / sqrt(p) + 1 / p),  g = the sample skewness

    Quadratic forms of a matrix with few large eigenvalues are as skewed as a chi-squared variable
    of one degree. Student's interval then covers 87 to 93 % where 95 are claimed; the factor
    makes up for the shift of its centre, g s (1 + 2 t^2) / (6 p), and for a skewness that few
    samples do not show.

    Source: Johnson 1978, Modified t tests and confidence intervals for asymmetrical populations.
    """
    p = len(samples)
    if p < 2:
        return math.inf
    deviations = samples - samples.mean()
    spread = deviations.square().sum().div(p - 1).sqrt()
    if not bool(spread > torch.finfo(samples.dtype).eps * samples.abs().max()):
        return float(spread) / math.sqrt(p)
    skewness = float((deviations / spread).pow(3).mean())
    return float(spread) / math.sqrt(p) * (1 + abs(skewness) / math.sqrt(p) + 1 / p)


def leaf_errors(parts: Tensor, stderr: float, /) -> list[float]:
    """Return the standard error of each leaf's part of an estimate.

    Each is the naive error of the mean of that leaf's samples, times the ratio of the standard
    error of the whole to its own naive error, and at least once.

    Args:
        parts: Samples of each leaf, float64 ``(p, leaves)``.
        stderr: Standard error of the whole, the mean of the samples' sums over leaves.
    """
    p = len(parts)
    if p < 2 or math.isinf(stderr):
        return [math.inf] * parts.shape[1]
    whole = float(parts.sum(1).std()) / math.sqrt(p)
    if not whole > 0:
        return [stderr] * parts.shape[1]
    widening = max(1.0, stderr / whole) * (1 + 1 / p)
    return [widening * error for error in (parts.std(0) / math.sqrt(p)).tolist()]
