"""Orthonormal bases that grow in a workspace, and the only Gram-Schmidt process.

A basis may have a coarser dtype than the vectors, and may lie on another device. It is converted a
few columns at a time, so that the whole basis is never copied. A basis on another device is copied
in pieces, and each piece serves all operations that need it before the next one replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from hessfunc.algorithms.offload import (
    brought,
    column_pieces,
    is_far,
    is_ready,
    pieces,
    row_pieces,
    settled,
    workspace,
    written,
)
from hessfunc.numerics import wide_dtype
from hessfunc.spaces.inner_products import gram
from hessfunc.spaces.space import DIVIDED, Rows, Space

# Number of entries that are converted or rotated at once; they fit in the cache.
_PIECE = 2**20
# A direction shorter than this part of the longest one may consist of rounding errors.
_UNEVEN = 0.1
# Number of entries whose products are summed in float32, before these sums are added in float64.
_RUN = 2**14


@dataclass(frozen=True)
class Basis:
    """Orthonormal rows V that grow in a workspace.

    The rows have the dtype and the device in which the basis is kept. All arguments and results of
    the methods have the dtype of the caller, on the device of the space.

    Attributes:
        rows: Rows V, ``(m, n)``; or the rows of p bases of one length, ``(m, p, n)``.
    """

    rows: Rows = field(metadata=DIVIDED)

    @classmethod
    def empty(cls, space: Space, dtype: torch.dtype, device: torch.device, /) -> Basis:
        """Return a basis without rows, in this dtype on this device."""
        return cls(torch.empty(0, space.width, dtype=dtype, device=device))

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, part: slice, /) -> Basis:
        """Return the basis of some of the rows, as a view."""
        return Basis(self.rows[part])

    def of(self, i: int, /) -> Basis:
        """Return the i-th of several bases, as a view."""
        return Basis(self.rows[:, i])

    def on(self, device: torch.device, /) -> Basis:
        """Return the basis on this device."""
        return self if self.rows.device == device else Basis(self.rows.to(device))

    def settle(self, space: Space, /) -> None:
        """Wait until all rows are written, so that the host can read them."""
        settled(self.rows, space.device)

    def brought(self, space: Space, /) -> Tensor:
        """Return all rows on the device of the space, copied only from another device."""
        return brought(self.rows, space.device)

    def append(self, rows: Tensor, capacity: int, /) -> Basis:
        """Return the basis with more rows, in its own memory if that has room for ``capacity``.

        Only the memory behind the basis is written. A state that holds the basis therefore stays
        valid when its successor holds the longer one, as long as it has only one successor.
        """
        basis, size, shape = self.rows, self.rows.shape[0], self.rows.shape[1:]
        total = size + rows.shape[0]
        room = max(capacity, total)
        needed = room * shape.numel() * basis.itemsize
        has_room = basis.untyped_storage().nbytes() >= needed and is_ready(basis, rows.device)
        if not size or not has_room:
            settled(basis, rows.device)
            longer = workspace(basis, (room, *shape), rows.device)
            longer[:size] = basis
            basis = longer
        longer = basis.as_strided((total, *shape), basis.stride())
        written(longer[size:], rows)
        return Basis(longer)

    def combine(self, space: Space, coefficients: Tensor, dtype: torch.dtype, /) -> Tensor:
        """Return the combinations ``coefficients @ V``, shape ``(j, n)``."""
        coefficients = coefficients.to(space.device, dtype)
        if is_far(self.rows.device, space.device):
            return self._combined_by_pieces(space, coefficients)
        if self.rows.dtype == dtype:
            return coefficients @ self.rows
        total = space.zeros(len(coefficients), dtype)
        for columns, part in _by_columns(space, total, self.rows):
            columns.addmm_(coefficients, part)
        return total

    def _combined_by_pieces(self, space: Space, coefficients: Tensor) -> Tensor:
        total, begin = space.zeros(len(coefficients), coefficients.dtype), 0
        for part in pieces(row_pieces(space, self.rows), space.device):
            total.addmm_(coefficients[:, begin : begin + len(part)], part.to(total.dtype))
            begin += len(part)
        return total

    def rotate(self, space: Space, rotation: Tensor, dtype: torch.dtype, /) -> Basis:
        """Return the basis of ``rotation' V``, which overwrites the first rows.

        Args:
            space: Space of the vectors.
            rotation: Orthonormal columns, ``(m, j)``.
            dtype: Dtype in which the products are computed.
        """
        first = self.rows[: rotation.shape[1]]
        rotation = rotation.mT.to(space.device, dtype)
        if is_far(self.rows.device, space.device):
            return self._rotated_by_pieces(space, rotation)
        for columns in self.rows.split(_PIECE // len(self.rows) + 1, dim=1):
            columns[: len(first)] = rotation @ columns.to(dtype)
        # Rounding would make the lengths drift away from 1 over many restarts.
        first /= space.norms(first).to(first.dtype)[:, None]
        return Basis(first)

    def _rotated_by_pieces(self, space: Space, rotation: Tensor) -> Basis:
        k = len(rotation)
        targets = column_pieces(self.rows)
        for target, columns in zip(targets, pieces(targets, space.device), strict=True):
            # The result is put into the buffer of the piece: new memory for each piece would
            # accumulate until its copy has run.
            columns[:k] = rotation @ columns.to(rotation.dtype)
            written(target[:k], columns[:k])
        targets = row_pieces(space, self.rows[:k])
        for target, rows in zip(targets, pieces(targets, space.device), strict=True):
            rows /= space.norms(rows).to(rows.dtype)[:, None]
            written(target, rows)
        return Basis(self.rows[:k])


def project_out(space: Space, rows: Tensor, *bases: Basis) -> Tensor:
    """Subtract from rows W their projections on bases V, in place, and return the coefficients.

        W <- W - C V,  C = W V'

    Args:
        space: Space of the vectors.
        rows: Rows W, ``(k, n)``.
        bases: Bases that are orthogonal to each other.

    Returns:
        Coefficients C for all bases one after another, ``(k, m)``.
    """
    if len(bases) > 1 or not len(bases[0]):
        bases = tuple(basis for basis in bases if len(basis))
        if not bases:
            return rows.new_zeros(len(rows), 0, dtype=wide_dtype(rows.device))
    if len(bases) == 1 and _is_alike(bases[0], rows):
        alone = space.gram(rows, bases[0].rows, run=_RUN)
        rows.addmm_(alone.to(rows.dtype), bases[0].rows, alpha=-1)
        return alone
    if any(is_far(basis.rows.device, rows.device) for basis in bases):
        return _project_out_by_pieces(space, rows, *bases)
    coefficients = [_coefficients(space, rows, basis.rows) for basis in bases]
    for along, basis in zip(coefficients, bases, strict=True):
        _subtract(space, rows, along, basis)
    return coefficients[0] if len(bases) == 1 else torch.cat(coefficients, dim=1)


def _is_alike(basis: Basis, rows: Tensor) -> bool:
    """Return whether a basis needs no conversion beside rows."""
    return basis.rows.dtype == rows.dtype and not is_far(basis.rows.device, rows.device)


def _subtract(space: Space, rows: Tensor, coefficients: Tensor, basis: Basis) -> None:
    """Subtract combinations of a basis from rows, in place."""
    if _is_alike(basis, rows):
        rows.addmm_(coefficients.to(rows.dtype), basis.rows, alpha=-1)
        return
    if is_far(basis.rows.device, rows.device):
        rows -= basis.combine(space, coefficients, rows.dtype)
        return
    for columns, part in _by_columns(space, rows, basis.rows):
        columns.addmm_(coefficients.to(rows.dtype), part, alpha=-1)


def _project_out_by_pieces(space: Space, rows: Tensor, *bases: Basis) -> Tensor:
    """Project out by the modified block Gram-Schmidt process, which reads each row once.

    For orthonormal rows its rounding is no larger than that of the classical process.
    """
    coefficients = []
    for part in chain.from_iterable(_by_rows(space, basis.rows, rows.device) for basis in bases):
        part = part.to(rows.dtype)
        coefficients.append(space.gram(rows, part, run=_RUN))
        rows.addmm_(coefficients[-1].to(rows.dtype), part, alpha=-1)
    return torch.cat(coefficients, dim=1)


def orthonormal(
    space: Space,
    rows: Tensor,
    *bases: Basis,
    threshold: Callable[[float], float],
    predicted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalise rows against each other and against bases V.

        W = F' Q + C V,  Q Q' = I,  Q V' = 0

    Two projections are enough (Kahan; Parlett 1980): the second one removes the rounding of the
    first. A third projection follows if the second one removed more than the length of the shortest
    remaining direction, or if the remaining rows are nearly dependent. Coefficients that a
    recurrence predicts replace the first projection, and with it half of the cost, since the second
    one removes their errors. The directions Q come from
    the eigenvectors of the Gram matrix of the remainder, so that directions of rounding errors are
    the short ones. There is one transfer to the host, or two with a third projection.

    Args:
        space: Space of the vectors.
        rows: Rows W, ``(k, n)``; they are overwritten.
        bases: Bases V, orthogonal to each other.
        threshold: Function from the length of the longest row to the length below which a
            direction outside of the bases is left out.
        predicted: Approximate coefficients C of the last t rows of the last basis, ``(k, t)``. The
            other ones are about zero.

    Returns:
        Rows Q, ``(r, n)``, and the coefficients F, ``(r, k)``, and C, ``(k, m)``, in float64 on the
        CPU.
    """
    if predicted is None:
        before = project_out(space, rows, *bases)
    else:
        known = predicted.shape[1]
        _subtract(space, rows, predicted, bases[-1][len(bases[-1]) - known :])
        earlier = sum(map(len, bases)) - known
        before = torch.cat([predicted.new_zeros(len(rows), earlier), predicted], dim=1)
    rows, factor, inner, is_rounded = _directions(space, rows, before, bases, threshold)
    if is_rounded:
        # W = F' R + C V and R = F_2' Q + C_2 V: W = (F_2 F)' Q + (C + F' C_2) V.
        none = before.new_zeros(len(rows), before.shape[1])
        rows, second, left, _ = _directions(space, rows, none, bases, lambda _: 0.0)
        factor, inner = second @ factor, inner + factor.mT @ left
    return rows, factor, inner


def _directions(
    space: Space,
    rows: Tensor,
    before: Tensor,
    bases: Sequence[Basis],
    threshold: Callable[[float], float],
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Project rows once more, and return the directions of the remainder.

    Args:
        space: Space of the vectors.
        rows: Rows after a first projection with the coefficients ``before``; they are overwritten.
        before: Coefficients of the first projection, ``(k, m)``.
        bases: Bases V.
        threshold: Function as in `orthonormal`.

    Returns:
        Q, F and C as in `orthonormal`, and whether rounding may have left a part of V in Q.
    """
    again = project_out(space, rows, *bases)
    numbers = torch.cat([before, again, space.gram(rows, rows)], dim=1).cpu().double()
    width = before.shape[1]
    taken, left, squares = numbers.split_with_sizes([width, width, len(rows)], dim=1)
    whole = (taken.square().sum(1) + squares.diagonal()).max().sqrt()
    least = threshold(float(whole))
    if len(squares) == 1:
        # R = L Q for a single row R, without the operations on small matrices below.
        length = max(0.0, float(squares)) ** 0.5
        factor = squares.new_full((1, 1), length)
        unit = rows.div_(length) if length > least else rows[:0]
        factor = factor[: unit.shape[0]]
        is_rounded = least < length < float(torch.linalg.vector_norm(left))
        return unit, factor, taken + left, is_rounded
    # R R' = U L^2 U' for the remainder R: Q = L^-1 U'R is orthonormal, and R = U L Q.
    squares, rotation = torch.linalg.eigh(squares)
    lengths = squares.clamp_min(0).sqrt()
    longest = float(lengths[-1])
    # Lengths ascend.
    short = int((lengths <= max(least, 1e-6 * longest)).sum())
    rotation, lengths = rotation[:, short:], lengths[short:]
    rounded = max(float(torch.linalg.vector_norm(left)), _UNEVEN * longest)
    return (
        space.combine((rotation / lengths).mT, rows),
        (rotation * lengths).mT,
        taken + left,
        bool(len(lengths)) and float(lengths[0]) < rounded,
    )


def _coefficients(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    parts = _by_columns(space, rows, basis)
    products = [gram(columns, part, run=_RUN) for columns, part in parts]
    return space.summed(products[0] if len(products) == 1 else torch.stack(products).sum(0))


def _by_columns(space: Space, rows: Tensor, basis: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield corresponding columns of the rows and of a basis, in the dtype of the rows."""
    if basis.dtype == rows.dtype:
        yield rows, basis
        return
    width = _PIECE // max(len(basis), 1) + 1
    for begin in range(0, max(space.width, 1), width):
        columns = slice(begin, begin + width)
        yield rows[:, columns], basis[:, columns].to(rows.dtype)


def _by_rows(space: Space, basis: Tensor, used: torch.device) -> Iterator[Tensor]:
    """Yield the rows of a basis on the device of use: in pieces from another device, or all."""
    if is_far(basis.device, used):
        return pieces(row_pieces(space, basis), used)
    return iter([basis])
