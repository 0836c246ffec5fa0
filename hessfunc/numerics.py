"""Precision of scalars and products, numbers that are not finite, and names of devices."""

from __future__ import annotations

import torch
from torch import Tensor

# Dtypes of 16 bits, in which sums and statistics lose small terms.
NARROW = (torch.bfloat16, torch.float16)


class NonFiniteError(FloatingPointError, ValueError):
    """Numbers are NaN or infinite where finite ones are needed."""


def widened(x: Tensor, /) -> Tensor:
    """Return x in the dtype in which torch computes statistics, float32 at least."""
    return x.float() if x.dtype in NARROW else x


def wide_dtype(device: torch.device, /) -> torch.dtype:
    """Return float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def indexed(device: torch.device | str, /) -> torch.device:
    """Return a device as tensors name it, ``cuda:0`` for ``cuda``, so that two can be compared."""
    return torch.empty(0, dtype=torch.uint8, device=device).device


def cosines(like: Tensor, /, step: float = 1.0) -> Tensor:
    """Return a fixed vector without zeros, cos(step), cos(2 step), ..., in the shape of a tensor.

    It stands for a random direction where a test must give the same result in every run.
    """
    entries = torch.arange(1, like.numel() + 1, dtype=torch.float32, device=like.device)
    return entries.mul_(step).cos_().to(like).view(like.shape)


# A larger eps belongs to 16-bit leaves. Sums over them accumulate in float32, so that only the
# result is rounded to 16 bits.
_HALF_PRECISION = 1e-4


def rounding(eps: float, largest: float, /) -> float:
    """Return the expected rounding error of the product with a unit vector.

    Args:
        eps: Machine epsilon of the dtype of the products.
        largest: Estimate of the largest absolute eigenvalue.
    """
    return (30 if eps < _HALF_PRECISION else 2) * eps * largest
