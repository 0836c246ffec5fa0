"""The standard error of a mean of exchangeable leave-one-out estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """Two jackknife errors of the mean of p leave-one-out estimates t_i.

    Attributes:
        naive: of the t_i as if they were independent. They share p - 1 of their probes, so it is
            too small where the spectrum decays: by 1.3 for XTrace, by up to 5 for XNysTrace.
        complete: the jackknife of the mean itself, computed anew without each probe. By Efron and
            Stein it is too large on average.
        probes: p.
    """

    naive: float
    complete: float
    probes: int

    def between(self, share: float, widening: float, /) -> float:
        """The geometric mean of both, with this share of the complete one, and widened."""
        return widening * self.naive ** (1 - share) * self.complete**share


def spread(left_one: Tensor, left_two: Tensor | None, /) -> Spread:
    """Both errors, from estimates that leave one and two probes out.

        complete^2 = rho^2 (p - 1) / p sum_j (T_j - mean T)^2,  T_j = mean over i of t_ij,

    where rho <= 1 carries the error of p - 1 probes, which the jackknife measures, over to p
    probes: it is the ratio of the naive errors of both.

    Args:
        left_one: t_i, float64 ``(p,)``.
        left_two: t_ij, ``(p, p)``: probe i tests the approximation that leaves out i and j; the
            diagonal is not read. None where leaving a probe out changes nothing.

    Source: Efron and Stein 1981, The jackknife estimate of variance.
    """
    p = len(left_one)
    naive = float(left_one.std()) / math.sqrt(p) if p > 1 else math.inf
    if left_two is None:
        return Spread(naive, naive, p)
    if p < 3:
        return Spread(math.inf, math.inf, p)
    same = torch.eye(p, dtype=torch.bool, device="cpu")
    left_two = left_two.masked_fill(same, 0.0)
    means = left_two.sum(0) / (p - 1)
    inside = (left_two - means).masked_fill(same, 0.0).square().sum(0) / (p - 2)
    fewer = math.sqrt(float(inside.mean()) / (p - 1))
    ratio = min(1.0, naive / fewer) if fewer > 0 else 1.0
    complete = math.sqrt((p - 1) / p * float((means - means.mean()).square().sum()))
    return Spread(naive, max(naive, ratio * complete), p)
