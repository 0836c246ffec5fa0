"""Quantiles of Student's t distribution."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["student_quantile"]

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
