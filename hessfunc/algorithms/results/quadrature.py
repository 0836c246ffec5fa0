"""Bounds of integrals over the spectral measures of Lanczos runs.

A Lanczos run of m steps yields the nodes and weights of the m-point Gauss rule of a measure F of
mass 1 on [a, b], and the residuals of the Ritz pairs, which are the last row of the extended Jacobi
matrix in the eigenbasis of the Jacobi matrix. Three kinds of bounds of the integral of f follow
from these numbers without a further product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

# Number below the scale of any matrix.
_TINY = 1e-300
# Quantile of chi2_1 at the probability 0.001.
_UNLIKELY = 1.57e-6
# Number of doublings of the distance between an end and the outermost node, after which the range
# counts as unbounded, and number of divisions into equal parts that locate the end.
_DOUBLINGS = 60
_DIVISIONS = 6
_PARTS = 100
# Number of intervals between two nodes on which the total variation is taken, step of the coarser
# grid that it is compared with, and largest ratio of both variations. A pole or a narrow peak has a
# much smaller variation on the coarser grid.
_BETWEEN = 128
_COARSER = 8
_STEADY = 1.5
# Number of points of the uniform grid on which divided differences are taken.
_EVEN = 65
# Number of points that approach either end of the range geometrically.
_TOWARDS_AN_END = 48
# Smallest distance of two grid points, relative to the distance from the nearer end.
_APART = 0.01
# Orders of the divided differences whose signs are tested; higher derivatives of common functions
# keep their signs if these do.
_ORDERS = (3, 4, 5, 6)
# Number of points per interpolation point on which the error of an interpolant is measured.
_MEASURED = 4


@dataclass(frozen=True)
class Rule:
    """Gauss quadrature rules of several probes.

    Attributes:
        nodes: Nodes in ascending order, float64 ``(p, m)``.
        weights: Weights, float64 ``(p, m)``. Each row sums to 1; a row with fewer nodes is padded
            with weights 0.
        residuals: Residual norms of the Ritz pairs, float64 ``(p, m)``, or None if unknown. A row
            of zeros means that the Krylov space of the probe is exhausted, so that its rule has no
            error.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor | None

    @property
    def exact(self) -> Tensor:
        """Whether the rule of each probe has no error, bool ``(p,)``."""
        if self.residuals is None:
            return torch.zeros(len(self.nodes), dtype=torch.bool, device="cpu")
        return (self.residuals == 0).all(1)

    def enclosed(self, x: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """Return rigorous bounds of the mean over the probes of the distribution function F_p(x).

        Between the nodes j and j + 1, sum_(i < j) weights_i <= F_p(x) <= sum_(i <= j+1) weights_i.

        Args:
            x: Points, of any shape.
            margin: Rounding of a node.
        """
        points = x[..., None, None]
        before = self.nodes <= points
        cumulated = self.weights.cumsum(1)
        share = torch.where(before, self.weights, 0.0).sum(-1)
        last = torch.where(before, cumulated, 0.0).amax(-1)
        # `at` is the last node up to x, and `following` the first node above it.
        at = (before.sum(-1) - 1).clamp_min(0)
        probe = torch.arange(len(self.nodes), device="cpu").expand(at.shape)
        lower = (share - self.weights[probe, at] * (before.any(-1))).clamp_min(0)
        following = (at + before.any(-1)).clamp_max(self.nodes.shape[1] - 1)
        upper = torch.maximum(cumulated[probe, following], last).clamp_max(1)
        # The nodes of a rule without error are eigenvalues, up to rounding.
        surely = torch.where(self.nodes < points - margin, self.weights, 0.0).sum(-1)
        maybe = torch.where(self.nodes <= points + margin, self.weights, 0.0).sum(-1)
        lower = torch.where(self.exact, surely, lower)
        upper = torch.where(self.exact, maybe, upper)
        return lower.mean(-1).clamp(0, 1), upper.mean(-1).clamp(0, 1)


def evaluated(f: Function, points: Tensor, /) -> Tensor:
    """Return f at points, element by element, as float64.

    Raises:
        TypeError: If f does not return a real tensor.
        ValueError: If f returns another shape.
    """
    values: object = f(points)
    if not isinstance(values, Tensor) or values.is_complex():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"f returns {kind} for a tensor of eigenvalues: pass a function of tensors, element by "
            "element, such as torch.log"
        )
    if values.dim() and values.shape != points.shape:
        raise ValueError(
            f"f returns the shape {tuple(values.shape)} for eigenvalues of the shape "
            f"{tuple(points.shape)}: pass a function that acts element by element, such as "
            "torch.log"
        )
    return values.detach().to(points).expand_as(points)


def radau(rule: Rule, at: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights ``(p, m + 1)`` of the Gauss-Radau rules with a prescribed node.

    In the eigenbasis of the Jacobi matrix T, the Jacobi matrix with one more row is an arrowhead,

        [[diag(nodes), s], [s', c]],    c = at + sum_j s_j^2 / (nodes_j - at),

    where s are the residuals with alternating signs. This choice of c makes ``at`` an eigenvalue.
    The signs are those of the last entries of the eigenvectors of T whose first entries are
    positive.

    Args:
        rule: Gauss rules with known residuals.
        at: Prescribed node, at or beyond an end of the nodes.

    Source: Golub 1973; Golub and Meurant 2010, Matrices, Moments and Quadrature, section 6.2.
    """
    assert rule.residuals is not None
    signs = 1 - 2 * (torch.arange(rule.nodes.shape[1], device="cpu") % 2)
    tip = rule.residuals * signs
    # Rounding may put a node slightly beyond the end, where a distance would change its sign.
    side = 1.0 if at <= float(rule.nodes.mean()) else -1.0
    least = torch.finfo(torch.float64).eps * max(float(rule.nodes.abs().max()), _TINY)
    distances = side * (side * (rule.nodes - at)).clamp_min(least)
    corner = at + (rule.residuals.square() / distances).sum(1)
    arrow = torch.diag_embed(torch.cat([rule.nodes, corner[:, None]], dim=1))
    arrow[:, -1, :-1] = tip
    arrow[:, :-1, -1] = tip
    nodes, vectors = torch.linalg.eigh(arrow)
    # The first basis vector of the Krylov space has the coordinates sqrt(weights) in the eigenbasis
    # of T, so the new weights are (sum_j sqrt(weights_j) vectors_jl)^2.
    weights = torch.einsum("pj,pjl->pl", rule.weights.sqrt(), vectors[:, :-1]).square()
    return nodes, weights / weights.sum(1, keepdim=True)


def ends(rule: Rule, n: int) -> tuple[float, float]:
    """Return a range that contains all eigenvalues of a matrix of dimension n in 499 of 500 runs.

    With the orthonormal polynomials p_j of the recurrence, an eigenvalue x has at most the weight
    1 / K(x), K(x) = sum_{j <= m} p_j(x)^2, in the measure of a probe. For a random unit vector the
    weight is approximately chi2_1 / n, which is rarely that small if K(x) is large. In the
    eigenbasis of the Jacobi matrix, with the residuals s,

        K(x) = (1 + sum_j (s_j / (nodes_j - x))^2) / (sum_j sqrt(weights_j) s_j / (nodes_j - x))^2.

    The range of a probe without error is that of its nodes. Without residuals the range is
    unbounded.

    Args:
        rule: Gauss rules.
        n: Dimension of the matrix.

    Returns:
        Lower and upper end.

    Source: Kuczynski and Wozniakowski 1992; Christoffel functions: Golub and Meurant 2010.
    """
    if rule.residuals is None:
        return -math.inf, math.inf
    each = [
        (_end(*(row[weights > 0] for row in (nodes, weights, residuals)), n=n, side=side))
        for nodes, weights, residuals in zip(rule.nodes, rule.weights, rule.residuals, strict=True)
        for side in (-1.0, 1.0)
    ]
    # Each probe yields an enclosure, and the tightest one is returned.
    return max(each[::2]), min(each[1::2])


def _end(nodes: Tensor, weights: Tensor, residuals: Tensor, *, n: int, side: float) -> float:
    """Return the end of the range of one probe on one side, -1 or 1, by repeated division."""
    outermost = float((side * nodes).max())
    if not bool((residuals > 0).any()):
        return side * outermost
    gaps = outermost - side * nodes.numpy()
    tip = residuals.numpy() * (1.0 - 2.0 * (np.arange(len(gaps)) % 2))
    first = weights.sqrt().numpy()
    # Far outside, the sum cancels below its rounding, which limits K from above.
    cancelled = np.finfo(np.float64).eps * np.abs(first * tip)

    def first_seen(distances: np.ndarray) -> int:
        # K(x) > n / chi2_1 at the probability 0.001: an eigenvalue at x is improbable.
        inverse = 1 / (gaps + distances[:, None])
        last = np.maximum(np.abs(inverse @ (first * tip)), inverse @ cancelled)
        seen = 1.0 + np.square(inverse) @ np.square(tip) > n / _UNLIKELY * np.square(last)
        return int(seen.argmax()) if seen.any() else len(distances)

    distances = (float(residuals.max()) or 1.0) * np.exp2(np.arange(-1, _DOUBLINGS))
    distances[0] = 0.0
    at = 1 + first_seen(distances[1:])
    if at == len(distances):
        return side * math.inf
    for _ in range(_DIVISIONS):
        distances = np.linspace(distances[at - 1], distances[at], _PARTS + 1)
        at = 1 + first_seen(distances[1:-1])
    return side * (outermost + float(distances[at]))


def bracket(rule: Rule, f: Function, low: float, high: float, *, regular: bool) -> Tensor:
    """Return bounds of the integral of f over the measure of each probe on ``[low, high]``.

    The bounds are the tightest of three:

    - Total variation: Between two nodes, the distribution function differs from that of the Gauss
      rule by less than the weights of these nodes (Chebyshev, Markov, Stieltjes). Therefore each
      increase of f between them counts with one weight at most.
    - Polynomials: The Gauss rule is exact for polynomials p of degree up to 2 m - 1, so its error
      is that of f - p for an interpolant p, and |f - p| is measured.
    - Gauss and Gauss-Radau: If the derivatives of f of orders 2 m and 2 m + 1 keep their signs, the
      Gauss rule and the two Radau rules lie on both sides of the integral. The signs are tested by
      divided differences of orders 3 to 6 on a fine grid.

    Args:
        rule: Gauss rules.
        f: Function of the nodes, element by element.
        low: Lower end of the range.
        high: Upper end of the range.
        regular: Whether the derivatives are known to keep their signs, so that no grid is needed.

    Returns:
        Lower and upper bounds, float64 ``(p, 2)``.
    """
    gauss = _integral(f, rule.nodes, rule.weights)
    known = gauss[:, None].expand(-1, 2)
    if bool(rule.exact.all()):
        return known
    if not math.isfinite(high - low):
        unknown = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64, device="cpu")
        return torch.where(rule.exact[:, None], known, unknown)
    bounds = _by_variation(rule, f, gauss, low, high)
    if bool(bounds.isfinite().all()):
        bounds = _within(bounds, _by_polynomials(rule, f, gauss, low, high))
    if rule.residuals is not None and (regular or _keeps_signs(f, rule.nodes, low, high)):
        rules = torch.stack([gauss, *(_integral(f, *radau(rule, end)) for end in (low, high))])
        # If f is not finite at an end, the bound on that side is infinite.
        lower = torch.where(rules.isnan(), -torch.inf, rules).amin(0)
        upper = torch.where(rules.isnan(), torch.inf, rules).amax(0)
        bounds = _within(bounds, torch.stack([lower, upper], dim=1))
    return torch.where(rule.exact[:, None], known, bounds)


def _within(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection of two bounds, row by row."""
    return torch.stack(
        [torch.maximum(first[:, 0], second[:, 0]), torch.minimum(first[:, 1], second[:, 1])], dim=1
    )


def _integral(f: Function, nodes: Tensor, weights: Tensor) -> Tensor:
    """Return the integral of f by each rule, ``(p,)``."""
    # 0 * inf is NaN, so nodes of weight 0 are left out.
    return torch.where(weights > 0, weights * f(nodes).to(torch.float64), 0.0).sum(1)


def _by_variation(rule: Rule, f: Function, gauss: Tensor, low: float, high: float) -> Tensor:
    """Return the bounds by the increases and decreases of f between the nodes.

    With the distribution function G of the rule, ``int f dF - int f dG = -int (F - G) df`` and
    ``-w_j <= F - G <= w_{j+1}`` between the nodes j and j + 1. Hence an increase of f there lowers
    the integral by at most w_{j+1} and raises it by at most w_j times the increase. A decrease has
    the two weights exchanged.
    """
    probes = len(rule.nodes)
    ends = [torch.full((probes, 1), end, dtype=torch.float64, device="cpu") for end in (low, high)]
    edges = torch.cat([ends[0], rule.nodes, ends[1]], dim=1)
    even = torch.linspace(0, 1, _BETWEEN + 1, dtype=torch.float64, device="cpu")
    # A pole may be much closer to a node than two points of an even grid.
    halves = 2.0 ** -torch.arange(8, _TOWARDS_AN_END, dtype=torch.float64, device="cpu")
    share = torch.cat([even, halves, 1 - halves]).sort().values
    points = edges[:, :-1, None] + share * (edges.diff(dim=1))[:, :, None]
    values = f(points).to(torch.float64)
    coarser = values[:, :, torch.searchsorted(share, even[::_COARSER].contiguous())]
    changes, coarse = values.diff(dim=2), coarser.diff(dim=2)
    floor = torch.finfo(torch.float64).eps * _BETWEEN * values.abs().amax(2)
    steady = changes.abs().sum(2) <= _STEADY * coarse.abs().sum(2) + floor
    rise = torch.where(steady, changes.clamp_min(0).sum(2), torch.inf)
    fall = torch.where(steady, (-changes).clamp_min(0).sum(2), torch.inf)
    none = torch.zeros(probes, 1, dtype=torch.float64, device="cpu")
    before = torch.cat([none, rule.weights], dim=1)
    after = torch.cat([rule.weights, none], dim=1)
    down = _product(after, rise) + _product(before, fall)
    up = _product(before, rise) + _product(after, fall)
    return torch.stack([gauss - down.sum(1), gauss + up.sum(1)], dim=1)


def _product(weights: Tensor, changes: Tensor) -> Tensor:
    """Return the products, 0 for a weight of 0 even if the change is infinite."""
    return torch.where(weights > 0, weights * changes, 0.0)


def _by_polynomials(rule: Rule, f: Function, gauss: Tensor, low: float, high: float) -> Tensor:
    """Return the bounds by the interpolant p of degree 2 m - 1 in Chebyshev's points.

    ``int f dF = int p dG + int (f - p) dF``, and ``|int (f - p) dF| <= max |f - p|``.
    """
    steps = (rule.weights > 0).sum(1)
    count = 2 * int(steps[~rule.exact].min())
    centre, radius = (low + high) / 2, (high - low) / 2

    def of(points: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
        return f(torch.from_numpy(centre + radius * points)).to(torch.float64)

    if not radius > 0:
        return torch.stack([gauss, gauss], dim=1)
    angles = (np.arange(count) + 0.5) * np.pi / count
    values = of(np.cos(angles))
    # For Chebyshev's points of the first kind, the coefficients are a discrete cosine transform.
    orders = np.arange(count)
    coefficients = 2 / count * np.cos(np.outer(orders, angles)) @ values.numpy()
    coefficients[0] /= 2
    fine = np.cos(np.linspace(0, np.pi, _MEASURED * count + 1))
    nodes = ((rule.nodes - centre) / radius).clamp(-1, 1)
    chebval = np.polynomial.chebyshev.chebval
    largest = float((of(fine) - torch.from_numpy(chebval(fine, coefficients))).abs().max())
    at_nodes = f(rule.nodes).to(torch.float64) - torch.from_numpy(
        chebval(nodes.numpy(), coefficients)
    )
    # int p dG = int f dG - int (f - p) dG
    off = torch.where(rule.weights > 0, rule.weights * at_nodes, 0.0).sum(1)
    middle = gauss - off
    return torch.stack([middle - largest, middle + largest], dim=1)


def _keeps_signs(f: Function, nodes: Tensor, low: float, high: float) -> bool:
    """Return whether the divided differences of f on a grid keep their signs, up to rounding.

    The divided differences of orders 3 and 5 must share one sign, and those of orders 4 and 6.
    """
    spread = high - low
    if not spread > 0:
        return True
    halves = 2.0 ** -torch.arange(1, _TOWARDS_AN_END, dtype=torch.float64, device="cpu")
    even = torch.linspace(0, 1, _EVEN, dtype=torch.float64, device="cpu")
    points = torch.cat([low + spread * even, low + spread * halves, high - spread * halves])
    points = torch.cat([points, nodes.flatten().clamp(low, high)]).unique()
    # Divided differences of nearly equal points would consist of rounding, so thin out the grid.
    room = torch.minimum(points - low, high - points).clamp_min(0)
    apart = points.diff() > _APART * torch.maximum(room[1:], room[:-1])
    points = points[torch.cat([torch.ones_like(apart[:1]), apart])]
    values = f(points).to(torch.float64)
    # f may be infinite at an end of the range, such as the logarithm at 0.
    inner = (points > low) & (points < high)
    if not bool(values[inner].isfinite().all()):
        return False
    finite = values.isfinite()
    points, difference = points[finite], values[finite]
    # f[x_0, ..., x_k] = (f[x_1, ..., x_k] - f[x_0, ..., x_(k-1)]) / (x_k - x_0); `doubt` bounds the
    # rounding of each difference.
    eps = torch.finfo(torch.float64).eps
    doubt = 4 * eps * difference.abs()
    signs: dict[int, set[int]] = {}
    for order in range(1, max(_ORDERS) + 1):
        widths = points[order:] - points[:-order]
        doubt = (doubt[1:] + doubt[:-1]) / widths
        difference = difference.diff() / widths
        doubt = doubt + 4 * eps * difference.abs()
        sure = difference[difference.abs() > 4 * doubt]
        signs[order] = set(sure.sign().int().tolist())
    return all(len(signs[i] | signs[i + 2]) <= 1 for i in (3, 4))
