"""A spectral density."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Result

__all__ = ["Density"]


@dataclass(frozen=True, kw_only=True)
class Density(Result):
    """A spectral density: a mixture of point masses for each probe.

    Attributes:
        nodes: Ritz values, ascending, float64 ``(p, m)``.
        weights: of the nodes, float64 ``(p, m)``; they sum to 1 for each probe. A probe that
            ended early is filled up with nodes of weight 0.
        n: the dimension of the matrix.
    """

    nodes: Tensor
    weights: Tensor
    n: int

    @property
    def width(self) -> float:
        """The default smoothing width: 1 % of the range of the nodes."""
        spread = float(self.nodes.max() - self.nodes.min())
        return 0.01 * (spread or float(self.nodes.abs().max()) or 1.0)

    def grid(self, points: int = 1000) -> Tensor:
        """Evenly spaced points ``(points,)`` that cover the smoothed density."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return torch.linspace(
            low - 5 * self.width, high + 5 * self.width, points, dtype=torch.float64
        )

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

    def cdf_bounds(self, x: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the share of eigenvalues up to each x: ``(lower, upper)``, shaped like x.

        The distribution function of each probe is enclosed between its nodes without error
        (Chebyshev, Markov, Stieltjes). A probe on the sphere puts a Beta distributed share, of
        variance 2 F (1 - F) / (n + 2), on the eigenvalues up to x; solved for F this gives an
        interval from a single probe on. Pointwise: it holds at each x with probability ``level``,
        not at all of them at once.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level}: a probability between 0 and 1")
        points = x.to(torch.float64)[..., None, None]
        before = self.nodes <= points
        cumulated = self.weights.cumsum(1)
        share = torch.where(before, self.weights, 0.0).sum(-1)
        last = torch.where(before, cumulated, 0.0).amax(-1)
        # Up to the node before x, and up to the node after it.
        at = (before.sum(-1) - 1).clamp_min(0)
        probe = torch.arange(len(self.nodes)).expand(at.shape)
        lower = (share - self.weights[probe, at] * (before.any(-1))).clamp_min(0)
        following = (at + before.any(-1)).clamp_max(self.nodes.shape[1] - 1)
        upper = torch.maximum(cumulated[probe, following], last).clamp_max(1)
        z = NormalDist().inv_cdf((1 + level) / 2)
        excess = z**2 * 2 / (len(self.nodes) * (self.n + 2))
        return _wilson(lower.mean(-1), excess)[0], _wilson(upper.mean(-1), excess)[1]

    def count_above(self, x: float, level: float = 0.95) -> tuple[int, int]:
        """An interval of the number of eigenvalues above x.

        From `cdf_bounds`, and from the Ritz values, which interlace: there are at least as many
        eigenvalues above x as Ritz values of one probe, and likewise below.
        """
        lower, upper = self.cdf_bounds(torch.tensor(x), level)
        mass = self.weights > 0
        ritz_above = int(((self.nodes > x) & mass).sum(1).max())
        ritz_below = int(((self.nodes <= x) & mass).sum(1).max())
        low = max(ritz_above, math.ceil(self.n * (1 - float(upper)) - 1e-9))
        high = min(self.n - ritz_below, math.floor(self.n * (1 - float(lower)) + 1e-9))
        return low, max(low, high)


def _wilson(share: Tensor, excess: float) -> tuple[Tensor, Tensor]:
    """The F at which ``(share - F)^2 = excess F (1 - F)``."""
    centre = (share + excess / 2) / (1 + excess)
    half = (excess * (share * (1 - share) + excess / 4)).sqrt() / (1 + excess)
    rounding = 1e-12
    return (centre - half - rounding).clamp(0, 1), (centre + half + rounding).clamp(0, 1)
