"""A spectral density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hessfunc.algorithms.results.estimate import Estimate
from hessfunc.algorithms.results.quadrature import Rule, bracket, ends, radau
from hessfunc.algorithms.results.result import Result, shown
from hessfunc.algorithms.statistics import kolmogorov_quantile
from hessfunc.numerics import rounding
from hessfunc.options import real, validated

# Of sums of weights.
_ROUNDING = 1e-12
# Of n times a share, which is a whole number.
_WHOLE = 1e-6
# Of an interval, to find a share of up to 2^40 eigenvalues.
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True, repr=False)
class Density(Result):
    """A spectral density: a mixture of point masses for each probe.

    Attributes:
        nodes: Ritz values, ascending, float64 ``(p, m)``.
        weights: of the nodes, float64 ``(p, m)``; they sum to 1 for each probe. A probe that
            ended early is filled up with nodes of weight 0.
        residuals: Residual norms of the Ritz pairs, float64 ``(p, m)``; all 0 for a probe whose
            Krylov space is exhausted, so that its quadrature has no error. None where they are not
            known: `mean` then needs the ends of the spectrum.
        n: the dimension of the matrix.
        eps: Relative rounding of the products: that of their dtype, or the measured one where that
            is larger.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    residuals: Tensor | None = None
    eps: float = torch.finfo(torch.float64).eps

    def _headline(self) -> dict[str, object]:
        probes, steps = self.nodes.shape
        reach = shown(torch.stack([self.nodes.min(), self.nodes.max()]))
        return {"n": self.n, "probes": probes, "steps": steps, "nodes": reach}

    @property
    def width(self) -> float:
        """The default smoothing width: 1 % of the range of the nodes."""
        spread = float(self.nodes.max() - self.nodes.min())
        return 0.01 * (spread or float(self.nodes.abs().max()) or 1.0)

    @validated
    def grid(self, points: int = 1000) -> Tensor:
        """Evenly spaced points ``(points,)`` that cover the smoothed density."""
        if points < 1:
            raise ValueError(f"points={points}: there must be at least 1, such as points=1000")
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return torch.linspace(
            low - 5 * self.width, high + 5 * self.width, points, dtype=torch.float64, device="cpu"
        )

    @validated
    def pdf(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density smoothed by a Gaussian of standard deviation ``width``, at the grid's points.

            pdf(x) = mean over probes of sum_j weights_j N(x; nodes_j, width^2)

        Args:
            grid: points, any shape.
            width: in units of the eigenvalues; by default 1 % of the range of the nodes.
        """
        width = self.width if width is None else width
        if not width > 0:
            raise ValueError(f"width={width}: a positive number")
        z = (grid.to(torch.float64)[..., None] - self.nodes.flatten()) / width
        mass = self.weights.flatten() / len(self.nodes)
        return (torch.exp(-0.5 * z.square()) @ mass) / (width * math.sqrt(2 * math.pi))

    @validated
    def cdf_bounds(
        self, x: Tensor | float, level: float = 0.95, *, simultaneous: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the share F of eigenvalues up to each x: ``(lower, upper)``, shaped like x.

        By default pointwise: they hold at each x with probability ``level``, not at all of them at
        once. With ``simultaneous=True`` a band: it holds at every x at once with that probability.

        The distribution function F_p of each probe is enclosed between its nodes without error
        (Chebyshev, Markov, Stieltjes), and known where its Krylov space is exhausted. On the
        eigenvalues up to x a probe on the sphere puts a Beta distributed share. The mean over P
        probes has very nearly the law

            Beta(P F n / 2, P (1 - F) n / 2),    variance 2 F (1 - F) / (P n + 2),

        and the pointwise bounds are the F of which neither tail of it, beyond the enclosed share,
        is below (1 - level) / 2 (Clopper and Pearson). The band follows from

            P(max_x |mean F_p(x) - F(x)| > K sqrt(2 / (P (n + 2)))) ~ 1 - level

        with Kolmogorov's quantile K, as the shares of all x are close to a Brownian bridge in F. In
        simulations of n = 2 to 1000 distinct eigenvalues, P = 1 to 16 and levels 0.5 to 0.999 the
        band held at least that often: for n = 3, 10, 50, 1000 at level 0.95 in 99, 98, 97 and
        95.5 %.

        Args:
            x: points, any shape.
            level: the probability of the pointwise bounds, or of the band.
            simultaneous: the band instead of pointwise bounds.

        Raises:
            ValueError: the level is not a probability.

        Source: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595; the tails, Clopper and Pearson 1934.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        if points.isnan().any():
            raise ValueError("x has entries that are NaN")
        lower, upper = self._enclosed(points)
        if simultaneous:
            variance = 2 / (len(self.nodes) * (self.n + 2))
            half = kolmogorov_quantile(level) * math.sqrt(variance) + _ROUNDING
            return (lower - half).clamp_min(0), (upper + half).clamp_max(1)
        tail, scale = (1 - level) / 2, len(self.nodes) * self.n
        # The share above x is a mirror image.
        return 1 - _most(1 - lower, tail, scale), _most(upper, tail, scale)

    def _enclosed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds without error of the mean over these very probes of their F_p(x)."""
        points = x[..., None, None]
        before = self.nodes <= points
        cumulated = self.weights.cumsum(1)
        share = torch.where(before, self.weights, 0.0).sum(-1)
        last = torch.where(before, cumulated, 0.0).amax(-1)
        # Up to the node before x, and up to the node after it.
        at = (before.sum(-1) - 1).clamp_min(0)
        probe = torch.arange(len(self.nodes), device="cpu").expand(at.shape)
        lower = (share - self.weights[probe, at] * (before.any(-1))).clamp_min(0)
        following = (at + before.any(-1)).clamp_max(self.nodes.shape[1] - 1)
        upper = torch.maximum(cumulated[probe, following], last).clamp_max(1)
        # A rule without error has its nodes at eigenvalues, up to rounding.
        surely = torch.where(self.nodes < points - self._margin, self.weights, 0.0).sum(-1)
        maybe = torch.where(self.nodes <= points + self._margin, self.weights, 0.0).sum(-1)
        lower = torch.where(self._rule.exact, surely, lower)
        upper = torch.where(self._rule.exact, maybe, upper)
        return lower.mean(-1).clamp(0, 1), upper.mean(-1).clamp(0, 1)

    @property
    def _rule(self) -> Rule:
        return Rule(self.nodes, self.weights, self.residuals)

    @property
    def _margin(self) -> float:
        """The size of the rounding of a Ritz value."""
        return rounding(self.eps, float(self.nodes.abs().max()))

    @validated(x=real)
    def count_above(self, x: float, level: float = 0.95) -> tuple[int, int]:
        """An interval ``(low, high)`` of the number of eigenvalues above x.

        The interval holds every count that the pointwise `cdf_bounds` at this x allow and that
        the Ritz values of each single probe allow, which interlace with the eigenvalues: there are
        at least as many eigenvalues above x as Ritz values of one probe, whatever the level, and
        likewise below. So outliers that have converged are counted in ``low`` at no cost. ``high``
        is tightened by probes, and by steps until the Krylov space is exhausted.

        Args:
            x: in units of the eigenvalues; best in a gap of the spectrum.
            level: the probability with which the number is in the interval.

        Raises:
            ValueError: the level is not a probability.
        """
        lower, upper = self.cdf_bounds(x, level)
        mass = self.weights > 0
        # A Ritz value may be off by rounding, which must not make an eigenvalue of a zero.
        ritz_above = int(((self.nodes > x + self._margin) & mass).sum(1).max())
        ritz_below = int(((self.nodes < x - self._margin) & mass).sum(1).max())
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
        """The mean of f over the spectrum, tr f(A) / n; so log det A is ``n * mean(torch.log)``.

            value = mean over P probes of m_p,  m_p = sum_j weights_pj f(nodes_pj),
            stderr^2 = 2 (mean f^2 - (mean f)^2) / (P (n + 2) - 2)

        A single probe w on the sphere has ``Var(w'f(A)w) = 2 / (n + 2) (mean f^2 - (mean f)^2)``
        exactly, with means over the spectrum; the quadrature's own take their place, which the
        ``- 2`` makes unbiased. So there is a standard error from one probe on. It is known as well
        as the eigenvalues that make it are many: with g = f - mean f it has

            degrees = P n (mean g^2)^2 / mean g^4,  at least 1

        degrees of freedom.

        The quadrature has an error of its own: m steps may not resolve f. ``bounds`` of the result
        enclose the mean of w'f(A)w over these very probes, and the interval is their hull, widened
        on either side by the error of the probes. They are the tightest of three:

        - The Gauss rule and the Gauss-Radau rules with a node at either end of the spectrum, where
          the derivatives of f keep their signs: log, exp, x / (x + d), powers. This is looked at on
          a fine grid.
        - The error of the interpolating polynomial of degree 2 m - 1, for smooth f.
        - Between two nodes f counts with the weight of one of them at most (Chebyshev, Markov,
          Stieltjes), for any f of bounded variation, jumps and kinks included.

        They need the ends of the spectrum. By default these are so far from the outermost Ritz
        values that an eigenvalue beyond them would have been seen, in all but one of 500 runs;
        where f is not finite there, as the log next to 0, so are the bounds. A known end makes
        them tight: ``smallest=0`` of a Gauss-Newton matrix, and the damping of a damped one.

        Args:
            f: Function of the eigenvalues, element by element, on float64 tensors of any shape.
            smallest: Lower bound of the eigenvalues.
            largest: Upper bound of the eigenvalues.

        Returns:
            `Estimate`, with ``bounds``.

        Raises:
            ValueError: f is not finite at a node, such as the log of a negative one; a node lies
                outside of the bounds that were given.

        Source: Ubaru, Chen and Saad 2017; brackets: Golub and Meurant 2010; the variance, Chen,
        Trogdon and Ubaru 2021, arXiv 2105.06595; degrees of freedom, Satterthwaite 1946.
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
        carries = self.weights > 0
        low, high = self._ends(smallest, largest)

        def inside(points: Tensor) -> Tensor:
            found: object = f(points.clamp(low, high))
            if not isinstance(found, Tensor) or found.is_complex():
                kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(
                    f"f returns {kind} for a tensor of eigenvalues: pass a function of tensors, "
                    "element by element, such as torch.log"
                )
            if found.dim() and found.shape != points.shape:
                raise ValueError(
                    f"f returns the shape {tuple(found.shape)} for eigenvalues of the shape "
                    f"{tuple(points.shape)}: pass a function that acts element by element, such as "
                    "torch.log"
                )
            return found.detach().to(points)

        # 0 * inf is not 0, and a probe that ended early is filled up with nodes of weight 0.
        values = torch.where(carries, inside(self.nodes), 0.0)
        bad = self.nodes[~values.isfinite()]
        if len(bad):
            raise ValueError(
                f"f is not finite at {len(bad)} nodes, the smallest {float(bad.min()):.3g}: shift "
                f"the matrix, or clamp the argument of f"
            )
        samples = (self.weights * values).sum(1)
        bounds = bracket(self._rule, inside, low, high, regular=regular).mean(0)
        # Nodes are eigenvalues of a matrix that is off by the rounding of its products.
        moved = torch.stack([inside(self.nodes + off) for off in (-self._margin, self._margin)])
        moved = (moved - values).abs().amax(0)
        moved = torch.where(moved.isnan(), torch.inf, moved)
        rounded = float(torch.where(carries, self.weights * moved, 0.0).sum(1).mean())
        rounded += _ROUNDING * float(values.abs().max())
        rules = [(values, self.weights)]
        if self.residuals is not None and not bool(self._rule.exact.all()):
            for end in (low, high):
                if not math.isfinite(end):
                    continue
                nodes, weights = radau(self._rule, end)
                at_nodes = torch.where(weights > 0, inside(nodes), 0.0)
                if bool(at_nodes.isfinite().all()):
                    rules.append((at_nodes, weights))
        spreads = [self._spread(v - (w * v).sum() / len(w), w) for v, w in rules]
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
            stderr=math.sqrt(
                2 * max(square for square, _ in spreads) / (len(samples) * (self.n + 2) - 2)
            ),
            degrees=min(degrees for _, degrees in spreads),
            samples=samples,
            by_leaf={},
            bounds=(min(lower, float(samples.mean())), max(upper, float(samples.mean()))),
            matvecs=self.matvecs,
            passes=self.passes,
            reason=reason,
            seed=self.seed,
        )

    def _ends(self, smallest: float | None, largest: float | None) -> tuple[float, float]:
        """The range of the eigenvalues, as given or as the Ritz pairs tell it."""
        carries = self.weights > 0
        nodes = self.nodes[carries]
        low, high = ends(self._rule, self.n)
        low, high = low - self._margin, high + self._margin
        for name, end, node, beyond in (
            ("smallest", smallest, float(nodes.min()), -1),
            ("largest", largest, float(nodes.max()), 1),
        ):
            if end is None:
                continue
            if not math.isfinite(end) or beyond * (node - end) > self._margin:
                raise ValueError(
                    f"{name}={end}: an eigenvalue estimate lies at {node:.6g}, beyond it by more "
                    f"than rounding; pass a bound of all eigenvalues, or leave it out"
                )
        low = low if smallest is None else smallest
        return low, max(high if largest is None else largest, low)

    def _spread(self, centred: Tensor, weights: Tensor) -> tuple[float, int]:
        """The mean square of values on nodes, and the degrees of freedom it is known with."""
        probes = len(weights)
        square = float((weights * centred.square()).sum()) / probes
        if square == 0:
            return 0.0, probes * self.n
        kurtosis = float((weights * (centred / math.sqrt(square)) ** 4).sum()) / probes
        return square, max(1, int(probes * self.n / kurtosis))

    @validated(damping=real)
    def effective_dimension(self, damping: float) -> Estimate:
        """The effective dimension ``tr A (A + damping I)^-1`` of a positive semi-definite matrix.

            n * mean over the spectrum of x / (x + damping)

        Nodes below 0 by no more than what products in float32 are rounded by count as 0. The
        interval holds the error of the quadrature, as that of `mean`: with few steps it is wide.

        Args:
            damping: positive, in units of the eigenvalues.

        Raises:
            ValueError: the damping is not positive, or there are negative eigenvalues.

        Source: MacKay 1992; Maddox, Benton and Wilson 2020, arXiv 2003.02139.
        """
        if not 0 < damping < math.inf:
            raise ValueError(f"damping={damping}: a positive number")
        nodes = self.nodes[self.weights > 0]
        smallest, largest = float(nodes.min()), float(nodes.abs().max())
        if smallest < -rounding(max(self.eps, torch.finfo(torch.float32).eps), largest):
            raise ValueError(
                f"an eigenvalue is below {smallest:.3g} and the largest is {largest:.3g}: the "
                f"effective dimension is of a positive semi-definite matrix, so take the GGN, with "
                f"products in float32 or float64"
            )
        positive = replace(self, nodes=self.nodes.clamp_min(0))
        found = positive._mean(lambda x: x / (x + damping), 0.0, None, regular=True)
        low, high = found.bounds or (found.value, found.value)
        return replace(
            found,
            value=self.n * found.value,
            stderr=self.n * found.stderr,
            samples=self.n * found.samples,
            bounds=(self.n * max(low, 0.0), self.n * min(high, 1.0)),
            reason=f"effective dimension at damping {damping:g}",
        )


def _most(share: Tensor, tail: float, scale: int) -> Tensor:
    """The largest F of which Beta(scale F / 2, scale (1 - F) / 2) is up to the share in the tail.

    By bisection: the probability falls as F rises.
    """
    from scipy.special import betainc

    upto = (share + _ROUNDING).clamp_max(1).numpy()
    low, high = np.zeros_like(upto), np.ones_like(upto)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        likely = betainc(scale * middle / 2, scale * (1 - middle) / 2, upto) >= tail
        low, high = np.where(likely, middle, low), np.where(likely, high, middle)
    return torch.from_numpy(np.where(upto >= 1, 1.0, high))
