"""Spectral densities with known eigenvalues beside the nodes of probes in their complement.

For orthonormal vectors V with the values D and the residuals R = AV - VD, and P = I - VV', A
differs from the direct sum of D and PAP by R and its transpose. The probes of PAP give Gauss rules
of the n - k eigenvalues of the complement.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from hessfunc.algorithms.results.quadrature import Rule


class Nodes(TypedDict):
    """Fields of a `Density` that hold its nodes."""

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    deflated: Tensor | None


def with_eigenvalues(
    nodes: Tensor, weights: Tensor, residuals: Tensor, /, *, values: Tensor, errors: Tensor, n: int
) -> Nodes:
    """Return the nodes of probes of PAP and known eigenvalues, in ascending order.

    Args:
        nodes: Nodes of the probes, ``(p, m)``.
        weights: Their weights, which sum to 1 for each probe.
        residuals: Their residual norms.
        values: Known eigenvalues, ``(k,)``.
        errors: Lengths of their residuals.
        n: Dimension of the matrix.
    """
    probes, k = len(nodes), len(values)
    if not k:
        return Nodes(nodes=nodes, weights=weights, residuals=residuals, deflated=None)

    def beside(known: Tensor, sampled: Tensor) -> Tensor:
        return torch.cat([known.expand(probes, k), sampled], dim=1).gather(1, order)

    # tr f(A) / n is the sum of f(value) / n over V, and (n - k) / n times the mean over the
    # complement, which the rules of the probes give with weights of sum 1.
    order = torch.cat([values.expand(probes, k), nodes], dim=1).argsort(dim=1, stable=True)
    return Nodes(
        nodes=beside(values, nodes),
        weights=beside(torch.full_like(values, 1 / n), weights * (1 - k / n)),
        residuals=beside(errors, residuals),
        deflated=order < k,
    )


def shifts(values: Tensor, errors: Tensor, low: float, high: float) -> Tensor:
    """Return bounds of the errors of known eigenvalues, ``(k,)``.

    A residual r moves the eigenvalues by at most |r|, and by at most |r|^2 / gap if a gap separates
    the value from the eigenvalues of the complement (Mathias 1998).

    Args:
        values: Known eigenvalues, ``(k,)``.
        errors: Lengths of their residuals.
        low: Lower end of the eigenvalues of the complement.
        high: Upper end of the eigenvalues of the complement.
    """
    gaps = torch.maximum(low - values, values - high).clamp_min(0)
    return errors * torch.where(gaps > 0, errors / gaps, 1.0).clamp_max(1)


def complement(rule: Rule, deflated: Tensor, n: int, /) -> Rule:
    """Return the Gauss rules of PAP, without the known eigenvalues.

    Args:
        rule: Nodes with known eigenvalues.
        deflated: Whether each node is a known eigenvalue, bool ``(p, k + m)``.
        n: Dimension of the matrix.
    """
    p, k = len(deflated), int(deflated[0].sum())

    def rest(of: Tensor) -> Tensor:
        return of[~deflated].view(p, -1)

    residuals = None if rule.residuals is None else rest(rule.residuals)
    return Rule(rest(rule.nodes), rest(rule.weights) / (1 - k / n), residuals)
