"""Quantiles of Student's t distribution and of Kolmogorov's."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["kolmogorov_quantile", "student_quantile"]

# From here on the normal quantile with one correction term is as exact.
_MANY_DEGREES = 2000


def student_quantile(probability: float, degrees: int, /) -> float:
    """The quantile of Student's t at a probability of at least 1/2; infinite without a degree.

    Source: the distribution function is the finite sum 26.7.3 and 26.7.4 of Abramowitz and
    Stegun 1964; the quantile is found by bisection.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability={probability}: at least 1/2 and below 1")
    if degrees < 1:
        return math.inf
    if degrees > _MANY_DEGREES:
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * degrees)
    low, high = 0.0, 1.0
    while _within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, degrees: int) -> float:
    """The probability of |T| < t."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = 0.0
    if degrees > 1:
        term = total = cosine if odd else 1.0
    for i in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def kolmogorov_quantile(probability: float, /) -> float:
    """The quantile of the largest absolute value K of a Brownian bridge.

        P(K <= x) = sqrt(2 pi) / x  sum_{k >= 1} exp(-(2 k - 1)^2 pi^2 / (8 x^2))

    Args:
        probability: between 0 and 1.

    Raises:
        ValueError: the probability is not between 0 and 1.

    Source: Kolmogorov 1933; this form of his series, Feller 1948; found by bisection.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability}: between 0 and 1")
    # In double precision the series is 1 at the upper end.
    low, high = 0.0, 5.0
    for _ in range(80):
        middle = (low + high) / 2
        if _bridge_within(middle) < probability:
            low = middle
        else:
            high = middle
    return high


def _bridge_within(x: float) -> float:
    """The probability of K <= x, for x up to 5."""
    # At 5 the 15th term is below 1e-17 of the first.
    terms = (math.exp(-(((2 * k - 1) * math.pi / x) ** 2) / 8) for k in range(1, 20))
    return math.sqrt(2 * math.pi) / x * math.fsum(terms)
