"""An orthonormal basis of a growing span of vectors, with the products of the basis."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.spaces.space import DIVIDED, Rows, Space, available_to, rows_dtype


@dataclass(frozen=True)
class Sketch:
    """Vectors Y = C' Q, with orthonormal rows Q and their products AQ.

    Attributes:
        basis: Q, rows.
        images: AQ, rows.
        factor: C, float64 on the CPU. Where it has fewer rows than columns, the vectors depend on
            each other.
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
        """The sketch of more vectors. Cost: at most one matvec each."""
        rank, p = self.factor.shape
        rest, inner = vectors, torch.zeros(len(vectors), rank, dtype=torch.float64, device="cpu")
        for _ in range(2):
            share = space.gram(rest, self.basis)
            rest = rest - space.combine(share, self.basis)
            inner += share.cpu().double()
        # The small factor is rotated so that what depends on the rest stands out as short.
        added, triangle = space.factored(rest)
        rotation, lengths, axes = torch.linalg.svd(triangle)
        longest = max(
            float(space.norms(vectors).max()),
            float(self.factor.norm(dim=0).max()) if p else 0.0,
        )
        kept = lengths > 100 * torch.finfo(vectors.dtype).eps * longest
        added = space.combine(rotation.mT[kept], added)
        # What is short after the projection is not quite orthogonal to the basis.
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
        """Unit coefficients S: ``Q' s_i`` spans what only the i-th vector adds to the others.

        A column is zero where the i-th vector lies in the span of the others.
        """
        dual = torch.linalg.pinv(self.factor).mT
        # Vectors that take part in a dependence are those that others can replace.
        replaceable = (1 - (dual * self.factor).sum(0)) > 1e-6
        return torch.where(replaceable, 0.0, dual / dual.norm(dim=0))


def vectors_that_fit(space: Space, copies: int, /) -> int:
    """How many vectors may be kept in ``copies`` copies, for half of the memory at the most."""
    free = available_to(space)
    most = free // 2 // (copies * max(1, space.widest) * rows_dtype(space).itemsize)
    if most < 2:
        raise MemoryError(
            f"two probes of {space.widest} entries, with their products, do not fit in "
            f"{free / 2**30:.1f} GiB: take `hutchinson`, which keeps none"
        )
    return most
