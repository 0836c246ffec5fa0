"""Inner products and norms of flat rows, accurate for float32 rows of any length."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.numerics import wide_dtype

# Largest number of inner products that are computed entirely in float64.
_FEW_PRODUCTS = 4
# Number of entries that are converted to float64 at once, so that they stay in the cache.
_PIECE = 2**16
# Number of entries on other devices: for small pieces, the launch of kernels would dominate.
PIECE_OF_DEVICE = 2**22


def gram(rows: Tensor, others: Tensor, /, *, run: int) -> Tensor:
    """Return ``rows @ others.T`` in float64, with the accuracy of `Space.gram`.

    Args:
        rows: Rows ``(j, n)``.
        others: Rows ``(k, n)``.
        run: Number of entries whose products are summed in the dtype of the rows.
    """
    wide, (j, n), k = wide_dtype(rows.device), rows.shape, others.shape[0]
    if rows.dtype == wide:
        return rows @ others.to(wide).mT
    if j > k:
        # The kernels are twice as fast with the smaller number of rows on the left.
        return gram(others, rows, run=run).mT
    if j * k <= _FEW_PRODUCTS:
        return _wide_gram(rows, others)
    if n < run:
        return (rows @ others.mT).to(wide)
    whole = n // run * run
    left = rows[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    right = others[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    total = torch.bmm(left, right.mT).sum(0, dtype=wide)
    return total + rows[:, whole:] @ others[:, whole:].mT


def _wide_gram(rows: Tensor, others: Tensor) -> Tensor:
    # Work in pieces: a full float64 copy takes longer to allocate than to fill.
    wide = wide_dtype(rows.device)
    piece = _PIECE if rows.device.type == "cpu" else PIECE_OF_DEVICE
    if rows.shape[1] <= piece:
        return rows.to(wide) @ others.to(wide).mT
    total = torch.zeros(len(rows), len(others), dtype=wide, device=rows.device)
    for left, right in zip(rows.split(piece, 1), others.split(piece, 1), strict=True):
        total += left.to(wide) @ right.to(wide).mT
    return total


def norms(rows: Tensor, /) -> Tensor:
    """Return the 2-norm of each row in float64, shape ``(k,)``."""
    # Work in pieces, because `vector_norm` would convert the whole tensor to float64.
    wide = wide_dtype(rows.device)
    piece = _PIECE if rows.device.type == "cpu" else PIECE_OF_DEVICE
    if rows.dtype == wide or rows.numel() <= piece:
        return torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    if rows.shape[1] <= piece:
        parts = rows.split(piece // max(rows.shape[1], 1))
        return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in parts])
    parts = rows.split(piece, dim=1)
    lengths = [torch.linalg.vector_norm(part.to(wide), dim=1) for part in parts]
    return torch.linalg.vector_norm(torch.stack(lengths), dim=0)
