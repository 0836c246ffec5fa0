"""Span of a Davidson method: B-orthonormal rows with their products, and Ritz pairs in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis
from hessfunc.algorithms.eigen.ritz import rayleigh_ritz
from hessfunc.algorithms.symmetry import refuse_asymmetric
from hessfunc.spaces.space import Space, rows_dtype


@dataclass(frozen=True)
class RitzPairs:
    """Ritz pairs with their products with B, and A v - value B v with its 2-norm."""

    values: Tensor
    vectors: Tensor
    duals: Tensor
    outside: Tensor
    lengths: Tensor

    def at(self, indices: Tensor, /) -> RitzPairs:
        """Return some of the pairs, in the order of the indices."""
        rows = indices.to(self.vectors.device)
        return RitzPairs(
            values=self.values[indices],
            vectors=self.vectors[rows],
            duals=self.duals[rows],
            outside=self.outside[rows],
            lengths=self.lengths[indices],
        )


@dataclass(frozen=True)
class Subspace:
    """Span of B-orthonormal rows V, with their products.

    Attributes:
        basis: Rows V.
        images: Products of V with A.
        metric: Products of V with B, or None for the identity.
        projected: Matrix V A V', float64 on the CPU.
        longest: Length of the longest product with A so far.
    """

    basis: Basis
    images: Basis
    metric: Basis | None
    projected: Tensor
    longest: float = 0.0

    @classmethod
    def empty(cls, space: Space, /, *, has_metric: bool) -> Subspace:
        """Return the span of no rows."""
        none = Basis.empty(space, rows_dtype(space), space.device)
        projected = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        return cls(none, none, none if has_metric else None, projected)

    def __len__(self) -> int:
        return len(self.basis)

    @property
    def duals(self) -> Basis:
        """Products of V with B."""
        return self.basis if self.metric is None else self.metric

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and their coefficients in the basis, as columns."""
        return rayleigh_ritz(self.projected)

    def extended(
        self,
        space: Space,
        rows: Tensor,
        images: Tensor,
        duals: Tensor,
        /,
        *,
        size: int,
        tolerance: float,
    ) -> Subspace:
        """Return the span with more rows.

        Args:
            space: Space of the vectors.
            rows: Rows Q, B-orthonormal with V.
            images: Products of Q with A.
            duals: Products of Q with B.
            size: Largest number of basis vectors.
            tolerance: Asymmetry of A that is let through, relative to its products.

        Raises:
            ValueError: If A is not symmetric.
        """
        basis = self.basis.append(rows, size)
        columns = space.gram(basis.rows, images).cpu().double()
        # For a symmetric A, v'A q = q'A v for the rows v of the earlier basis and a new row q.
        forms = space.gram(self.images.rows, rows).cpu().double()
        m, longest = len(forms), max(self.longest, float(space.norms(images).max()))
        differences = ((columns[:m] - forms) / space.norms(rows).cpu().double()).abs()
        refuse_asymmetric(float(differences.max()) if m else 0.0, longest, tolerance)
        # [V; Q] A [V; Q]' = [V A V', V A Q'; Q A V', Q A Q'], and Q A V' = (V A Q')'.
        projected = torch.zeros(len(basis), len(basis), dtype=torch.float64, device="cpu")
        projected[:m, :m] = self.projected
        projected[:, m:] = columns
        projected[m:, :m] = columns[:m].mT
        return Subspace(
            basis=basis,
            images=self.images.append(images, size),
            metric=None if self.metric is None else self.metric.append(duals, size),
            projected=projected,
            longest=longest,
        )

    def pairs(self, space: Space, indices: Tensor, /) -> RitzPairs:
        """Return the Ritz pairs at some of the ascending values.

        For v = V'y, all of A v - value B v = (A V' - value B V') y are combinations of the products
        that are kept.
        """
        values, rotation = self._chosen(indices)
        dtype = rows_dtype(space)
        vectors = duals = self.basis.combine(space, rotation, dtype)
        if self.metric is not None:
            duals = self.metric.combine(space, rotation, dtype)
        outside = self.images.combine(space, rotation, dtype)
        outside = outside - values.to(outside)[:, None] * duals
        return RitzPairs(values, vectors, duals, outside, space.norms(outside).cpu().double())

    def restarted(self, space: Space, indices: Tensor, /) -> Subspace:
        """Return the span of the Ritz vectors at some of the ascending values.

        With V A V' Y = Y D, the rows Y'V are B-orthonormal, and Y'V A V'Y = D.
        """
        values, rotation = self._chosen(indices)

        def rotated(basis: Basis) -> Basis:
            return Basis(basis.combine(space, rotation, rows_dtype(space)))

        return replace(
            self,
            basis=rotated(self.basis),
            images=rotated(self.images),
            metric=None if self.metric is None else rotated(self.metric),
            projected=values.diag(),
        )

    def _chosen(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        values, coefficients = self.ritz
        return values[indices], coefficients[:, indices].mT
