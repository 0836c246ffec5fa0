"""Traces and diagonals of small matrices, from the products of all unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.algorithms.norms import squared_frobenius, squared_row_norms
from hessfunc.algorithms.results import DiagonalEstimate, Estimate
from hessfunc.algorithms.rounds import Products, products_eps, rows_dtype
from hessfunc.trees import Space

__all__ = ["exact_diagonal", "exact_trace", "is_small"]

# So many products an estimate takes at least: below, all unit vectors cost less.
_FEW = 20


def is_small(products: Products, max_matvecs: int, /) -> bool:
    """Whether all unit vectors are the better probes."""
    return products.space.n <= min(_FEW, max_matvecs)


def exact_trace(products: Products, seed: int, /) -> Estimate:
    """The trace up to rounding, in n matvecs."""
    space, rows, images, rounding = _products(products)
    parts = space.by_leaf(rows, images).sum(0).cpu().double()
    squares = space.norms(images).cpu().double().square().sum()
    return Estimate(
        value=float(parts.sum()),
        stderr=rounding,
        degrees=space.n,
        samples=parts.sum()[None],
        by_leaf=dict(zip(space.names, parts.tolist(), strict=True)),
        squared_frobenius=squared_frobenius(squares.expand(2), products, seed),
        **products.cost("exact: all unit vectors were multiplied", seed),
    )


def exact_diagonal(products: Products, seed: int, /) -> DiagonalEstimate:
    """The diagonal up to rounding, in n matvecs."""
    space, rows, images, rounding = _products(products)
    diagonal = (rows * images).sum(0)
    squares = images.double().square().sum(0)
    return DiagonalEstimate(
        value=space.unravel(diagonal),
        stderr=space.unravel(torch.full_like(diagonal, rounding)),
        degrees=space.n,
        squared_row_norms=squared_row_norms(squares, 0 * squares, space.n, products, seed),
        **products.cost("exact: all unit vectors were multiplied", seed),
    )


def _products(products: Products) -> tuple[Space, Tensor, Tensor, float]:
    space = products.space
    dtype = rows_dtype(space)
    rows = space.units(dtype)
    images = products(rows)
    return space, rows, images, 10 * products_eps(space, dtype) * float(space.norms(images).max())
