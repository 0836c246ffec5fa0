"""Weights of converged Ritz values, and the distance of a density from that of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.algorithms.results.quadrature import Rule
from hessfunc.algorithms.statistics import chi_squared_quantile, largest_share

# Largest residual of a converged Ritz value, relative to its size, and number of residuals that
# must separate it from its neighbours.
_CONVERGED = 1e-3
_ISOLATED = 3.0
# Probability with which the weights of simple eigenvalues pass for those of repeated ones.
_CHANCE = 1e-3


def simple(rule: Rule, n: int, /) -> Tensor:
    """Return which Ritz values are those of simple eigenvalues, bool ``(p, m)``.

    Such a value has converged and is isolated by its residual. The weights of a random vector on k
    simple eigenvalues are close to chi2_1 / n each and to chi2_k / n together. Larger weights are
    those of repeated eigenvalues. Nothing is known of repeated eigenvalues with small weights.

    Args:
        rule: Gauss rules of probes on the sphere, with known residuals.
        n: Dimension of the matrix.
    """
    assert rule.residuals is not None
    infinite = torch.full_like(rule.nodes[:, :1], torch.inf)
    carries = rule.weights > 0
    gaps = torch.where(carries[:, 1:], rule.nodes.diff(dim=1), torch.inf)
    nearest = torch.minimum(torch.cat([infinite, gaps], 1), torch.cat([gaps, infinite], 1))
    converged = carries & (rule.residuals <= _CONVERGED * rule.nodes.abs())
    converged &= nearest > _ISOLATED * rule.residuals
    # An exhausted Krylov space of fewer steps than n has repeated eigenvalues.
    converged &= ~(rule.exact & (carries.sum(1) < n))[:, None]
    converged &= n * rule.weights <= chi_squared_quantile(1 - _CHANCE, 1)
    for row, weights in zip(converged, rule.weights, strict=True):
        if k := int(row.sum()):
            row &= n * weights[row].sum() <= chi_squared_quantile(1 - _CHANCE, k)
    return converged


def masses(rule: Rule, n: int, /) -> Tensor:
    """Return the weights ``(p, m)``, 1 / n for simple eigenvalues and scaled for all others.

    The projection of a probe on the complement of the converged eigenvectors is uniform on the
    sphere of the complement, so the other weights are those of the spectrum without the converged
    eigenvalues, times a random factor that is known exactly.
    """
    if rule.residuals is None:
        return rule.weights
    known = simple(rule, n)
    others = torch.where(known, 0.0, rule.weights)
    # The k known eigenvalues have the mass k / n together, and all others 1 - k / n. The probe has
    # put the random mass `total` on the others, so that (1 - k / n) / total is the factor.
    left = 1 - known.sum(1, keepdim=True, dtype=rule.weights.dtype) / n
    total = others.sum(1, keepdim=True)
    scale = torch.where(total > 0, left / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    return torch.where(known, 1 / n, others * scale)


def distance_bound(rule: Rule, n: int, low: float, high: float, level: float) -> float:
    """Return a bound of the Wasserstein distance of the masses from the spectrum.

    The distance is at most that of the masses from the measures of the probes, which the nodes
    enclose between each other, plus that of the measures from the spectrum. The integral of the
    pointwise bounds of the distribution function, as in `Density.cdf_bounds`, bounds the latter.

    Args:
        rule: Gauss rules of probes on the sphere, with known residuals.
        n: Dimension of the matrix.
        low: Lower end of the spectrum.
        high: Upper end of the spectrum.
        level: Probability of the bound.

    Source: Chen, Trogdon and Ubaru 2021, arXiv 2105.06595.
    """
    assert rule.residuals is not None
    weights, known = masses(rule, n), simple(rule, n)
    random = torch.where(known, 0.0, weights)
    probes, left = len(weights), float(random.sum()) / len(weights)
    total = 0.0
    if left > 0:
        nodes, order = rule.nodes.flatten().sort()
        # The mean share of P probes up to x has the distribution Beta(P F n / 2, P (1 - F) n / 2)
        # without the converged eigenvalues, and n is then their number less.
        share = (random.flatten()[order].cumsum(0)[:-1] / (probes * left)).clamp(0, 1)
        tail, scale = (1 - level) / 2, round(probes * n * left)
        above = largest_share(share, tail, scale) - share
        below = largest_share(1 - share, tail, scale) - (1 - share)
        total += left * float(torch.maximum(above, below).clamp_min(0) @ nodes.diff())
    for row, mass, fixed, residual, exact in zip(
        rule.nodes, weights, known, rule.residuals, rule.exact, strict=True
    ):
        if bool(exact):
            continue
        # A simple eigenvalue lies within the residual; between two others, the distribution
        # functions differ by at most the larger weight.
        total += float(residual[fixed].sum()) / n / probes
        others = ~fixed & (mass > 0)
        inner, inside, off = row[others], mass[others], residual[others]
        if len(inner):
            # Beyond the outermost other value there are only simple ones, up to its residual.
            start = max(low, float(inner[0] - off[0])) if bool(fixed[0]) else low
            end = min(high, float(inner[-1] + off[-1])) if bool(fixed[mass > 0][-1]) else high
            edges = torch.tensor([start, end], dtype=torch.float64, device="cpu")
            widths = torch.cat([edges[:1], inner, edges[1:]]).diff().clamp_min(0)
            padded = torch.nn.functional.pad(inside, (1, 1))
            total += float(widths @ torch.maximum(padded[1:], padded[:-1])) / probes
    return total
