"""The precision in which scalars are accumulated."""

from __future__ import annotations

import torch


def wide_dtype(device: torch.device, /) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


# Coarser products come from leaves of 16 bits: those are rounded once, not in every sum.
_HALF_PRECISION = 1e-4


def rounding(eps: float, largest: float, /) -> float:
    """The size of the rounding error of a product with a unit vector.

    Args:
        eps: of the dtype in which products are made.
        largest: the largest absolute eigenvalue, as far as it is known.
    """
    return (30 if eps < _HALF_PRECISION else 2) * eps * largest
