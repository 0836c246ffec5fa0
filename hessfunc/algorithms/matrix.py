"""Matrices and blocks of matrices, from products with unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.products import Products
from hessfunc.display import Reported, reporting
from hessfunc.memory import AT_ONCE, available_memory
from hessfunc.options import at_least
from hessfunc.selection import Pattern, selected
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Matvec, Tree


@options.validated(callback=options.function_of(2, "(columns so far, all columns)"))
def matrix(
    matvec: Matvec,
    like: Tree,
    *,
    rows: Pattern | Sequence[int] | None = None,
    columns: Pattern | Sequence[int] | None = None,
    chunk_size: int | None = None,
    callback: Callable[[int, int], object] | None = None,
    progress: Reported = None,
) -> Tensor:
    """Materialise a matrix, or a block of it.

        A[i, j] = (A e_j)_i

    The indices i and j are those of a flat vector, as in `ravel`. For a symmetric matrix, make the
    smaller selection the columns, and transpose the result. The inverse function is `dense`, for
    ``(A + A.T) / 2``, since products are symmetric only up to rounding.

    The exact diagonal of a small part is ``matrix(..., rows=part, columns=part).diagonal()``. If
    the matvec is the curvature of a loss, `split` and `hold` give a diagonal block with cheaper
    products, as the matrix of the loss of the chosen parameters.

    Examples:
        >>> loss = lambda params, batch: params["a"].prod() * params["b"].sum()
        >>> params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
        >>> hf.matrix(hf.hvp(loss)(params, None), params, rows="a")
        tensor([[0., 3., 2.],
                [3., 0., 1.]])

    Args:
        matvec: Function from a block of vectors to the block of their products with A.
        like: Tree with the structure of a vector, such as the parameters.
        rows: Rows of the block: a pattern over leaves, as in `split`, or indices of the flat
            vector. By default all rows.
        columns: Columns of the block, selected like the rows. By default all columns.
        chunk_size: Number of unit vectors in one call of the matvec; None for chunks of at most
            2^24 entries.
        callback: Function of the number of columns so far and of all columns, called after each
            chunk, for a progress bar.
        progress: Function of a `Progress`, called after each chunk; True for a bar or lines, as in
            `RunOptions`.

    Returns:
        Dense tensor ``(rows, columns)``, in the dtype of the vectors, float32 at least. A pattern
        selects in the order of the flat vector, and indices in their own order.

    Raises:
        MemoryError: If the matrix and the products of a chunk do not fit in free memory. The
            message contains the memory that they need.
        ValueError: If a pattern chooses no leaf, or if an index is out of range.
        FloatingPointError: If a product is not finite.

    Cost: one matvec per column. Memory: the matrix, and 3 vectors per column of a chunk, besides
    those of a product.
    """
    at_least(1, chunk_size=chunk_size)
    products = replace(Products.of(matvec, like), limits=None)
    space = products.space
    i, j = _indices(space, like, rows, "rows"), _indices(space, like, columns, "columns")
    size = min(len(j), chunk_size or max(1, AT_ONCE // space.n))
    _refuse_unless_fits(space, len(i), len(j), size)
    dense = torch.empty(len(i), len(j), dtype=rows_dtype(space), device=space.device)
    done = 0
    with reporting(progress, "matrix", total=len(j), unit="columns") as report:
        for images in unit_products(products.as_given, space, j, size):
            dense[:, done : done + len(images)] = space.entries(images, i).mT
            done += len(images)
            if report is not None:
                report(done)
            if callback is not None:
                callback(done, len(j))
    return dense


def unit_products(
    multiply: Callable[[Tensor], Tensor], space: Space, columns: Tensor, size: int, /
) -> Iterator[Tensor]:
    """Yield the products with the unit vectors of these columns, ``size`` of them at a time."""
    for chunk in columns.split(size):
        yield multiply(space.units(chunk, rows_dtype(space)))


def _indices(space: Space, like: Tree, chosen: Pattern | Sequence[int] | None, what: str) -> Tensor:
    """Return selected indices of the flat vector."""
    everything = torch.arange(space.n, device=space.device)
    if chosen is None:
        return everything
    if isinstance(chosen, tuple):
        outside = [index for index in chosen if not 0 <= index < space.n]
        if outside:
            raise ValueError(
                f"{what} contains the index {outside[0]}, but the vectors have {space.n} entries: "
                f"pass indices from 0 to {space.n - 1}"
            )
        return torch.tensor(chosen, dtype=torch.long, device=space.device)
    leaves = dict(zip(space.names, space.tree_leaves(like), strict=True))
    wanted = selected(leaves, cast("Pattern", chosen))
    begins = accumulate(space.sizes, initial=0)
    spans = zip(space.names, begins, space.sizes, strict=False)
    return torch.cat(
        [everything[begin : begin + size] for name, begin, size in spans if name in wanted]
    )


def _refuse_unless_fits(space: Space, rows: int, columns: int, size: int) -> None:
    """Raise MemoryError if the matrix and a chunk of products do not fit in free memory."""
    itemsize = torch.finfo(rows_dtype(space)).bits // 8
    needed = (rows * columns + 3 * size * space.widest) * itemsize
    free = space.least(available_memory(space.device))
    if needed > free:
        raise MemoryError(
            f"{rows} x {columns} entries of the matrix, with {size} products at a time, take "
            f"{needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free: select a block "
            "with `rows` and `columns`, or use products only, as in `lanczos`"
        )
