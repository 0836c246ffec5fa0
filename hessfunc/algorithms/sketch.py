"""Sketch of a matrix: an orthonormal basis of a growing span of vectors, and its products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.spaces.space import DIVIDED, ProbeKind, Rows, Space, available_to, rows_dtype


@dataclass(frozen=True)
class Sketch:
    """Rows Y = C' Q, with orthonormal rows Q and their products AQ.

    Attributes:
        basis: Orthonormal rows Q, ``(r, n)``.
        images: Products AQ with the rows of Q, ``(r, n)``.
        factor: Small factor C, float64 ``(r, p)`` on the CPU. The p vectors Y are linearly
            dependent if r < p.
    """

    basis: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    factor: Tensor

    @classmethod
    def empty(cls, space: Space, /) -> Sketch:
        none = space.zeros(0, rows_dtype(space))
        return cls(none, none, torch.zeros(0, 0, dtype=torch.float64, device="cpu"))

    @property
    def full_rank(self) -> bool:
        return self.factor.shape[0] == self.factor.shape[1]

    def extended(self, space: Space, products: Products, vectors: Tensor, /) -> Sketch:
        """Return the sketch with more vectors W, ``(k, n)``.

        With W = D Q + R and R = S' P for the new rows P, orthogonal to Q,

            [Y; W] = [C D'; 0 S]' [Q; P].

        Cost: at most one matvec a vector.
        """
        rank, p = self.factor.shape
        rest, inner = vectors, torch.zeros(len(vectors), rank, dtype=torch.float64, device="cpu")
        # Two projections R = W - D Q, since one leaves rounding along Q.
        for _ in range(2):
            share = space.gram(rest, self.basis)
            rest = rest - space.combine(share, self.basis)
            inner += share.cpu().double()
        # QR of the columns of R' gives R = T'B with orthonormal rows B. The SVD T = U L V' turns it
        # into R = V L P with P = U'B and S = L V'. Dependent vectors yield short directions.
        added, triangle = space.factored(rest)
        rotation, lengths, axes = torch.linalg.svd(triangle)
        longest = max(
            float(space.norms(vectors).max()),
            float(self.factor.norm(dim=0).max()) if p else 0.0,
        )
        kept = lengths > 100 * torch.finfo(vectors.dtype).eps * longest
        added = space.combine(rotation.mT[kept], added)
        # The relative rounding along Q is larger in short directions, so they are projected again.
        added = added - space.combine(space.gram(added, self.basis), self.basis)

        factor = torch.zeros(rank + len(added), p + len(vectors), dtype=torch.float64, device="cpu")
        factor[:rank, :p] = self.factor
        factor[:rank, p:] = inner.mT
        factor[rank:, p:] = (lengths[kept, None] * axes[kept]).cpu().double()
        if not len(added):
            return Sketch(self.basis, self.images, factor)
        return Sketch(
            torch.cat([self.basis, added]),
            torch.cat([self.images, products(added)]),
            factor,
        )

    def left_out(self) -> Tensor:
        """Return unit columns s_i: ``Q' s_i`` spans the part that only the i-th vector adds.

        The rows of the pseudoinverse of C are dual to the columns c_j of C, so that s_i'c_j = 0 for
        j != i. A column is zero if the i-th vector lies in the span of the others.
        """
        dual = torch.linalg.pinv(self.factor).mT
        # The i-th diagonal entry of pinv(C) C is less than 1 if the i-th vector takes part in a
        # linear dependence. Then the others can replace it.
        replaceable = (1 - (dual * self.factor).sum(0)) > 1e-6
        return torch.where(replaceable, 0.0, dual / dual.norm(dim=0))


@dataclass(frozen=True)
class SketchedProbes:
    """State of an estimator with p probes and a sketch.

    Attributes:
        probes: Probes w_i, rows ``(p, n)``.
        images: Products A w_i, rows ``(p, n)``.
        sketch: Sketch of products of the run, with orthonormal rows Q and A Q.
        seed: Seed of the probes.
    """

    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    sketch: Sketch
    seed: int

    @classmethod
    def none(cls, space: Space, seed: int, /) -> SketchedProbes:
        """Return the state before the first probe."""
        rows = space.zeros(0, rows_dtype(space))
        return cls(rows, rows, Sketch.empty(space), seed)

    def grown(self, products: Products, width: int, kind: ProbeKind, /) -> SketchedProbes:
        """Return the state with more probes, whose products join the sketch.

        Args:
            products: Products of the run: ``width`` with the probes, at most as many with the
                directions that join the sketch.
            width: Number of new probes. Without any the state is returned unchanged.
            kind: Distribution of the probes.
        """
        if width < 1:
            return self
        space, p = products.space, len(self.probes)
        indices = range(p, p + width)
        probes = space.probes(indices, kind=kind, seed=self.seed, dtype=rows_dtype(space))
        images = products(probes)
        return SketchedProbes(
            torch.cat([self.probes, probes]),
            torch.cat([self.images, images]),
            self.sketch.extended(space, products, images),
            self.seed,
        )


def vectors_that_fit(space: Space, copies: int, /) -> int:
    """Return the number of vectors of which ``copies`` copies fit in half of the memory."""
    free = available_to(space)
    most = free // 2 // (copies * max(1, space.widest) * rows_dtype(space).itemsize)
    if most < 2:
        raise MemoryError(
            f"two probes of {space.widest} entries, with their products, do not fit in "
            f"{free / 2**30:.1f} GiB: use `hutchinson`, which does not keep them"
        )
    return most
