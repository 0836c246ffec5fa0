"""Quantiles, standard errors and jackknives.

Quantiles come from SciPy, which is imported at the first call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Number of halvings of an interval that resolve a share of up to 2^40 eigenvalues.
_HALVINGS = 60


def refuse_level(level: float, /) -> None:
    """Check that a confidence level is a probability.

    Raises:
        ValueError: If the level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: choose a probability between 0 and 1, such as 0.95")


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


def student_mean(samples: Tensor, /, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the mean of independent samples, and the half-width of its Student interval.

    Args:
        samples: Samples along the first axis, such as results of several seeds.
        level: Confidence level, in (0, 1).
    """
    stderr = samples.std(0) / len(samples) ** 0.5
    return samples.mean(0), student_quantile((1 + level) / 2, len(samples) - 1) * stderr


# Precision c^2 of the prior of mean / deviation, with which intervals of 10 to 100 samples are
# within 10 % of the narrowest.
_PRECISION = 2.5


def anytime_quantile(level: float, samples: int, /) -> float:
    """Return the factor of standard errors whose intervals hold at all numbers of samples at once.

    For normal samples with an unknown variance and the sample mean m_p, the intervals

        m_p +- s_p (p (1 - r) / (p / (p + c^2) - 1 + r))^(1/2),  r = (a^2 c^2 / (p + c^2))^(1 / p),

    contain the mean for all p at once with probability 1 - a, where s_p^2 is the mean of the
    squared deviations over p. They invert the test martingale that mixes the t statistic over
    mean / deviation ~ N(0, 1 / c^2). The factor is infinite for few samples, then about 1.6 times
    Student's quantile, and grows like (log p)^(1/2).

    Args:
        level: Probability 1 - a of all intervals at once, in (0, 1).
        samples: Number of samples p.

    Source: Lai 1976; Wang and Ramdas 2023, arXiv 2310.03722; for asymptotic normality,
    Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2021, arXiv 2103.06476.
    """
    p = samples
    if p < 1:
        return math.inf
    excess = 2 * math.log1p(-level) + math.log(_PRECISION / (p + _PRECISION))
    ratio = math.exp(excess / p)
    divisor = p / (p + _PRECISION) - 1 + ratio
    return math.sqrt(p * (1 - ratio) / divisor) if divisor > 0 else math.inf


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


# Number of samples below which an interval does not stop a run, since its width is too uncertain.
FEWEST_SAMPLES = 20
# Factor of the standard errors of a run with a tolerance, which stops where its error happens to
# look small. It applies from the first round on, so that the interval that is compared with the
# tolerance is the reported one (bench/results/coverage.md).
STOPPED = 1.1


def rounding_of_sum(eps: float, /, *, halves: float = 0.5) -> float:
    """Return the relative standard error that rounding gives a sum of products.

    Products in 16 bits are rounded once, at the end, so their errors average out. Products in 32
    bits or more are rounded in every sum.

    Args:
        eps: Relative rounding of the products.
        halves: Factor of eps for products in 16 bits.
    """
    return (10 if eps < 1e-4 else halves) * eps


def sphere_error(quadratics: Tensor, squares: Tensor, dimension: int, /) -> float:
    """Return the standard error of a mean of quadratic forms on the sphere.

        Var(w'Aw) = 2 E(|Aw|^2 - (w'Aw)^2 / n)

    holds exactly for a symmetric A and w uniform on the sphere of radius sqrt(n). The mean of p
    samples of the right side varies far less than the sample variance of w'Aw. Student's intervals
    with p degrees of freedom have their nominal coverage at every level, from p = 2 on, both for
    flat spectra and for a single outlier.

    Args:
        quadratics: Samples of ``w'Aw``, float64 ``(p,)``.
        squares: Samples of ``|Aw|^2``, float64 ``(p,)``.
        dimension: Dimension n.
    """
    parts = (squares - quadratics.square() / dimension).clamp_min(0)
    return math.sqrt(2 * float(parts.mean()) / len(parts))


def standard_error(samples: Tensor, /) -> float:
    """Return the standard error of the mean of skewed samples, infinite for a single sample.

        s / sqrt(p) (1 + |g| / sqrt(p) + 1 / p),  g = the sample skewness

    Quadratic forms of a matrix with few large eigenvalues are as skewed as a chi-squared variable
    of one degree of freedom. Student's interval at level 95 % then covers only 87 to 93 %. The
    factor compensates for the shift of its centre, g s (1 + 2 t^2) / (6 p), and for skewness that
    few samples do not show.

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
    """Return the standard error of the contribution of each leaf to an estimate.

        stderr_l = s_l / sqrt(p) (1 + 1 / p) max(1, stderr sqrt(p) / s)

    Here s_l is the standard deviation of the samples of leaf l, and s that of their sums over all
    leaves.

    Args:
        parts: Samples of each leaf, float64 ``(p, leaves)``.
        stderr: Standard error of the estimate, the mean of the sums over all leaves.
    """
    p = len(parts)
    if p < 2 or math.isinf(stderr):
        return [math.inf] * parts.shape[1]
    whole = float(parts.sum(1).std()) / math.sqrt(p)
    if not whole > 0:
        return [stderr] * parts.shape[1]
    widening = max(1.0, stderr / whole) * (1 + 1 / p)
    return [widening * error for error in (parts.std(0) / math.sqrt(p)).tolist()]


# Factor of `sphere_error`, exponent of the jackknife, and factor of the lost curvature, calibrated
# on ten spectra at 80, 90, 95 and 99 % (bench/results/coverage.md).
_OWN, _SHARE, _LOST = 1.15, 0.7, 0.6


@dataclass(frozen=True)
class Complements:
    """Quadratic forms of p probes on the complements of leave-one-out approximations.

    Probe i tests the approximation from all other probes on the complement of its range.

    Attributes:
        dimension: Dimension d of a complement.
        quadratics: Forms ``u_i'A u_i`` of the probes u_i on the sphere of radius sqrt(d) of their
            complements, float64 ``(p,)``.
        squares: Squared lengths of ``A u_i`` within the complement, float64 ``(p,)``.
        lost: Curvature ``s_i'A s_i`` along the unit direction s_i that only the i-th product adds,
            float64 ``(p,)``.
        coupling: Length of the part of ``A s_i`` within the complement and orthogonal to s_i,
            float64 ``(p,)``. Zero if s_i is an eigenvector of what is lost.
    """

    dimension: int
    quadratics: Tensor
    squares: Tensor
    lost: Tensor
    coupling: Tensor


def standard_error_of_mean(
    left_one: Tensor,
    left_two: Tensor | None,
    complements: Complements,
    /,
    *,
    jackknife: float,
) -> float:
    """Return the standard error of the mean of p leave-one-out estimates t_i.

    It has p degrees of freedom, and is the largest of three errors, each times a calibrated factor:

    - the error of independent quadratic forms on the complements, `sphere_error`;
    - the weighted geometric mean of the naive error of the t_i, which share p - 1 probes, and of
      the jackknife error of their mean. If the spectrum decays, the naive error is too small, by
      up to a factor 5. The jackknife error is too large on average (Efron and Stein 1981);
    - the root mean square of the length of P (A - c I) s_i, the product of the matrix that product
      i deflates, where P projects on the complement and c is the mean curvature on it. If the
      number of probes equals that of equal dominant eigenvalues, all t_i may lack one eigenvalue
      and still agree with each other, since all s_i are then nearly parallel. The curvature
      s_i'A s_i alone is too small where s_i is only partly along the missing eigenvector.

    Args:
        left_one: Estimates t_i, float64 ``(p,)``.
        left_two: Estimates t_ij, in which probe i tests the approximation that leaves out i and j,
            float64 ``(p, p)``. The diagonal is not read. None if the products are linearly
            dependent, so that leaving one out changes nothing.
        complements: Complements of the p probes.
        jackknife: Factor of the jackknife error, which depends on the estimator.
    """
    own = sphere_error(complements.quadratics, complements.squares, complements.dimension)
    # |P (A - c I) s|^2 = (s'A s - c)^2 + |coupling|^2
    lost = torch.hypot(
        complements.lost - complements.quadratics / complements.dimension, complements.coupling
    )
    naive, complete = _naive(left_one), _complete(left_one, left_two)
    return max(
        _OWN * own,
        jackknife * naive ** (1 - _SHARE) * complete**_SHARE,
        _LOST * float(lost.square().mean().sqrt()),
    )


def _naive(left_one: Tensor) -> float:
    """Return the standard error of the mean of the t_i as if they were independent."""
    p = len(left_one)
    return float(left_one.std()) / math.sqrt(p) if p > 1 else 0.0


def _complete(left_one: Tensor, left_two: Tensor | None) -> float:
    """Return the jackknife error of the mean, and at least the naive error.

        complete^2 = rho^2 (p - 1) / p sum_j (T_j - mean T)^2,  T_j = mean over i != j of t_ij

    The jackknife measures the error of p - 1 probes. The factor rho <= 1 converts it to p probes:
    it is the ratio of the naive errors of both. Fewer than three probes have the naive error only.
    """
    p, naive = len(left_one), _naive(left_one)
    if left_two is None or p < 3:
        return naive
    same = torch.eye(p, dtype=torch.bool, device="cpu")
    left_two = left_two.masked_fill(same, 0.0)
    means = left_two.sum(0) / (p - 1)
    # `fewer` is the naive error of p - 1 probes: that of T_j, averaged over j.
    inside = (left_two - means).masked_fill(same, 0.0).square().sum(0) / (p - 2)
    fewer = math.sqrt(float(inside.mean()) / (p - 1))
    ratio = min(1.0, naive / fewer) if fewer > 0 else 1.0
    return max(naive, ratio * math.sqrt((p - 1) / p * float((means - means.mean()).square().sum())))


def largest_share(share: Tensor, tail: float, scale: int, /) -> Tensor:
    """Return the largest F for which P(X <= share) >= tail.

    X is distributed as Beta(scale F / 2, scale (1 - F) / 2). The probability decreases with F, so
    bisection applies.
    """
    from scipy.special import betainc

    upto = share.clamp_max(1).numpy()
    low, high = np.zeros_like(upto), np.ones_like(upto)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        likely = betainc(scale * middle / 2, scale * (1 - middle) / 2, upto) >= tail
        low, high = np.where(likely, middle, low), np.where(likely, high, middle)
    return torch.from_numpy(np.where(upto >= 1, 1.0, high))


def mean_square(centred: Tensor, weights: Tensor, n: int, /) -> tuple[float, int]:
    """Return the mean square of values at nodes, and its degrees of freedom.

    A probe on the sphere has the squared coordinates chi2_1 / n on the eigenvectors. With the
    values g_i at the eigenvalues, the mean over p probes is S = sum_i g_i^2 chi2_p,i / (n p), and
    by Satterthwaite's formula it has

        2 E(S)^2 / Var(S) = p n (mean g^2)^2 / mean g^4

    degrees of freedom.

    Args:
        centred: Values minus their mean, ``(p, m)``.
        weights: Weights of the nodes of each probe, ``(p, m)``; each row sums to 1.
        n: Number of entries of a probe.
    """
    probes = len(weights)
    square = float((weights * centred.square()).sum()) / probes
    if square == 0:
        return 0.0, probes * n
    kurtosis = float((weights * (centred / math.sqrt(square)) ** 4).sum()) / probes
    return square, max(1, int(probes * n / kurtosis))
