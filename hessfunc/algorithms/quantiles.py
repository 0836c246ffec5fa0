"""Quantiles of distributions, by SciPy, which is imported at the first call."""

from __future__ import annotations

import math

__all__ = ["chi_squared_quantile", "kolmogorov_quantile", "student_quantile"]


def student_quantile(probability: float, degrees: float, /) -> float:
    """Return the quantile of Student's t, infinite below one degree of freedom.

    Args:
        probability: Number in [1/2, 1).
        degrees: Degrees of freedom.

    Raises:
        ValueError: If the probability is not in [1/2, 1).
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability={probability}: choose a number in [0.5, 1)")
    if degrees < 1:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def chi_squared_quantile(probability: float, degrees: float, /) -> float:
    """Return the quantile of the chi-squared distribution.

    Args:
        probability: Number in (0, 1).
        degrees: Degrees of freedom, positive.

    Raises:
        ValueError: If the probability is not in (0, 1).
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability}: choose a number in (0, 1)")
    from scipy.special import chdtri

    return float(chdtri(degrees, 1 - probability))


def kolmogorov_quantile(probability: float, /) -> float:
    """Return the quantile of the largest absolute value of a Brownian bridge.

    Args:
        probability: Number in (0, 1).

    Raises:
        ValueError: If the probability is not in (0, 1).

    Source: Kolmogorov 1933.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability}: choose a number in (0, 1)")
    from scipy.special import kolmogi

    return float(kolmogi(1 - probability))
