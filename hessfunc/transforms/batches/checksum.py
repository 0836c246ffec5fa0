"""Checksum of the examples of a batch or a pass that does not depend on their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessfunc.containers import opened
from hessfunc.numerics import wide_dtype


class Checksum:
    """Checksum (count, sum p^2, sum (p + 1)^2) of all examples that were added.

    p is the projection of an example on a fixed direction. The sums of squares change if an example
    is left out, repeated, altered, or paired with another target. All terms are nonnegative, so
    nothing cancels, and rounding errors stay small in any order.

    Attributes:
        total: Checksum ``(3,)``.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, dtype=wide_dtype(device), device=device)

    def add(self, batch: Any) -> Tensor:
        """Add the examples of a batch, and return the checksum of the batch."""
        leaves, _ = opened(batch, "batch")
        tensors = [x for x in map(_numbers, leaves) if x is not None and x.dim() > 0 and len(x)]
        if not tensors:
            return torch.zeros_like(self.total)
        dtype, device = self.total.dtype, self.total.device
        projected = torch.zeros(len(tensors[0]), dtype=dtype, device=device)
        for i, tensor in enumerate(tensors):
            rows = tensor.reshape(len(tensor), -1).to(device, dtype)
            rows = rows.nan_to_num(nan=0.5, posinf=2.0, neginf=-2.0)
            entries = torch.arange(1, rows.shape[1] + 1, dtype=dtype, device=device)
            projection = rows @ torch.cos(entries * (i + 1.618))
            projected = projected + (
                projection if len(projection) == len(projected) else projection.sum()
            )
        added = torch.stack(
            [
                torch.ones_like(projected).sum(),
                projected.square().sum(),
                (projected + 1).square().sum(),
            ]
        )
        self.total += added
        return added


def _numbers(leaf: Any) -> Tensor | None:
    """Return a leaf as a dense tensor of real numbers, or None if it is no array of numbers."""
    if isinstance(leaf, np.ndarray):
        # torch has no tensors of dates and text.
        return torch.from_numpy(leaf) if leaf.dtype.kind in "biufc" else None
    if not isinstance(leaf, Tensor):
        return None
    leaf = leaf.detach()
    if leaf.is_nested:
        leaf = leaf.values() if leaf.layout == torch.jagged else torch.cat(leaf.unbind())
    elif leaf.layout != torch.strided:
        leaf = leaf.to_dense()
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def batch_key(seed: int, batch: Any, device: torch.device, /) -> tuple[int, ...]:
    """Return a key of random numbers that depends only on the seed and the examples."""
    checksum = Checksum(device)
    checksum.add(batch)
    return (seed, *checksum.total.cpu().double().view(torch.int64).tolist())
