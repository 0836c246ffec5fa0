"""Spectral density of a matrix, and the means, counts and bounds that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results.estimate import Estimate, scaled
from hessfunc.algorithms.results.masses import distance_bound, masses
from hessfunc.algorithms.results.measure import SpectralMeasure
from hessfunc.algorithms.results.quadrature import Rule
from hessfunc.algorithms.results.result import Result
from hessfunc.algorithms.statistics import refuse_level
from hessfunc.display import curve, shown
from hessfunc.numerics import rounding
from hessfunc.options import real, validated
from hessfunc.trees import Tree

# Rounding of n times a share of the eigenvalues, which is an integer.
_WHOLE = 1e-6


@dataclass(frozen=True, kw_only=True, repr=False)
class Density(Result):
    """Spectral density, a mixture of point masses for each probe.

    Attributes:
        nodes: Ritz values in ascending order, float64 ``(p, m)``.
        weights: Weights of the nodes, which sum to 1 for each probe, float64 ``(p, m)``. A probe
            that ended early is padded with nodes of weight 0.
        n: Dimension of the matrix.
        residuals: Residual norms of the Ritz pairs, float64 ``(p, m)``. All are 0 for a probe whose
            Krylov space is exhausted, since its quadrature has no error. None if they are not
            known: `mean` then needs ``smallest`` and ``largest``.
        eps: Relative rounding of the products: that of their dtype, or the measured rounding if
            that is larger.
        deflated: Whether each node is a known eigenvalue, of weight 1 / n and with the residual of
            its eigenpair, bool ``(p, m)``; None if no eigenpairs were deflated. The other nodes are
            then those of the complement.
        basis: Block of the orthonormal Lanczos vectors of one probe, with which `trace` and
            `diagonal` can start; None unless `slq` was asked to keep it.
        recurrence: Diagonal of the Jacobi matrix of that probe, and its off-diagonal followed by
            the norm of the last residual vector, float64 ``(2, m)``; None without ``basis``.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    residuals: Tensor | None = None
    eps: float = torch.finfo(torch.float64).eps
    deflated: Tensor | None = None
    basis: Tree | None = None
    recurrence: Tensor | None = None

    def _headline(self) -> dict[str, object]:
        probes, steps = self.nodes.shape
        reach = shown(torch.stack([self.nodes.min(), self.nodes.max()]))
        return {"n": self.n, "probes": probes, "steps": steps, "nodes": reach}

    def _sparkline(self) -> str:
        grid = self.grid(240)
        density = self.pdf(grid, max(self.width, float(grid[1] - grid[0])))
        # A log scale down to a tenth of one eigenvalue shows the outliers beside the bulk.
        floor = 0.1 * float(density.max()) / max(self.n, 10)
        heights = density.clamp_min(floor).log10().tolist()
        return curve(grid.tolist(), heights, title="log of the spectral density", filled=True)

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        probes, steps = self.nodes.shape
        columns: dict[str, Sequence[Any]] = {
            "probe": [i for i in range(probes) for _ in range(steps)],
            "node": self.nodes.flatten().tolist(),
            "weight": self.weights.flatten().tolist(),
        }
        if self.residuals is not None:
            columns["residual"] = self.residuals.flatten().tolist()
        return columns

    @property
    def width(self) -> float:
        """Default width of the smoothing, 1 % of the range of the nodes."""
        spread = float(self.nodes.max() - self.nodes.min())
        return 0.01 * (spread or float(self.nodes.abs().max()) or 1.0)

    @validated
    def grid(self, points: int = 1000) -> Tensor:
        """Return evenly spaced points that cover the smoothed density.

        Args:
            points: Number of points.

        Returns:
            Points in ascending order, float64 ``(points,)``.

        Raises:
            ValueError: If ``points`` is below 1.
        """
        if points < 1:
            raise ValueError(f"points={points}: choose at least 1, such as points=1000")
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return torch.linspace(
            low - 5 * self.width, high + 5 * self.width, points, dtype=torch.float64, device="cpu"
        )

    @validated
    def pdf(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Return the density, smoothed by a Gaussian of standard deviation ``width``.

            pdf(x) = mean over probes of sum_j masses_j N(x; nodes_j, width^2)

        Args:
            grid: Points at which the density is evaluated, of any shape.
            width: Standard deviation of the Gaussian, in units of the eigenvalues. By default 1 %
                of the range of the nodes.

        Returns:
            Density at each point, float64, with the shape of ``grid``.

        Raises:
            ValueError: If the width is not positive.
        """
        width = self.width if width is None else width
        if not width > 0:
            raise ValueError(f"width={width}: choose a positive number, such as {self.width:.3g}")
        z = (grid.to(torch.float64)[..., None] - self.nodes.flatten()) / width
        mass = self.masses.flatten() / len(self.nodes)
        return (torch.exp(-0.5 * z.square()) @ mass) / (width * math.sqrt(2 * math.pi))

    @property
    def masses(self) -> Tensor:
        """Weights in which those of converged outliers are exact, float64 ``(p, m)``.

        A Ritz value of a simple eigenvalue, which has converged to 1e-3 of its size and is isolated
        by three residuals, has the mass 1 / n instead of its random weight. The weights of all
        other nodes are scaled so that the masses of a probe sum to 1. On three spectra like those
        of networks, the Wasserstein distance is 4.5 to 261 times smaller than with `weights`. If
        the weights are improbable for simple eigenvalues (1 of 1,000), they remain.
        """
        measure = self._measure
        sampled = masses(measure.rule, measure.dimension)
        if self.deflated is None:
            return sampled
        share = measure.dimension / self.n
        return self.weights.masked_scatter(~self.deflated, share * sampled)

    @validated
    def distance(self, level: float = 0.95) -> float:
        """Return an upper bound of the Wasserstein distance of the density from the spectrum.

            W1 = integral of |F(x) - G(x)| over x

        Here F is the distribution function of the eigenvalues, and G that of the `masses`. The
        bound adds the integral of the pointwise error of the probes and the enclosure of their
        distribution functions by the nodes. It assumes that the converged Ritz values that are
        simple by their weights are simple.

        Args:
            level: Probability of the bound, in (0, 1).

        Returns:
            Bound in units of the eigenvalues; infinite if the residuals are not known.

        Raises:
            ValueError: If the level is not in (0, 1).

        Source: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595.
        """
        refuse_level(level)
        if self.residuals is None:
            return math.inf
        measure = self._measure
        sampled = distance_bound(measure.rule, measure.dimension, *measure.range(), level)
        # W1 is at most the mean distance of the ordered eigenvalues of A from those of D and PAP.
        return (measure.dimension * sampled + 2 * measure.shift) / self.n

    @validated
    def cdf_bounds(
        self, x: Tensor | float, level: float = 0.95, *, simultaneous: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return bounds of the share F(x) of eigenvalues up to each x.

        Pointwise bounds, the default, hold at each x with probability ``level``, but not at all x
        at once. The band of ``simultaneous=True`` holds at all x at once with that probability.

        The nodes and weights of each probe enclose its distribution function F_p without error
        (Chebyshev, Markov, Stieltjes); F_p is known exactly if the Krylov space is exhausted. A
        probe on the sphere puts a Beta distributed share of its weight on the eigenvalues up to x.
        The mean over P probes has, in very good approximation, the distribution

            Beta(P F n / 2, P (1 - F) n / 2),    variance 2 F (1 - F) / (P n + 2).

        The pointwise bounds are the F for which neither tail of that distribution, beyond the
        enclosed share, is below (1 - level) / 2 (Clopper and Pearson). The band follows from

            P(max_x |mean F_p(x) - F(x)| > K sqrt(2 / (P (n + 2)))) ~ 1 - level

        with Kolmogorov's quantile K, since the shares of all x are close to a Brownian bridge in F.
        In simulations with n = 2 to 1000 distinct eigenvalues, P = 1 to 16 and levels 0.5 to 0.999,
        the coverage of the band was at least its level: at level 0.95, it was 99, 98, 97 and 95.5 %
        for n = 3, 10, 50 and 1000.

        Args:
            x: Points, of any shape.
            level: Probability with which the pointwise bounds, or the band, hold, in (0, 1).
            simultaneous: Whether to return the band instead of pointwise bounds.

        Returns:
            Lower and upper bounds, float64, each with the shape of ``x``.

        Raises:
            ValueError: If the level is not in (0, 1), or if an entry of ``x`` is NaN.

        Source: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595; tails: Clopper and Pearson 1934.
        """
        refuse_level(level)
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        if points.isnan().any():
            raise ValueError(
                f"x has {int(points.isnan().sum())} entries that are NaN: pass the points in units "
                "of the eigenvalues, such as density.grid()"
            )
        return self._measure.distribution(points, level, simultaneous=simultaneous)

    @property
    def _measure(self) -> SpectralMeasure:
        """Spectral measures of the probes, and the eigenpairs that were deflated."""
        rule = Rule(self.nodes, self.weights, self.residuals)
        return SpectralMeasure.of(rule, self.deflated, n=self.n, eps=self.eps)

    @validated(x=real)
    def count_above(self, x: float, level: float = 0.95) -> tuple[int, int]:
        """Return an interval of the number of eigenvalues above x.

        The interval contains every count that is consistent both with the pointwise `cdf_bounds`
        at x and with the Ritz values of each probe. Ritz values interlace with the eigenvalues:
        whatever the level, the number of eigenvalues above x is at least the number of Ritz values
        of one probe above x, and likewise below x. Therefore ``low`` counts converged outliers at
        no cost. More probes lower ``high``, and so do more steps until the Krylov space is
        exhausted.

        Args:
            x: Threshold in units of the eigenvalues, preferably in a gap of the spectrum.
            level: Probability with which the interval contains the number, in (0, 1).

        Returns:
            Lower end ``low`` and upper end ``high``, both included.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        lower, upper = self.cdf_bounds(x, level)
        mass = self.weights > 0
        # A zero eigenvalue whose Ritz value is off by rounding must not count as above or below 0.
        measure = self._measure
        margin = measure.margin + measure.shift
        ritz_above = int(((self.nodes > x + margin) & mass).sum(1).max())
        ritz_below = int(((self.nodes < x - margin) & mass).sum(1).max())
        low = max(ritz_above, math.ceil(self.n * (1 - float(upper)) - _WHOLE))
        high = min(self.n - ritz_below, math.floor(self.n * (1 - float(lower)) + _WHOLE))
        return low, max(low, high)

    @validated
    def mean(
        self,
        f: Callable[[Tensor], Tensor],
        *,
        smallest: float | None = None,
        largest: float | None = None,
    ) -> Estimate:
        """Return the mean of f over the spectrum, tr f(A) / n.

            value = mean over P probes of m_p,  m_p = sum_j weights_pj f(nodes_pj),
            stderr^2 = 2 (mean f^2 - (mean f)^2) / (P (n + 2) - 2)

        For example, log det A is ``n * mean(torch.log)``. A single probe w on the sphere has
        ``Var(w'f(A)w) = 2 / (n + 2) (mean f^2 - (mean f)^2)`` exactly, with means over the
        spectrum. The quadrature estimates these means, and the ``- 2`` removes the bias. Therefore
        a standard error is available from one probe on. Its accuracy depends on the number of
        eigenvalues that contribute: with g = f - mean f, it has

            degrees = P n (mean g^2)^2 / mean g^4,  at least 1

        degrees of freedom.

        The quadrature has an error of its own if m steps do not resolve f. The ``bounds`` of the
        result enclose the mean of w'f(A)w over the probes of this run, and the interval extends
        beyond them by the error of the probes. The bounds are the tightest of three:

        - The Gauss rule and the Gauss-Radau rules with a node at either end of the spectrum, if the
          derivatives of f keep their signs, as for log, exp, x / (x + d) and powers. The signs are
          tested on a fine grid.
        - The error of the interpolating polynomial of degree 2 m - 1, for smooth f.
        - The total variation of f between the nodes: between two nodes, each increase of f counts
          at most with the weight of one of them (Chebyshev, Markov, Stieltjes). This holds for any
          f of bounded variation, including jumps and kinks.

        The bounds require the ends of the spectrum. By default these are estimated from the Ritz
        pairs, such that in all but one of 500 runs no eigenvalue lies beyond them. If f is not
        finite there, such as the log near 0, the bounds are infinite. Known ends make the bounds
        tight: ``smallest=0`` for a Gauss-Newton matrix, or its damping for a damped matrix.

        Args:
            f: Function of the eigenvalues, element by element, on float64 tensors of any shape.
            smallest: Lower bound of the eigenvalues.
            largest: Upper bound of the eigenvalues.

        Returns:
            `Estimate`, with ``bounds``.

        Raises:
            ValueError: If f is not finite at a node, such as the log at a negative node, or if a
                node lies outside of ``smallest`` and ``largest``.

        Source: Ubaru, Chen and Saad 2017; brackets: Golub and Meurant 2010; variance: Chen, Trogdon
        and Ubaru 2021, arXiv 2105.06595; degrees of freedom: Satterthwaite 1946.
        """
        return self._mean(f, smallest, largest, regular=False)

    def _mean(
        self,
        f: Callable[[Tensor], Tensor],
        smallest: float | None,
        largest: float | None,
        *,
        regular: bool,
    ) -> Estimate:
        """Return the mean of f; ``regular`` says that the derivatives of f keep their signs."""
        measure = self._measure
        whole = measure.rule.exact & ((self.weights > 0).sum(1) == self.n)
        whole &= measure.shift <= measure.margin
        if self.residuals is None or not bool(whole.any()):
            return self._estimated(f, smallest, largest, regular=regular)
        # The nodes of n steps are all eigenvalues, whatever the probe.
        nodes, residuals = self.nodes[whole], self.residuals[whole]
        weights = torch.full_like(nodes, 1 / self.n)
        deflated = None if self.deflated is None else self.deflated[whole]
        known = replace(self, nodes=nodes, weights=weights, residuals=residuals, deflated=deflated)
        exact = known._estimated(f, smallest, largest, regular=regular)
        return replace(exact, stderr=0.0, reason="exact: all eigenvalues are known")

    def _estimated(
        self,
        f: Callable[[Tensor], Tensor],
        smallest: float | None,
        largest: float | None,
        *,
        regular: bool,
    ) -> Estimate:
        """Return the mean of f from the weights of the probes."""
        found = self._measure.mean(f, smallest, largest, regular=regular)
        return replace(found, matvecs=self.matvecs, passes=self.passes, seed=self.seed)

    @validated(damping=real)
    def effective_dimension(self, damping: float) -> Estimate:
        """Return the effective dimension of a positive semi-definite matrix.

            tr A (A + damping I)^-1 = n * mean over the spectrum of x / (x + damping)

        Nodes that are negative within the rounding of float32 products count as 0. As for `mean`,
        the interval includes the error of the quadrature and is wide for few steps.

        Args:
            damping: Positive damping in units of the eigenvalues.

        Returns:
            `Estimate`, with ``bounds``.

        Raises:
            ValueError: If the damping is not positive, or if there are negative eigenvalues.

        Source: MacKay 1992; Maddox, Benton and Wilson 2020, arXiv 2003.02139.
        """
        if not 0 < damping < math.inf:
            raise ValueError(f"damping={damping}: choose a positive number, such as damping=1e-3")
        nodes = self.nodes[self.weights > 0]
        smallest, largest = float(nodes.min()), float(nodes.abs().max())
        if smallest < -rounding(max(self.eps, torch.finfo(torch.float32).eps), largest):
            raise ValueError(
                f"the matrix has a Ritz value of {smallest:.3g}, and the largest in absolute value "
                f"is {largest:.3g}: the effective dimension requires a positive semi-definite "
                "matrix, such as `ggnvp(loss)`, with products in float32 or float64"
            )
        positive = replace(self, nodes=self.nodes.clamp_min(0))
        share = positive._mean(lambda x: x / (x + damping), 0.0, None, regular=True)
        low, high = share.bounds or (share.value, share.value)
        share = replace(share, bounds=(max(low, 0.0), min(high, 1.0)))
        reason = f"effective dimension at damping {damping:g}"
        return replace(scaled(share, self.n), reason=reason)
