"""Span of known eigenpairs, which estimators deflate without a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.symmetry import mixture, refuse_another_matrix
from hessfunc.numerics import wide_dtype
from hessfunc.spaces.space import Space, rows_dtype

# Largest error of an inner product of orthonormal vectors, which may be in bfloat16.
_NEARLY = 0.02


@dataclass(frozen=True)
class Span:
    """Span V of eigenpairs.

    Attributes:
        basis: Orthonormal rows V'.
        values: Eigenvalues, float64 ``(k,)``.
        residuals: Lengths of the residuals ``A v_i - value_i v_i``, float64 ``(k,)``.
        parts: Sum of the eigenvalues, split over the leaves, float64 ``(leaves,)``.
        name: Name of the argument that holds the pairs, for messages.
    """

    basis: Tensor
    values: Tensor
    residuals: Tensor
    parts: Tensor
    name: str

    @classmethod
    def of(cls, space: Space, pairs: Eigenpairs | None, name: str, /) -> Span:
        """Return the span of eigenpairs, empty for None.

        Args:
            space: Space of the vectors.
            pairs: Eigenpairs with orthonormal vectors, or None.
            name: Name of the argument that holds the pairs, for messages.

        Raises:
            ValueError: If the pairs span the whole space, or if the vectors are not orthonormal.
        """
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        if pairs is None:
            rows = space.zeros(0, rows_dtype(space))
            return cls(rows, none, none, none.new_zeros(len(space.names)), name)
        basis = space.rows(pairs.vectors, dtype=rows_dtype(space))
        if len(basis) >= space.n:
            raise ValueError(
                f"{name} has {len(basis)} eigenpairs of a matrix of dimension {space.n}, so no "
                f"vector is left to sample: the trace is {name}.values.sum()"
            )
        gram = space.gram(basis, basis)
        identity = torch.eye(len(basis), dtype=gram.dtype, device=gram.device)
        error = float((gram - identity).abs().max()) if len(basis) else 0.0
        if not error <= _NEARLY:
            raise ValueError(
                f"the vectors of {name} are not orthonormal, as an inner product is off by "
                f"{error:.2g}: pass the eigenpairs of one run of `lanczos`, and not joined ones"
            )
        values = pairs.values.cpu().double()
        parts = (values[:, None] * space.by_leaf(basis, basis).cpu().double()).sum(0)
        return cls(basis, values, pairs.residuals.cpu().double(), parts, name)

    def __len__(self) -> int:
        return len(self.basis)

    def refuse_another_matrix(self, products: Products, /) -> None:
        """Raise an error if the eigenpairs are not those of the matrix, up to their residuals.

        Raises:
            ValueError: If the product with a combination of the vectors shows another matrix.

        Cost: one matvec, or none without eigenpairs.
        """
        if not len(self):
            return
        # A sum_i c_i v_i = sum_i c_i (value_i v_i + r_i) for the residuals r_i.
        weights = mixture(len(self))
        vector, expected = (
            products.space.combine(row[None], self.basis)
            for row in (weights, weights * self.values)
        )
        bound = float(weights.abs() @ self.residuals)
        scale = float(self.values.abs().max())
        refuse_another_matrix(products, vector, expected, bound, scale, self.name)

    @property
    def squares(self) -> float:
        """Squared Frobenius norm ``|AV|_F^2``."""
        # |A v_i|^2 = value_i^2 + residual_i^2, since A v_i - value_i v_i is orthogonal to v_i.
        return float(self.values.square().sum() + self.residuals.square().sum())

    def leaf_bounds(self, space: Space) -> Tensor:
        """Return bounds of the error that the residuals add to each leaf, float64 ``(leaves,)``.

        The contribution of leaf l to the trace also contains 2 sum_i <v_i, r_i>_l for the residuals
        r_i. Since <v_i, r_i> = 0, it is at most 2 sum_i |r_i| min(|v_i|_l, |v_i|_rest).
        """
        inside = space.by_leaf(self.basis, self.basis).cpu().double().clamp(0, 1)
        return 2 * (self.residuals[:, None] * torch.minimum(inside, 1 - inside).sqrt()).sum(0)

    def diagonal(self) -> Tensor:
        """Return the diagonal ``sum_i value_i v_i * v_i``, a wide row ``(n,)``."""
        wide = wide_dtype(self.basis.device)
        return self.values.to(self.basis.device, wide) @ self.basis.to(wide).square()

    def bounds(self) -> Tensor:
        """Return bounds of the error that the residuals add to each entry, a wide row ``(n,)``.

        The diagonal also contains 2 v_i * r_i for each residual r_i.
        """
        wide = wide_dtype(self.basis.device)
        return 2 * self.residuals.to(self.basis.device, wide) @ self.basis.to(wide).abs()

    def complement(self, space: Space, probes: Tensor, *, on_sphere: bool) -> Tensor:
        """Return P w for each probe w, with P = I - VV'.

        With ``on_sphere``, each P w is rescaled to the sphere of the complement, whose radius is
        the root of its dimension.
        """
        if not len(self.basis):
            return probes
        outer = probes
        # A second projection removes what rounding leaves of the first.
        for _ in range(2):
            outer = outer - space.combine(space.gram(outer, self.basis), self.basis)
        if on_sphere:
            radius = (space.n - len(self.basis)) ** 0.5
            outer = outer * (radius / space.norms(outer)).to(outer.dtype)[:, None]
        return outer
