"""Rayleigh-Ritz approximation of eigenpairs, and the order in which they are wanted."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

# Smaller than any distance of two Ritz values that matters.
_TINY = 1e-300

Which: TypeAlias = Literal["LM", "LA", "SA", "BE", "nearest"]


def rayleigh_ritz(projected: Tensor, /) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of a matrix, ascending, and their coefficients in a basis.

        T Y = Y diag(values),  T = V A V'

    The Ritz vectors are the rows of Y'V.

    Args:
        projected: Matrix T of inner products of orthonormal rows V with their products, ``(m, m)``.
            Rounding may make it asymmetric.

    Returns:
        Values ``(m,)`` and columns Y ``(m, m)``, in float64 on the CPU.
    """
    projected = projected.cpu().double()
    values, coefficients = torch.linalg.eigh((projected + projected.mT) / 2)
    return values, coefficients


def preferred(which: Which, values: Tensor, /) -> Tensor:
    """Return the indices of ascending values, the most wanted first."""
    last = len(values) - 1
    if which == "LM":
        return values.abs().argsort(descending=True)
    if which == "BE":
        order = [i // 2 if i % 2 else last - i // 2 for i in range(last + 1)]
        return torch.tensor(order, dtype=torch.int64, device="cpu")
    ascending = torch.arange(last + 1, device="cpu")
    return ascending if which == "SA" else ascending.flip(0)


def wanted(which: Which, values: Tensor, k: int, /) -> Tensor:
    """Return the indices of the k wanted among ascending values, in the order of a result."""
    indices = preferred(which, values)[:k]
    return indices.sort(descending=True).values if which == "BE" else indices


def have_converged(
    values: Tensor, residuals: Tensor, /, *, rtol: float, atol: float, floor: float
) -> Tensor:
    """Return whether residuals are within the tolerance, or values and residuals are rounding.

    residual <= max(rtol |value|, atol)   or   |value| <= floor and residual <= floor
    """
    sizes = values.abs()
    within = residuals <= (rtol * sizes).clamp_min(atol)
    return within | ((sizes <= floor) & (residuals <= floor))


def kept_by_restart(values: Tensor, wanted: Tensor, unconverged: Tensor, /, *, room: int) -> Tensor:
    """Return the indices of the Ritz values that a restart keeps: L lowest and R highest ones.

    A Krylov space of s steps damps the eigenvectors of an interval [c - h, c + h] against that of a
    value v outside by the Chebyshev polynomial T_s((v - c) / h), whose logarithm is close to
    s acosh(|v - c| / h). With the discarded values v[L], ..., v[m-1-R] as the interval, L and R
    maximise

        (m - 1 - L - R) acosh(|v - c| / h)

    for the outermost value v that has not converged, or for the slower one of those at both ends.

    Args:
        values: Ritz values, ascending, ``(m,)``.
        wanted: Indices of the wanted values, which are kept: some from each end.
        unconverged: Indices of the wanted values that have not converged. If there are none, the
            wanted values alone are kept.
        room: Largest number of values that can be kept.

    Source: Stathopoulos, Saad and Wu 1998, Dynamic thick restarting of the Davidson and the
    implicitly restarted Arnoldi methods; Wu and Simon 2000.
    """
    m = len(values)
    is_wanted = torch.zeros(m, dtype=torch.bool, device="cpu").index_fill(0, wanted, True)
    least_low = int(is_wanted.long().cumprod(0).sum())
    least_high = len(wanted) - least_low
    low = torch.arange(least_low, m, device="cpu")[:, None]
    high = torch.arange(least_high, m, device="cpu")[None]
    discarded = m - low - high
    possible = (discarded >= 2) & (low + high <= room)
    if not (len(unconverged) and bool(possible.any())):
        return wanted[:room]
    first, last = values[low], values[m - 1 - high]
    radius = ((last - first) / 2).clamp_min(_TINY)
    ends = unconverged[unconverged < least_low], unconverged[unconverged >= least_low]
    targets = values[torch.cat([ends[0].sort().values[:1], ends[1].sort().values[-1:]])]
    centre = (first + last) / 2
    ratio = ((targets[:, None, None] - centre).abs() / radius).amin(0)
    gain = (discarded - 1) * ratio.clamp_min(1).acosh()
    best = int(torch.where(possible, gain, -1.0).argmax())
    lowest, highest = least_low + best // gain.shape[1], least_high + best % gain.shape[1]
    indices = torch.arange(m, device="cpu")
    return torch.cat([indices[:lowest], indices[m - highest :]])
