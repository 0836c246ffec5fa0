"""Quantiles of distributions, by SciPy, which is imported at the first call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


# Calibrated on ten spectra at 80, 90, 95 and 99 % (bench/results/coverage.md).
_OWN, _SHARE, _LOST = 1.15, 0.7, 0.6


@dataclass(frozen=True)
class Complements:
    """What p probes say of the complements on which they test the others' approximations.

    Attributes:
        dimension: Dimension d of a complement.
        quadratics: ``u_i'A u_i`` for the probes u_i on the sphere of radius sqrt(d), ``(p,)``.
        squares: Squared lengths of ``A u_i`` within the complement, ``(p,)``.
        lost: Curvature ``s_i'A s_i`` along the unit direction that the i-th product alone adds,
            ``(p,)``.
    """

    dimension: int
    quadratics: Tensor
    squares: Tensor
    lost: Tensor


def standard_error_of_mean(
    left_one: Tensor,
    left_two: Tensor | None,
    complements: Complements,
    /,
    *,
    jackknife: float,
) -> float:
    """Return the standard error of the mean of p leave-one-out estimates t_i, for p degrees.

    It is the largest of three, times factors that were calibrated:

    - the error of independent quadratic forms on the complements, `sphere_error`;
    - the geometric mean of the naive error of the t_i, which share p - 1 probes, and of the
      jackknife of their mean. The first is too small where the spectrum decays, by up to 5, and
      the second too large on average (Efron and Stein 1981);
    - the spread of the curvature that a left-out product loses. With as many probes as equal
      dominant eigenvalues all t_i may be too small by that at once, and agree with each other.

    Args:
        left_one: t_i, float64 ``(p,)``.
        left_two: t_ij, ``(p, p)``: probe i tests the approximation that leaves out i and j; the
            diagonal is not read. None where leaving a probe out changes nothing.
        complements: Complements of the p probes.
        jackknife: Factor of the jackknife, which depends on the estimator.
    """
    own = sphere_error(complements.quadratics, complements.squares, complements.dimension)
    lost = complements.lost - complements.quadratics / complements.dimension
    naive, complete = _naive(left_one), _complete(left_one, left_two)
    return max(
        _OWN * own,
        jackknife * naive ** (1 - _SHARE) * complete**_SHARE,
        _LOST * float(lost.square().mean().sqrt()),
    )


def _naive(left_one: Tensor) -> float:
    """Return the error of the mean of the t_i as if they were independent."""
    p = len(left_one)
    return float(left_one.std()) / math.sqrt(p) if p > 1 else 0.0


def _complete(left_one: Tensor, left_two: Tensor | None) -> float:
    """Return the jackknife error of the mean, at least the naive one; it needs three probes.

        complete^2 = rho^2 (p - 1) / p sum_j (T_j - mean T)^2,  T_j = mean over i of t_ij,

    where rho <= 1 carries the error of p - 1 probes, which the jackknife measures, over to p
    probes: it is the ratio of the naive errors of both.
    """
    p, naive = len(left_one), _naive(left_one)
    if left_two is None or p < 3:
        return naive
    same = torch.eye(p, dtype=torch.bool, device="cpu")
    left_two = left_two.masked_fill(same, 0.0)
    means = left_two.sum(0) / (p - 1)
    inside = (left_two - means).masked_fill(same, 0.0).square().sum(0) / (p - 2)
    fewer = math.sqrt(float(inside.mean()) / (p - 1))
    ratio = min(1.0, naive / fewer) if fewer > 0 else 1.0
    return max(naive, ratio * math.sqrt((p - 1) / p * float((means - means.mean()).square().sum())))
