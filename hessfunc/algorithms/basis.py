"""Orthonormal rows that grow in a workspace of fixed size.

A basis may be kept in a coarser dtype than the rows that are worked on. It is then converted a
few columns at a time, so that no copy of it is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hessfunc.trees import Space

__all__ = ["appended", "combined", "orthonormal", "removed", "rotated"]

# Entries that are converted or rotated at once: they stay in the cache.
_PIECE = 2**20
# Where the shortest direction is a smaller part of the longest, it is made of rounding errors.
_UNEVEN = 0.1
# Entries that are multiplied in float32 before they are summed in float64.
_RUN = 2**14


def appended(basis: Tensor, rows: Tensor, most: int, /) -> Tensor:
    """The basis with these rows behind, in its own memory where that has room for ``most`` rows.

    Nothing is written but what lies behind the basis. So a state that holds it stays as it was
    when its successor holds the longer one, as long as it has one successor.
    """
    size, total = len(basis), len(basis) + len(rows)
    room, shape = max(most, total), basis.shape[1:]
    if not size or basis.untyped_storage().nbytes() < room * shape.numel() * basis.itemsize:
        workspace = basis.new_empty(room, *shape)
        workspace[:size] = basis
        basis = workspace
    longer = basis.as_strided((total, *shape), basis.stride())
    longer[size:] = rows
    return longer


def removed(space: Space, rows: Tensor, *bases: Tensor) -> Tensor:
    """Take the parts along orthonormal bases out of the rows, in place: their coefficients."""
    found = [_coefficients(space, rows, basis) for basis in bases]
    for coefficients, basis in zip(found, bases, strict=True):
        for columns, part in _pieces(rows, basis):
            columns.addmm_(coefficients.to(rows.dtype), part, alpha=-1)
    return torch.cat(found, dim=1)


def combined(coefficients: Tensor, basis: Tensor, dtype: torch.dtype, /) -> Tensor:
    """The combinations ``coefficients @ basis``, shape ``(j, n)``."""
    if basis.dtype == dtype:
        return coefficients.to(basis) @ basis
    rows = basis.new_zeros(len(coefficients), basis.shape[1], dtype=dtype)
    for columns, part in _pieces(rows, basis):
        columns.addmm_(coefficients.to(rows), part)
    return rows


def rotated(space: Space, rotation: Tensor, basis: Tensor, dtype: torch.dtype, /) -> Tensor:
    """The combinations ``rotation' basis``, of length 1, in the place of the first rows."""
    first = basis[: rotation.shape[1]]
    rotation = rotation.mT.to(basis.device, dtype)
    for columns in basis.split(_PIECE // len(basis) + 1, dim=1):
        columns[: len(first)] = rotation @ columns.to(dtype)
    # Lengths would drift away from 1 over many restarts.
    first /= space.norms(first).to(first.dtype)[:, None]
    return first


def orthonormal(
    space: Space, rows: Tensor, *bases: Tensor, threshold: Callable[[float], float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows Q, orthogonal to the bases V, and F, C with ``rows = F' Q + C V``.

    Two projections are enough: the second takes away what rounding left of the first. Where that
    is as long as a row, or rows nearly depend on each other, a third one follows. Numbers go to
    the host once, or twice where there is a third.

    Args:
        space: of the rows.
        rows: worked on in place.
        bases: each of orthonormal rows, and orthogonal to one another.
        threshold: given the length of the longest row, below which length a direction outside of
            the bases is left out.

    Returns:
        Q, and F and C in float64 on the CPU.
    """
    width = sum(map(len, bases))
    inner = torch.zeros(len(rows), width, dtype=torch.float64, device="cpu")
    factor = torch.eye(len(rows), dtype=torch.float64, device="cpu")
    before = removed(space, rows, *bases)
    for turn in range(2):
        again = removed(space, rows, *bases)
        found = torch.cat([before, again, space.gram(rows, rows)], dim=1).cpu().double()
        taken, left, squares = found.split([width, width, len(rows)], dim=1)
        inner += factor.mT @ (taken + left)
        whole = (taken.square().sum(1) + squares.diagonal()).max().sqrt()
        least = 0.0 if turn else threshold(float(whole))
        squares, rotation = torch.linalg.eigh(squares)
        lengths = squares.clamp_min(0).sqrt()
        kept = lengths > max(least, 1e-6 * float(lengths[-1]))
        rounded = max(float(left.norm()), _UNEVEN * float(lengths[-1]))
        rotation, lengths = rotation[:, kept], lengths[kept]
        rows = space.combine((rotation / lengths).mT, rows)
        factor = (rotation * lengths).mT @ factor
        if not len(rows) or lengths[0] >= rounded:
            break
        before = torch.zeros_like(again[: len(rows)])
    return rows, factor, inner


def _coefficients(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    pieces = _pieces(rows, basis)
    found = [space.gram(columns, part, run=_RUN) for columns, part in pieces]
    return torch.stack(found).sum(0)


def _pieces(rows: Tensor, basis: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Corresponding columns of the rows and of the basis, in the rows' dtype."""
    if basis.dtype == rows.dtype:
        yield rows, basis
        return
    width = _PIECE // max(len(basis), 1) + 1
    for columns, part in zip(rows.split(width, 1), basis.split(width, 1), strict=True):
        yield columns, part.to(rows.dtype)
