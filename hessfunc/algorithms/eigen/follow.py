"""Eigenpairs of a matrix that has changed a little since its last eigenpairs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.driver import Method, run_method
from hessfunc.algorithms.eigen.ritz import rayleigh_ritz, wanted
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.starts import of_starts
from hessfunc.display import VECTORS
from hessfunc.numerics import rounding
from hessfunc.spaces.space import DIVIDED, Rows, Space, products_eps, rows_dtype
from hessfunc.trees import Matvec, Tree, tree_map

# Number of directions that may be added before the basis is reduced to its best vectors.
_ROOM = 8
# Directions whose part outside of the basis is shorter than this are rounding, in units of the
# longest row.
_SHORTEST = 1e-6
# Length of the random vector that is added to the unit scout.
_STIRRED = 0.1


@dataclass(frozen=True, kw_only=True, repr=False)
class Followed(Eigenpairs):
    """Eigenpairs including guards, with a vector that searches for others.

    Attributes:
        scout: Unit vector of a power iteration outside of these pairs, with one step a point.
    """

    scout: Tree = field(metadata=VECTORS)


def follow(
    matvec: Matvec,
    like: Tree,
    *,
    k: int,
    guards: int,
    which: Literal["LA", "SA"],
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
        which: End of the spectrum, ``"LA"`` for the largest or ``"SA"`` for the smallest.
        rtol: Relative tolerance: the run stops when the residuals of the k pairs are at most
            rtol |value|.
        max_matvecs: Budget, the largest number of matvecs, at least k + guards + 1.
        before: Result of the earlier run; None for the first one, which begins at random vectors.
        seed: Seed of the random vectors.

    Returns:
        `Followed`, with the pairs from the end inwards.

    Cost: k + guards + 1 products if the earlier vectors are still accurate, and one more for each
    pair and step otherwise. Memory: 2 (k + guards + 9) vectors.

    Source: Davidson 1975, without a preconditioner; restart: Stathopoulos, Saad and Wu 1998.
    """
    method = Following(k=k, guards=guards, which=which, rtol=rtol, before=before)
    return run_method(method, Products.of(matvec, like), {"seed": seed}, max_matvecs=max_matvecs)


@dataclass(frozen=True)
class _State:
    """Orthonormal rows V with their products, the Ritz pairs in their span, and the next rows.

    Attributes:
        basis: Rows V.
        images: Products A V'.
        following: Orthonormal rows outside of the basis, which the next round multiplies.
        scout: Unit vector of the power iteration.
        stirring: Random unit vector, from which the scout begins again if its product is zero.
        ahead: Product A s of the scout s; empty before the first round.
        values: Ritz values, the outermost first.
        vectors: Ritz vectors, as rows.
        residuals: Residual |A v - value v| of each pair.
        largest: Largest absolute Ritz value so far, a lower bound of |A|.
    """

    basis: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    following: Rows = field(metadata=DIVIDED)
    scout: Rows = field(metadata=DIVIDED)
    stirring: Rows = field(metadata=DIVIDED)
    ahead: Rows = field(metadata=DIVIDED)
    values: Tensor
    vectors: Rows = field(metadata=DIVIDED)
    residuals: Tensor
    largest: float


@dataclass(frozen=True, kw_only=True)
class Following(Method[_State, Followed]):
    """Block Davidson method without a preconditioner; the options are those of `follow`."""

    k: int
    guards: int
    which: Literal["LA", "SA"]
    rtol: float
    before: Followed | None

    # Runs have no checkpoint, and a digest of the earlier vectors at each point would take long.
    changeable: ClassVar = frozenset({"rtol", "before"})

    def init(self, products: Products, seed: int, /) -> _State:
        space, dtype = products.space, rows_dtype(products.space)
        width = min(self.k + self.guards, space.n)
        new = space.probes(range(width + 1), kind="normal", seed=of_starts(seed), dtype=dtype)
        scout = stirring = _unit(space, new[-1:])
        if self.before is not None:
            before = tree_map(lambda leaf: leaf[None], self.before.scout)
            scout = space.ravel(before, dtype=dtype) + _STIRRED * stirring
            new = torch.cat([space.ravel(self.before.vectors, dtype=dtype), scout])
        none, no_numbers = new[:0], torch.zeros(0, dtype=torch.float64, device="cpu")
        return _State(
            basis=none,
            images=none,
            following=_orthonormal(space, new, none),
            scout=scout,
            stirring=stirring,
            ahead=none,
            values=no_numbers,
            vectors=none,
            residuals=no_numbers,
            largest=0.0,
        )

    def step(self, state: _State, products: Products, room: int, /) -> _State:
        space, new = products.space, state.following
        if len(new) > room:
            return state
        width = min(self.k + self.guards, space.n)
        basis = torch.cat([state.basis, new])
        images = torch.cat([state.images, products(new)])
        ahead = state.ahead
        if not len(ahead):
            # A s of the scout s, from the products of the basis, whose span contains s.
            ahead = space.combine(space.gram(state.scout, basis), images)
        values, coefficients = rayleigh_ritz(space.gram(basis, images))
        outermost = wanted(self.which, values, width)
        values, rotation = values[outermost], coefficients[:, outermost].mT
        vectors, moved = space.combine(rotation, basis), space.combine(rotation, images)
        # A v - value v for each Ritz vector v, from the products of the basis.
        outside = moved - values.to(moved)[:, None] * vectors
        state = replace(
            state,
            basis=basis,
            images=images,
            ahead=ahead,
            values=values,
            vectors=vectors,
            residuals=space.norms(outside).cpu(),
            largest=max(state.largest, float(values.abs().max())),
        )
        unconverged = torch.nonzero(~self._converged(state, space)[: self.k]).flatten()
        if not len(unconverged):
            return replace(state, following=new[:0])
        if len(basis) + len(unconverged) > width + _ROOM:
            state = replace(state, basis=vectors, images=moved)
        outside = outside[unconverged.to(outside.device)]
        return replace(state, following=_orthonormal(space, outside, state.basis))

    def _converged(self, state: _State, space: Space) -> Tensor:
        floor = rounding(products_eps(space), state.largest)
        return state.residuals <= (self.rtol * state.values.abs()).clamp_min(floor)

    def verdict(self, state: _State, products: Products, room: int, /) -> str | None:
        if not len(state.values):
            return None
        if bool(self._converged(state, products.space)[: self.k].all()):
            return "converged: all residuals are within the tolerance"
        if not len(state.following):
            return "the residuals lie in the basis up to rounding: take a looser rtol, or float64"
        return None

    def result(self, state: _State, space: Space, cost: Cost, /) -> Followed:
        scout, ahead, vectors = state.scout, state.ahead, state.vectors
        if self.which == "SA" and float(space.gram(scout, ahead)) > 0:
            # The shift by -|A s| / |s| makes the smallest eigenvalues the largest in absolute
            # value.
            ahead = ahead - float(space.norms(ahead) / space.norms(scout)) * scout
        ahead = ahead - space.combine(space.gram(ahead, vectors), vectors)
        return Followed(
            scout=space.unravel(_unit(space, ahead if bool(ahead.any()) else state.stirring)[0]),
            values=state.values,
            vectors=space.unravel(vectors),
            residuals=state.residuals,
            converged=self._converged(state, space),
            largest=state.largest,
            **cost,
        )


def _unit(space: Space, row: Tensor) -> Tensor:
    return row / space.norms(row).to(row)[:, None]


def _orthonormal(space: Space, rows: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows that extend the basis to the span of the basis and the rows."""
    outside, _, _ = orthonormal(
        space, rows.clone(), Basis(basis), threshold=lambda longest: _SHORTEST * longest
    )
    return outside
