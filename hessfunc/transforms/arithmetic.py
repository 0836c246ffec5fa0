"""Matvec -> matvec: sums, shifts, deflation, and matvecs of plain functions and matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfunc.trees import Matvec, Space, Tree, leaves, tree_map

__all__ = ["add", "apply", "batched", "deflate", "dense", "scale", "shift"]


def apply(matvec: Matvec, vector: Tree, /) -> Tree:
    """The product with one tree."""
    return tree_map(lambda leaf: leaf[0], matvec(tree_map(lambda leaf: leaf[None], vector)))


def shift(matvec: Matvec, s: float, /) -> Matvec:
    """A + s I."""
    return lambda block: tree_map(lambda out, v: out + s * v, matvec(block), block)


def scale(matvec: Matvec, a: float, /) -> Matvec:
    """a A."""
    return lambda block: tree_map(lambda out: a * out, matvec(block))


def add(*matvecs: Matvec) -> Matvec:
    """A + B + ..., of matrices on the same space."""
    if not matvecs:
        raise ValueError("add takes at least one matvec")

    def matvec(block: Tree) -> Tree:
        total = matvecs[0](block)
        for other in matvecs[1:]:
            total = tree_map(torch.add, total, other(block))
        return total

    return matvec


def deflate(matvec: Matvec, pairs: Any, /) -> Matvec:
    """A - sum_i values_i v_i v_i': the matrix with these eigenpairs moved to zero.

    Args:
        matvec: of A.
        pairs: an ``Eigenpairs``, or any object with ``values`` (k,) and an orthonormal block
            ``vectors``.
    """
    space = Space.of(tree_map(lambda leaf: leaf[0], pairs.vectors))
    basis = space.ravel(pairs.vectors)

    def deflated(block: Tree) -> Tree:
        inner = space.gram(space.ravel(block), basis)
        moved = space.combine(inner * pairs.values.to(inner), basis)
        return tree_map(torch.sub, matvec(block), space.unravel(moved))

    return deflated


def batched(fn: Callable[[Tree], Tree], /, *, chunk_size: int | None = None) -> Matvec:
    """The matvec of a function of one vector.

    Args:
        fn: tree -> tree, linear.
        chunk_size: how many vectors go through ``fn`` at once by vmap; None for the whole block;
            1 for a plain loop, which any ``fn`` survives.
    """
    if chunk_size != 1:
        return torch.vmap(fn, chunk_size=chunk_size)

    def matvec(block: Tree) -> Tree:
        rows = range(len(leaves(block)[0]))
        found = [fn(tree_map(lambda leaf, i=i: leaf[i], block)) for i in rows]
        return tree_map(lambda *out: torch.stack(out), *found)

    return matvec


def dense(matrix: Tensor, /) -> Matvec:
    """The matvec of a dense symmetric matrix, on flat vectors ``(n,)`` or on trees of n entries.

    Raises:
        ValueError: the matrix is not square, or not symmetric.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} is not square")
    tolerance = 10 * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    if not torch.allclose(matrix, matrix.mT, rtol=0, atol=float(tolerance)):
        raise ValueError("the matrix is not symmetric: take (A + A.T) / 2 if it should be")

    def matvec(block: Tree) -> Tree:
        space = Space.of(tree_map(lambda leaf: leaf[0], block))
        return space.unravel(space.ravel(block).to(matrix.dtype) @ matrix)

    return matvec
