"""Orthonormal rows that grow in a workspace of fixed size.

A basis may be kept in a coarser dtype than the rows that are worked on. It is then converted a
few columns at a time, so that no copy of it is ever made. It may be kept on another device, from
which it comes a few rows at a time; each of these is used for all it is good for while it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from hessfunc.algorithms.offload import (
    column_pieces,
    is_far,
    is_ready,
    pieces,
    row_pieces,
    settled,
    workspace,
    written,
)
from hessfunc.spaces.space import Space

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
    needed = room * shape.numel() * basis.itemsize
    has_room = basis.untyped_storage().nbytes() >= needed and is_ready(basis, rows.device)
    if not size or not has_room:
        settled(basis, rows.device)
        longer = workspace(basis, (room, *shape), rows.device)
        longer[:size] = basis
        basis = longer
    longer = basis.as_strided((total, *shape), basis.stride())
    written(longer[size:], rows)
    return longer


def removed(space: Space, rows: Tensor, *bases: Tensor) -> Tensor:
    """Take the parts along orthonormal bases out of the rows, in place: their coefficients."""
    if any(is_far(basis.device, rows.device) for basis in bases):
        return _removed_by_pieces(space, rows, *bases)
    found = [_coefficients(space, rows, basis) for basis in bases]
    for coefficients, basis in zip(found, bases, strict=True):
        for columns, part in _by_columns(space, rows, basis):
            columns.addmm_(coefficients.to(rows.dtype), part, alpha=-1)
    return torch.cat(found, dim=1)


def _removed_by_pieces(space: Space, rows: Tensor, *bases: Tensor) -> Tensor:
    """The same where bases come from afar, once, not twice: the modified Gram-Schmidt of blocks.

    What it leaves along rows that are orthonormal is no more than what the classical one leaves.
    """
    found = []
    for part in chain.from_iterable(_by_rows(space, basis, rows.device) for basis in bases):
        part = part.to(rows.dtype)
        found.append(space.gram(rows, part, run=_RUN))
        rows.addmm_(found[-1].to(rows.dtype), part, alpha=-1)
    return torch.cat(found, dim=1)


def combined(space: Space, coefficients: Tensor, basis: Tensor, dtype: torch.dtype, /) -> Tensor:
    """The combinations ``coefficients @ basis``, shape ``(j, n)``."""
    coefficients = coefficients.to(space.device, dtype)
    if is_far(basis.device, space.device):
        return _combined_by_pieces(space, coefficients, basis)
    if basis.dtype == dtype:
        return coefficients @ basis
    rows = space.zeros(len(coefficients), dtype)
    for columns, part in _by_columns(space, rows, basis):
        columns.addmm_(coefficients, part)
    return rows


def _combined_by_pieces(space: Space, coefficients: Tensor, basis: Tensor) -> Tensor:
    rows, begin = space.zeros(len(coefficients), coefficients.dtype), 0
    for part in pieces(row_pieces(space, basis), space.device):
        rows.addmm_(coefficients[:, begin : begin + len(part)], part.to(rows.dtype))
        begin += len(part)
    return rows


def rotated(space: Space, rotation: Tensor, basis: Tensor, dtype: torch.dtype, /) -> Tensor:
    """The combinations ``rotation' basis``, of length 1, in the place of the first rows."""
    first = basis[: rotation.shape[1]]
    rotation = rotation.mT.to(space.device, dtype)
    if is_far(basis.device, space.device):
        return _rotated_by_pieces(space, rotation, basis)
    for columns in basis.split(_PIECE // len(basis) + 1, dim=1):
        columns[: len(first)] = rotation @ columns.to(dtype)
    # Lengths would drift away from 1 over many restarts.
    first /= space.norms(first).to(first.dtype)[:, None]
    return first


def _rotated_by_pieces(space: Space, rotation: Tensor, basis: Tensor) -> Tensor:
    k = len(rotation)
    targets = column_pieces(basis)
    for target, columns in zip(targets, pieces(targets, space.device), strict=True):
        # In the buffer that is there: more memory for each piece would pile up before the copies.
        columns[:k] = rotation @ columns.to(rotation.dtype)
        written(target[:k], columns[:k])
    targets = row_pieces(space, basis[:k])
    for target, rows in zip(targets, pieces(targets, space.device), strict=True):
        rows /= space.norms(rows).to(rows.dtype)[:, None]
        written(target, rows)
    return basis[:k]


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
    parts = _by_columns(space, rows, basis)
    found = [space.gram_here(columns, part, run=_RUN) for columns, part in parts]
    return space.summed(torch.stack(found).sum(0))


def _by_columns(space: Space, rows: Tensor, basis: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Corresponding columns of the rows and of the basis, in the rows' dtype."""
    if basis.dtype == rows.dtype:
        yield rows, basis
        return
    width = _PIECE // max(len(basis), 1) + 1
    for begin in range(0, max(space.width, 1), width):
        columns = slice(begin, begin + width)
        yield rows[:, columns], basis[:, columns].to(rows.dtype)


def _by_rows(space: Space, basis: Tensor, used: torch.device) -> Iterator[Tensor]:
    """A few rows of the basis after the other where they are used, or all that are there."""
    if is_far(basis.device, used):
        return pieces(row_pieces(space, basis), used)
    return iter([basis])
