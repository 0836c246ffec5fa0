"""Eigenpairs of a matrix that has changed a little since its eigenpairs were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Eigenpairs, rounding
from hessfunc.algorithms.starts import of_starts
from hessfunc.spaces.space import Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree, tree_map

End = Literal["largest", "smallest"]

# Directions that may be added before the basis is cut back to its best vectors.
_ROOM = 8
# Directions that lose more of their length outside of the basis are rounding.
_SHORTEST = 1e-6
# The share of a random vector in the scout.
_STIRRED = 0.1


@dataclass(frozen=True, kw_only=True)
class Followed(Eigenpairs):
    """Eigenpairs, guards included, and where to look for others.

    Attributes:
        scout: a vector of a power iteration outside of these pairs, one step a point.
    """

    scout: Tree


def follow(
    matvec: Matvec,
    like: Tree,
    *,
    k: int,
    guards: int,
    end: End,
    rtol: float,
    max_matvecs: int,
    before: Followed | None,
    seed: int,
) -> Followed:
    """The k outermost eigenpairs, from the vectors of an earlier run, and some guards after them.

    Rayleigh-Ritz in the span of the earlier vectors; while one of the k has a residual
    |A v - value v| > rtol |value|, the residuals of those join the span. Every vector comes with
    its own product, so residuals are measured and nothing is multiplied twice. The guards, the
    next pairs, are not asked to converge: they see an eigenvalue that overtakes the k-th.

    A span that has no part in some eigenvector would never see it, however large its value grows.
    So one more vector is multiplied at each point, the scout: a power iteration outside of the
    pairs, to which a random vector is added, so that no direction is lost. It takes the place of a
    pair when its value is the larger one, some points after that has overtaken them.

    Cost: k + guards + 1 products where the earlier vectors still serve, and one more for each pair
    and step that do not; 2 (k + guards + 9) vectors of memory.

    Source: Davidson 1975, without a preconditioner; the restart: Stathopoulos, Saad and Wu 1998.
    """
    products = Products.of(matvec, like)
    space, dtype = products.space, rows_dtype(products.space)
    width = min(k + guards, space.n)
    fresh = space.probes(range(width + 1), kind="normal", seed=of_starts(seed), dtype=dtype)
    scout = _unit(space, fresh[-1:])
    if before is None:
        new = fresh
    else:
        scout = space.ravel(_block_of_one(before.scout), dtype=dtype) + _STIRRED * scout
        new = torch.cat([space.ravel(before.vectors, dtype=dtype), scout])
    basis = images = new[:0]
    new = _orthonormal(space, new, basis)
    eps, largest = products_eps(space, dtype), 0.0
    ahead = None
    while True:
        basis, images = torch.cat([basis, new]), torch.cat([images, products(new)])
        if ahead is None:
            ahead = space.combine(space.gram(scout, basis), images)
        values, rotation = _outermost(space.gram(basis, images), width, end)
        rows, moved = space.combine(rotation.mT, basis), space.combine(rotation.mT, images)
        residuals = moved - values.to(moved)[:, None] * rows
        lengths = space.norms(residuals).cpu()
        largest = max(largest, float(values.abs().max()))
        converged = lengths <= (rtol * values.abs()).clamp_min(rounding(eps, largest))
        open_ = torch.nonzero(~converged[:k]).flatten().to(residuals.device)
        if not len(open_):
            reason = "converged: all residuals are within the tolerance"
            break
        if products.matvecs + len(open_) > max_matvecs:
            reason = f"budget exhausted after {max_matvecs} matvecs"
            break
        if len(basis) + len(open_) > width + _ROOM:
            basis, images = rows, moved
        new = _orthonormal(space, residuals[open_], basis)
        if not len(new):
            reason = "the residuals lie in the basis up to rounding: take a looser rtol, or float64"
            break
    if end == "smallest" and float(space.gram(scout, ahead)) > 0:
        # Shifted, the smallest eigenvalues are the largest in absolute value.
        ahead = ahead - float(space.norms(ahead) / space.norms(scout)) * scout
    ahead = ahead - space.combine(space.gram(ahead, rows), rows)
    return Followed(
        scout=space.unravel(_unit(space, ahead if bool(ahead.any()) else fresh[-1:])[0]),
        values=values,
        vectors=space.unravel(rows),
        residuals=lengths,
        converged=converged,
        largest=largest,
        **products.cost(reason, seed),
    )


def _unit(space: Space, row: Tensor) -> Tensor:
    return row / space.norms(row).to(row)[:, None]


def _block_of_one(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf[None], tree)


def _outermost(projected: Tensor, width: int, end: End) -> tuple[Tensor, Tensor]:
    """Ritz values from the end inwards, and their vectors in the basis, as columns."""
    projected = projected.cpu().double()
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    if end == "largest":
        values, vectors = values.flip(0), vectors.flip(1)
    return values[:width], vectors[:, :width]


def _orthonormal(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows that span, with the basis, all that the rows span with it."""
    outside, _, _ = orthonormal(
        space, rows.clone(), Basis(basis), threshold=lambda longest: _SHORTEST * longest
    )
    return outside
