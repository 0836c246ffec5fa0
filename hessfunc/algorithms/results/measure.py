"""Spectral measures of random probes: their means, and the distribution of eigenvalues.

The probes are uniform on the sphere of the complement of eigenpairs that are known, if there are
any. Each known eigenvalue has the mass 1 / n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.results.deflated import complement, shifts
from hessfunc.algorithms.results.estimate import Estimate
from hessfunc.algorithms.results.quadrature import Rule, bracket, ends, evaluated, radau
from hessfunc.algorithms.statistics import kolmogorov_quantile, largest_share, mean_square
from hessfunc.numerics import rounding

# Rounding of sums of weights.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class SpectralMeasure:
    """Quadrature rules of the spectral measures of probes, beside known eigenvalues.

    Attributes:
        rule: Quadrature rules of the probes, in the complement of known eigenpairs.
        known: Known eigenvalues, ``(k,)``.
        errors: Bounds of the errors of known eigenvalues, ``(k,)``.
        n: Dimension of the matrix.
        margin: Rounding of a Ritz value.
    """

    rule: Rule
    known: Tensor
    errors: Tensor
    n: int
    margin: float

    @classmethod
    def of(cls, rule: Rule, deflated: Tensor | None, *, n: int, eps: float) -> SpectralMeasure:
        """Return the measures of nodes, some of which are known eigenvalues.

        Args:
            rule: Nodes with known eigenvalues.
            deflated: Whether each node is a known eigenvalue, bool ``(p, k + m)``, or None.
            n: Dimension of the matrix.
            eps: Relative rounding of the products.
        """
        margin = rounding(eps, float(rule.nodes.abs().max()))
        if deflated is None:
            none = rule.nodes[0, :0]
            return cls(rule, none, none, n, margin)
        known, own = rule.nodes[0][deflated[0]], complement(rule, deflated, n)
        if rule.residuals is None:
            return cls(own, known, torch.zeros_like(known), n, margin)
        residuals = rule.residuals[0][deflated[0]]
        errors = shifts(known, residuals, *ends(own, n - len(known)))
        return cls(own, known, errors, n, margin)

    @property
    def dimension(self) -> int:
        """Dimension of the space of the probes."""
        return self.n - len(self.known)

    @property
    def shift(self) -> float:
        """Bound of the error of all known eigenvalues together."""
        return float(self.errors.sum())

    def range(
        self, smallest: float | None = None, largest: float | None = None
    ) -> tuple[float, float]:
        """Return the range of the eigenvalues, as given or as estimated from the Ritz pairs.

        Args:
            smallest: Lower bound of the eigenvalues, or None.
            largest: Upper bound of the eigenvalues, or None.

        Raises:
            ValueError: If a Ritz value lies outside of ``smallest`` and ``largest``.
        """
        nodes = torch.cat([self.rule.nodes[self.rule.weights > 0], self.known])
        low, high = ends(self.rule, self.dimension)
        low, high = low - self.margin, high + self.margin
        for name, end, node, beyond in (
            ("smallest", smallest, float(nodes.min()), -1),
            ("largest", largest, float(nodes.max()), 1),
        ):
            if end is None:
                continue
            if not math.isfinite(end) or beyond * (node - end) > self.margin:
                raise ValueError(
                    f"{name}={end}: a Ritz value lies at {node:.6g}, beyond this bound by more "
                    f"than rounding: pass a bound of all eigenvalues, or omit `{name}=`"
                )
        low = low if smallest is None else smallest
        return low, max(high if largest is None else largest, low)

    def distribution(
        self, points: Tensor, level: float, *, simultaneous: bool
    ) -> tuple[Tensor, Tensor]:
        """Return bounds of the share of eigenvalues up to each point, as in `Density.cdf_bounds`.

        Args:
            points: Points, of any shape.
            level: Probability with which the pointwise bounds, or the band, hold.
            simultaneous: Whether to return a band that holds at all points at once.
        """
        lower, _ = self.rule.enclosed(points - self.shift, self.margin)
        _, upper = self.rule.enclosed(points + self.shift, self.margin)
        probes = len(self.rule.nodes)
        if simultaneous:
            variance = 2 / (probes * (self.dimension + 2))
            half = kolmogorov_quantile(level) * math.sqrt(variance) + _ROUNDING
            lower, upper = (lower - half).clamp_min(0), (upper + half).clamp_max(1)
        else:
            tail, scale = (1 - level) / 2, probes * self.dimension
            # The lower bound of F is the upper bound of the share 1 - F of the eigenvalues above x.
            lower = 1 - largest_share(1 - lower + _ROUNDING, tail, scale)
            upper = largest_share(upper + _ROUNDING, tail, scale)
        if not len(self.known):
            return lower, upper
        margin, known = self.shift + self.margin, self.known
        surely = (known < points[..., None] - margin).sum(-1) + self.dimension * lower
        maybe = (known <= points[..., None] + margin).sum(-1) + self.dimension * upper
        return surely / self.n, maybe / self.n

    def mean(
        self,
        f: Callable[[Tensor], Tensor],
        smallest: float | None,
        largest: float | None,
        *,
        regular: bool,
    ) -> Estimate:
        """Return the mean of f over the spectrum, as in `Density.mean`, without its cost.

        Args:
            f: Function of the eigenvalues.
            smallest: Lower bound of the eigenvalues, or None.
            largest: Upper bound of the eigenvalues, or None.
            regular: Whether the derivatives of f are known to keep their signs.

        Raises:
            ValueError: If f is not finite at a node, or if a node lies outside of ``smallest`` and
                ``largest``.
        """
        rule, share = self.rule, self.dimension / self.n
        carries = rule.weights > 0
        low, high = self.range(smallest, largest)

        def inside(points: Tensor) -> Tensor:
            return evaluated(f, points.clamp(low, high))

        # 0 * inf is NaN, so nodes of weight 0, which pad a probe that ended early, are left out.
        values, known = torch.where(carries, inside(rule.nodes), 0.0), evaluated(f, self.known)
        bad = torch.cat([rule.nodes[~values.isfinite()], self.known[~known.isfinite()]])
        if len(bad):
            raise ValueError(
                f"f is not finite at {len(bad)} nodes, the smallest {float(bad.min()):.3g}: shift "
                "the matrix, or clamp the argument of f, such as lambda x: f(x.clamp_min(1e-6))"
            )
        deflated = float(known.sum()) / self.n
        samples = deflated + share * (rule.weights * values).sum(1)
        bounds = deflated + share * bracket(rule, inside, low, high, regular=regular).mean(0)
        # Rounded products move the nodes by up to the margin, and f with them.
        moved = _moved(inside, rule.nodes, self.margin)
        rounded = share * float(torch.where(carries, rule.weights * moved, 0.0).sum(1).mean())
        rounded += _ROUNDING * float(torch.cat([values.flatten(), known]).abs().max())
        if len(known):
            # Residuals move known eigenvalues, and those of the complement by the same in total.
            own = _moved(lambda x: evaluated(f, x), self.known, self.errors + self.margin)
            others = _moved(inside, rule.nodes, self.shift)
            rounded += float(own.sum() + torch.where(carries, others, 0.0).max()) / self.n
        n = self.dimension
        spreads = [
            mean_square(v - (w * v).sum() / len(w), w, n)
            for v, w in self._quadratures(inside, values, low, high)
        ]
        lower, upper = float(bounds[0]) - rounded, float(bounds[1]) + rounded
        if math.isnan(lower) or math.isnan(upper):
            lower, upper = -math.inf, math.inf
        reason = "mean of f over the spectrum"
        if not math.isfinite(upper - lower):
            reason += (
                f", without bounds: eigenvalues may lie in [{low:.3g}, {high:.3g}], where f is not "
                "bounded; take more steps, or pass `smallest=` and `largest=`"
            )
        return Estimate(
            value=float(samples.mean()),
            stderr=share
            * math.sqrt(2 * max(square for square, _ in spreads) / (len(samples) * (n + 2) - 2)),
            degrees=min(degrees for _, degrees in spreads),
            samples=samples,
            by_leaf={},
            bounds=(min(lower, float(samples.mean())), max(upper, float(samples.mean()))),
            matvecs=0,
            passes=0,
            reason=reason,
            seed=None,
        )

    def _quadratures(
        self, f: Callable[[Tensor], Tensor], values: Tensor, low: float, high: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return values and weights of the Gauss rules, and of Gauss-Radau rules at both ends."""
        rules = [(values, self.rule.weights)]
        if self.rule.residuals is None or bool(self.rule.exact.all()):
            return rules
        for end in (low, high):
            if not math.isfinite(end):
                continue
            nodes, weights = radau(self.rule, end)
            at_nodes = torch.where(weights > 0, f(nodes), 0.0)
            if bool(at_nodes.isfinite().all()):
                rules.append((at_nodes, weights))
        return rules


def _moved(f: Callable[[Tensor], Tensor], points: Tensor, by: Tensor | float) -> Tensor:
    """Return the largest change of f if points move by up to a distance; infinite if unknown."""
    changes = torch.stack([f(points + off) - f(points) for off in (-by, by)]).abs().amax(0)
    return torch.where(changes.isnan(), torch.inf, changes)
