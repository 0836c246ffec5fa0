"""What is said of pairs that have not converged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from hessfunc.algorithms.results import Eigenpairs, rounding

__all__ = ["warn_of_residuals"]


def warn_of_residuals(found: Sequence[Eigenpairs], tol: float, /, *, budget: str) -> None:
    """Warn the caller's caller of residuals above tol times the value, and above rounding.

    Args:
        found: of one matrix.
        tol: relative to the value.
        budget: the option that allows for more products.
    """
    eps = torch.finfo(found[0].vectors.dtype).eps
    floor = rounding(eps, max(pairs.largest for pairs in found))
    values, residuals = (
        torch.cat([getattr(pairs, name) for pairs in found]) for name in ("values", "residuals")
    )
    missing = residuals > (tol * values.abs()).clamp(min=floor)
    if missing.any():
        warnings.warn(
            f"{int(missing.sum())} of {len(missing)} pairs have not converged, with residuals of "
            f"up to {float(residuals[missing].max()):.1e}: raise `{budget}`",
            stacklevel=4,
        )
