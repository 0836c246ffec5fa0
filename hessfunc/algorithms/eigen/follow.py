"""Eigenpairs of a matrix that has changed a little since its last eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import of_starts
from hessfunc.numerics import rounding
from hessfunc.spaces.space import Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree, tree_map

End = Literal["largest", "smallest"]

# Number of directions that may be added before the basis is reduced to its best vectors.
_ROOM = 8
# Directions whose part outside of the basis is shorter than this are rounding, in units of the
# longest row.
_SHORTEST = 1e-6
# Length of the random vector that is added to the unit scout.
_STIRRED = 0.1


@dataclass(frozen=True, kw_only=True)
class Followed(Eigenpairs):
    """Eigenpairs including guards, with a vector that searches for others.

    Attributes:
        scout: Unit vector of a power iteration outside of these pairs, with one step a point.
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
    """Compute the k outermost eigenpairs and some guards, from the vectors of an earlier run.

    Rayleigh-Ritz in the span of the earlier vectors gives the first pairs. While one of the k has a
    residual |A v - value v| > rtol |value|, these residuals extend the span. Each vector is kept
    with its product, so that residuals are measured and no vector is multiplied twice. The guards
    are the next pairs, which need not converge. They detect an eigenvalue that overtakes the k-th.

    A span without a part along some eigenvector would never detect it, however large its eigenvalue
    grows. One more vector is therefore multiplied at each point, the scout. It is a power iteration
    outside of the pairs, with a random vector added, so that no direction is lost. The scout
    replaces a pair when its value is larger, some points after its eigenvalue has overtaken them.

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric.
        like: Tree that shows the structure of a vector.
        k: Number of pairs that must converge.
        guards: Number of further pairs.
        end: End of the spectrum, ``"largest"`` or ``"smallest"``.
        rtol: Relative tolerance: the run stops when the residuals of the k pairs are at most
            rtol |value|.
        max_matvecs: Budget, the largest number of matvecs.
        before: Result of the earlier run; None for the first one, which begins at random vectors.
        seed: Seed of the random vectors.

    Returns:
        `Followed`, with the pairs from the end inwards.

    Cost: k + guards + 1 products if the earlier vectors are still accurate, and one more for each
    pair and step otherwise. Memory: 2 (k + guards + 9) vectors.

    Source: Davidson 1975, without a preconditioner; restart: Stathopoulos, Saad and Wu 1998.
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
            # A s of the scout s, from the products of the basis, whose span contains s.
            ahead = space.combine(space.gram(scout, basis), images)
        values, rotation = _outermost(space.gram(basis, images), width, end)
        rows, moved = space.combine(rotation.mT, basis), space.combine(rotation.mT, images)
        # A v - value v for each Ritz vector v, from the products of the basis.
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
        # The shift by -|A s| / |s| makes the smallest eigenvalues the largest in absolute value.
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
    """Return Ritz values from the end inwards, and their coefficients in the basis, as columns."""
    projected = projected.cpu().double()
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    if end == "largest":
        values, vectors = values.flip(0), vectors.flip(1)
    return values[:width], vectors[:, :width]


def _orthonormal(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows that extend the basis to the span of the basis and the rows."""
    outside, _, _ = orthonormal(
        space, rows.clone(), Basis(basis), threshold=lambda longest: _SHORTEST * longest
    )
    return outside
