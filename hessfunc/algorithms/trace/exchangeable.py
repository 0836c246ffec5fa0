"""The standard error of a mean of exchangeable leave-one-out estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.samples import sphere_error

__all__ = ["Complements", "standard_error_of_mean"]

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
