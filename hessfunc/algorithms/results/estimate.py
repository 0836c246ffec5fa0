"""A number with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.quantiles import student_quantile
from hessfunc.algorithms.results.result import Result
from hessfunc.options import validated

__all__ = ["Estimate", "narrow_enough", "pool"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """A number with its standard error.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        degrees: of freedom, with which the standard error is itself known.
        samples: float64 ``(p,)``, one a probe.
        by_leaf: the part of each leaf; the parts sum to the value.
        bounds: Enclosure of the value for these very probes, where that has an error of its own,
            such as that of a quadrature; None where it has none. The interval contains it.
        squared_frobenius: of the same matrix, |A|_F^2, where the same products tell it.
    """

    value: float
    stderr: float
    degrees: int
    samples: Tensor
    by_leaf: dict[str, float]
    bounds: tuple[float, float] | None = None
    squared_frobenius: Estimate | None = None

    def _headline(self) -> dict[str, object]:
        low, high = self.interval()
        return {"value": f"{self.value:.6g}", "interval": f"[{low:.6g}, {high:.6g}]"}

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided Student interval at this level."""
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        half = student_quantile((1 + level) / 2, self.degrees) * self.stderr
        low, high = self.bounds or (self.value, self.value)
        return low - half, high + half


def narrow_enough(estimate: Estimate, rtol: float | None, atol: float | None, /) -> str | None:
    """Why an estimate need not be refined, in words, or None."""
    low, high = estimate.interval()
    if (high - low) / 2 <= max((rtol or 0.0) * abs(estimate.value), atol or 0.0):
        return "converged: the half-width of the 95 % interval is within the tolerance"
    return None


@validated
def pool(estimates: Sequence[Estimate], weights: Sequence[float] | None = None, /) -> Estimate:
    """The weighted mean of independent estimates, such as one for each of several batches.

        value = sum_b w_b value_b / sum_b w_b,  stderr^2 = sum_b w_b^2 stderr_b^2 / (sum_b w_b)^2

    with the degrees of freedom of Welch 1947.

    Args:
        estimates: of different batches or of different probes, with the same leaves or none.
        weights: what each counts, such as the examples of its batch; equal by default.

    Raises:
        ValueError: there is no estimate, weights do not match, or two estimates share a seed and
            so their probes.
    """
    weights = [1.0] * len(estimates) if weights is None else list(weights)
    if not estimates or len(weights) != len(estimates):
        raise ValueError(f"{len(estimates)} estimates and {len(weights)} weights: pass one each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights={weights}: at least 0, and not all 0")
    seeds = [estimate.seed for estimate in estimates if estimate.seed is not None]
    if len(set(seeds)) < len(seeds):
        raise ValueError("two estimates share a seed, so they are not independent: vary it")
    share = [w / sum(weights) for w in weights]
    by_leaf: dict[str, float] = {}
    for s, estimate in zip(share, estimates, strict=True):
        for name, part in estimate.by_leaf.items():
            by_leaf[name] = by_leaf.get(name, 0.0) + s * part
    bounds = [e.bounds or (e.value, e.value) for e in estimates]
    ends = [sum(s * b[i] for s, b in zip(share, bounds, strict=True)) for i in (0, 1)]
    variances = [(s * e.stderr) ** 2 for s, e in zip(share, estimates, strict=True)]
    return Estimate(
        value=sum(s * e.value for s, e in zip(share, estimates, strict=True)),
        stderr=math.sqrt(sum(variances)),
        degrees=_pooled_degrees(variances, [e.degrees for e in estimates]),
        samples=torch.cat([e.samples for e in estimates]),
        by_leaf=by_leaf,
        bounds=(ends[0], ends[1]) if any(e.bounds for e in estimates) else None,
        matvecs=sum(e.matvecs for e in estimates),
        passes=sum(e.passes for e in estimates),
        reason=f"pooled from {len(estimates)} estimates",
        seed=None,
    )


def _pooled_degrees(variances: Sequence[float], degrees: Sequence[int]) -> int:
    """Degrees of freedom of a sum of estimated variances (Welch 1947)."""
    spread = sum(v**2 / max(d, 1) for v, d in zip(variances, degrees, strict=True))
    return math.floor(sum(variances) ** 2 / spread) if spread > 0 else sum(degrees)
