"""Bounds of the error of f(A) b in a Krylov space, from the Jacobi matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.recurrences import Recurrence, eigenpairs_of
from hessfunc.algorithms.results.quadrature import Rule, ends, evaluated
from hessfunc.numerics import rounding

# Number of grid points beyond 4 for each step, and number of halvings of the distance to an end of
# the range.
_GRID = 33
_OUTSIDE = 30
# Smallest distance of a grid point from a Ritz value, relative to their range; the quotients
# of closer points consist of rounding.
_APART = 1e-7


@dataclass(frozen=True)
class Projected:
    """f(T) e_1 in a Krylov space of a unit vector, with bounds of the error of Q f(T) e_1.

    Attributes:
        coefficients: Entries of f(T) e_1, float64 ``(m,)``.
        lower: Lower bound of the error.
        upper: Upper bound of the error, without rounding.
        rounded: Effect of rounding on the error.
        ends: Range that the bounds assume for the eigenvalues.
    """

    coefficients: Tensor
    lower: float
    upper: float
    rounded: float
    ends: tuple[float, float]

    @property
    def norm(self) -> float:
        """Norm of f(T) e_1."""
        return float(self.coefficients.norm())


def projected(
    recurrence: Recurrence,
    f: Callable[[Tensor], Tensor],
    /,
    *,
    smallest: float | None,
    largest: float | None,
    n: int,
    eps: float,
) -> Projected:
    """Return f(T) e_1 and bounds of the error of Q f(T) e_1.

    With A Q = Q T + beta q e_m', the eigenpairs (t_j, s_j) of T, and divided differences of f,

        f(A) q_1 - Q f(T) e_1 = beta g(A) q,    g(x) = sum_j s_1j s_mj f[x, t_j],

    an identity for every f. Since q is a unit vector, the error lies between the least and the
    largest beta |g(x)| over the eigenvalues x. Both are taken over a range that contains them, on a
    grid. No derivative of f is needed, since no grid point lies close to a Ritz value.

    Args:
        recurrence: Coefficients of the Lanczos recurrence.
        f: Function of eigenvalues, element by element.
        smallest: Lower bound of the eigenvalues; by default that of `ends`.
        largest: Upper bound of the eigenvalues; by default that of `ends`.
        n: Dimension of A.
        eps: Relative rounding of the products.

    Raises:
        ValueError: If f is not finite at a Ritz value, or if a Ritz value lies outside of
            ``smallest`` and ``largest``.

    Source: Ilic, Turner and Simpson 2010; Frommer, Guettel and Schweitzer 2014; for Lanczos, Chen,
    Greenbaum, Musco and Musco 2022, arXiv 2106.09806.
    """
    nodes, vectors = eigenpairs_of(recurrence)
    beta, scale = recurrence[1][-1], float(nodes.abs().max())
    first, last = vectors[0], vectors[-1]
    margin = rounding(eps, scale)
    low, high = _range(nodes, first, beta * last.abs(), smallest, largest, n=n, margin=margin)

    def inside(points: Tensor) -> Tensor:
        return evaluated(f, points.clamp(low, high))

    # Rounding may put a Ritz value slightly beyond a known end.
    nodes = nodes.clamp(low, high)
    values = evaluated(f, nodes)
    if not bool(values.isfinite().all()):
        at = float(nodes[~values.isfinite()][0])
        raise ValueError(
            f"f is not finite at the Ritz value {at:.6g}, and A has an eigenvalue at most that "
            "small or at least that large: shift the matrix by `hf.matvecs.shift`, take a positive "
            "semi-definite one such as `ggnvp`, or pass `smallest=0` if rounding made it negative"
        )
    coefficients = vectors @ (values * first)
    rounded = _rounded(inside, nodes, values, first, margin)
    rounded += rounding(eps, float(coefficients.norm()))
    if beta == 0:
        return Projected(coefficients, 0.0, 0.0, rounded, (low, high))
    points = _grid(nodes, beta, low, high)
    slopes = (inside(points)[:, None] - values) / (points[:, None] - nodes)
    sizes = beta * (slopes @ (first * last))
    upper = float(sizes.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())
    one_sign = bool((sizes > 0).all() or (sizes < 0).all())
    lower = float(sizes.abs().min()) if one_sign and math.isfinite(upper) else 0.0
    return Projected(coefficients, max(lower - rounded, 0.0), upper, rounded, (low, high))


def _range(
    nodes: Tensor,
    first: Tensor,
    residuals: Tensor,
    smallest: float | None,
    largest: float | None,
    *,
    n: int,
    margin: float,
) -> tuple[float, float]:
    """Return the range that is assumed for the eigenvalues."""
    for name, end, beyond in (
        ("smallest", smallest, None if smallest is None else smallest - float(nodes[0])),
        ("largest", largest, None if largest is None else float(nodes[-1]) - largest),
    ):
        if beyond is not None and not beyond <= margin:
            node = float(nodes[0] if name == "smallest" else nodes[-1])
            raise ValueError(
                f"{name}={end}: a Ritz value lies at {node:.6g}, beyond this bound by more than "
                f"rounding: pass a bound of all eigenvalues, or omit `{name}=`"
            )
    if smallest is not None and largest is not None:
        return smallest, max(largest, smallest)
    low, high = ends(Rule(nodes[None], first.square()[None], residuals[None]), n)
    low = low - margin if smallest is None else smallest
    return low, max(high + margin if largest is None else largest, low)


def _rounded(
    f: Callable[[Tensor], Tensor], nodes: Tensor, values: Tensor, first: Tensor, margin: float
) -> float:
    """Return the effect on f(T) e_1 of a change of T by the rounding of products.

    A change E of T changes f(T), to first order, by the entries f[t_i, t_j] E_ij in the eigenbasis.
    """
    moved = torch.stack([f(nodes - margin), f(nodes + margin)]) - values
    moved = moved.abs().nan_to_num(nan=math.inf).amax(0)
    steps = (nodes[:, None] - nodes).abs()
    slopes = torch.where(steps > margin, (values[:, None] - values).abs() / steps, 0.0)
    return float((first * torch.maximum(moved, margin * slopes.amax(0))).norm())


def _grid(nodes: Tensor, beta: float, low: float, high: float) -> Tensor:
    """Return points of the range: between the nodes, and at all distances from the outer ones."""
    first, last = float(nodes[0]), float(nodes[-1])
    angles = torch.linspace(0, math.pi, 4 * len(nodes) + _GRID, dtype=torch.float64, device="cpu")
    even = (first + last) / 2 - (last - first) / 2 * angles.cos()
    shares = 2.0 ** -torch.arange(0, _OUTSIDE, 0.5, dtype=torch.float64, device="cpu")
    points = torch.cat([even, first + (low - first) * shares, last + (high - last) * shares])
    distances = (points[:, None] - nodes).abs().amin(1)
    points = points[distances > _APART * (last - first + beta)]
    points = torch.cat([points, (nodes[1:] + nodes[:-1]) / 2])
    return points[(points[:, None] != nodes).all(1)]
