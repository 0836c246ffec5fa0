"""The precision in which scalars are accumulated."""

from __future__ import annotations

import torch

__all__ = ["wide_dtype"]


def wide_dtype(device: torch.device, /) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
