"""Precision matrices ``s G + D`` of a posterior, with curvature G and a diagonal prior D."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.results.result import Saved
from hessfunc.kronecker.block import Block
from hessfunc.numerics import wide_dtype
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree

# Precision of all parameters, or of each leaf by name.
PriorPrecision: TypeAlias = float | Tensor | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Prior:
    """Normal prior ``N(0, D^-1)`` with one precision for all parameters, or one for each leaf.

    Attributes:
        space: Space of the parameters.
        precision: Scalar tensor, or one by the name of each leaf.
    """

    space: Space
    precision: Tensor | Mapping[str, Tensor]

    def of(self, name: str, /) -> Tensor:
        """Return the precision of a leaf."""
        return self.precision if isinstance(self.precision, Tensor) else self.precision[name]

    @property
    def each(self) -> list[Tensor]:
        """Precision of each leaf, in the order of the space."""
        return [self.of(name) for name in self.space.names]

    def diagonal(self) -> Tensor:
        """Return D as a vector ``(n,)``, or as a scalar if all precisions are equal."""
        if isinstance(self.precision, Tensor):
            return self.precision
        pairs = zip(self.each, self.space.sizes, strict=True)
        return torch.cat([value.expand(size) for value, size in pairs])

    def logdet(self) -> Tensor:
        """Return ``log det D``."""
        pairs = zip(self.each, self.space.sizes, strict=True)
        return torch.stack([size * value.log() for value, size in pairs]).sum()

    def square_norm(self, params: Tree, /) -> Tensor:
        """Return ``theta' D theta``."""
        pairs = zip(self.each, self.space.tree_leaves(params), strict=True)
        return torch.stack([d * leaf.to(d).square().sum() for d, leaf in pairs]).sum()


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Saved):
    """Curvature G with one structured block for each leaf.

    Attributes:
        blocks: Diagonal blocks by the name of the leaf.
    """

    blocks: Mapping[str, Block]

    def logdet(self, scale: Tensor, prior: Prior, /) -> Tensor:
        """Return ``log det P`` of ``P = s G + D``, differentiable in s and D."""
        # log det(s A + d I) is the sum of log(s a + d) over the eigenvalues a of each block A.
        return torch.stack(
            [
                (scale * block.eigenvalues().to(scale).clamp_min(0) + prior.of(name)).log().sum()
                for name, block in self.blocks.items()
            ]
        ).sum()

    def covariance(self, block: Tree, scale: Tensor, prior: Prior, /) -> Tree:
        """Return the products ``P^-1 v`` with a vector block."""
        return self._power(block, scale, prior, -1.0)

    def root(self, block: Tree, scale: Tensor, prior: Prior, /) -> Tree:
        """Return the products ``L v`` with a vector block, where ``L L' = P^-1``."""
        return self._power(block, scale, prior, -0.5)

    def _power(self, block: Tree, scale: Tensor, prior: Prior, exponent: float) -> Tree:
        # (s A + d I)^p = s^p (A + d / s I)^p.
        space, s, leaves = prior.space, float(scale), prior.space.block_leaves(block)
        powers = []
        for name, leaf in zip(space.names, leaves, strict=True):
            part = self.blocks[name]
            rows = leaf.to(part.eigenvalues().dtype)
            power = part.power_matvec(rows, exponent, float(prior.of(name)) / s)
            powers.append((s**exponent * power).to(leaf))
        return space.tree(powers)


@dataclass(frozen=True, eq=False)
class LowRank(Saved):
    """Curvature ``V' diag(a) V`` of all parameters together, from r eigenpairs.

    Attributes:
        values: Eigenvalues a, ``(r,)``. With r = n, the matrix is arbitrary.
        vectors: Orthonormal rows V, ``(r, n)``.
    """

    values: Tensor
    vectors: Tensor

    def logdet(self, scale: Tensor, prior: Prior, /) -> Tensor:
        values, diagonal = self.values.to(scale), prior.diagonal()
        if not diagonal.dim():
            return prior.logdet() + torch.log1p(scale * values / diagonal).sum()
        # det(D + s V' a V) = det D det(I + M M') with M = (s a)^(1/2) V D^(-1/2), by Sylvester.
        rows = (values.sqrt()[:, None] * self.vectors.to(scale)) * diagonal.rsqrt()
        gram = torch.eye(len(rows), dtype=scale.dtype, device=scale.device) + scale * rows @ rows.mT
        factor = torch.linalg.cholesky(gram)
        return prior.logdet() + 2 * factor.diagonal().log().sum()

    def covariance(self, block: Tree, scale: Tensor, prior: Prior, /) -> Tree:
        root = prior.diagonal().detach().rsqrt()
        rows = prior.space.ravel(block).to(root)
        return prior.space.unravel(root * self._power(root * rows, scale, prior, -1.0))

    def root(self, block: Tree, scale: Tensor, prior: Prior, /) -> Tree:
        root = prior.diagonal().detach().rsqrt()
        rows = prior.space.ravel(block).to(root)
        return prior.space.unravel(root * self._power(rows, scale, prior, -0.5))

    def _power(self, rows: Tensor, scale: Tensor, prior: Prior, exponent: float) -> Tensor:
        """Return the products of rows with ``(I + s M'M)^exponent``, M = a^(1/2) V D^(-1/2)."""
        values, basis = self._whitened(prior)
        powers = (1 + scale.detach() * values) ** exponent
        # With orthonormal rows U, (I + U' x U)^p = I + U' ((1 + x)^p - 1) U. If U is square, the
        # identity cancels, and leaving it out saves its rounding.
        if len(values) == prior.space.n:
            return (rows @ basis.mT * powers) @ basis
        return rows + (rows @ basis.mT * (powers - 1)) @ basis

    def _whitened(self, prior: Prior) -> tuple[Tensor, Tensor]:
        """Return the eigenpairs ``(r,)`` and ``(r, n)`` of ``D^(-1/2) G D^(-1/2)``."""
        diagonal = prior.diagonal().detach()
        values, vectors = self.values.to(diagonal), self.vectors.to(diagonal)
        if not diagonal.dim():
            return values / diagonal, vectors
        rows = values.sqrt()[:, None] * vectors * diagonal.rsqrt()
        _, roots, basis = torch.linalg.svd(rows, full_matrices=False)
        return roots.square(), basis


def prior_of(params: Tree, precision: PriorPrecision, /) -> Prior:
    """Return the prior with these precisions, in float64.

    Raises:
        ValueError: If a precision is not positive, or if the names are not those of the leaves.
    """
    space = space_of(params)
    if not isinstance(precision, Mapping):
        return Prior(space, positive("prior_precision", precision, space))
    if set(precision) != set(space.names):
        raise ValueError(
            f"prior_precision has the names {sorted(precision)}, and the parameters "
            f"{sorted(space.names)}: pass one precision for each parameter, or one number"
        )
    return Prior(
        space,
        {
            name: positive(f"prior_precision[{name!r}]", precision[name], space)
            for name in space.names
        },
    )


def positive(name: str, value: Any, space: Space, /) -> Tensor:
    """Return a positive number as a scalar in the widest dtype, with its graph.

    Raises:
        ValueError: If the number is not positive and finite.
    """
    number = torch.as_tensor(value, dtype=wide_dtype(space.device), device=space.device)
    if not 0 < (plain := float(number.detach())) < math.inf:
        raise ValueError(f"{name}={plain:g}: it must be positive and finite, such as {name}=1.0")
    return number


def as_numbers(precision: PriorPrecision, /) -> float | dict[str, float]:
    """Return precisions as plain numbers."""
    if isinstance(precision, Mapping):
        return {name: float(value) for name, value in precision.items()}
    return float(precision)
