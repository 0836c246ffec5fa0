"""Preconditioners of parameters, and norms whose steepest descent is the step of an optimiser.

A norm is given by its linear maximisation: a function from a block of k vectors y to the dual norms
|y|* = max <y, d> over |d| <= 1, ``(k,)``, and the block of the maximisers d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

Block: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Preconditioner:
    """Preconditioner of one parameter, diagonal in a Kronecker product of orthogonal bases.

        P = Q diag(entries) Q',  Q = Q_1 x Q_2 x ...

    Attributes:
        entries: Positive eigenvalues of P. Without bases, they have the shape of the parameter.
        bases: Orthogonal matrix of each axis of ``entries``, with basis vectors as columns, or None
            for the identity. Empty for a diagonal P.
    """

    entries: Tensor
    bases: tuple[Tensor | None, ...] = ()

    def power(self, block: Tensor, exponent: float, /) -> Tensor:
        """Return the products of P^exponent with a block ``(k, *shape)`` of vectors."""
        turned = block.reshape(len(block), *self.entries.shape)
        for axis, basis in enumerate(self.bases, start=1):
            turned = _along(turned, basis, axis)
        turned = turned * self.entries.to(turned) ** exponent
        for axis, basis in enumerate(self.bases, start=1):
            turned = _along(turned, None if basis is None else basis.mT, axis)
        return turned.reshape(block.shape)

    def scaled(self, factor: float, /) -> Preconditioner:
        """Return the preconditioner factor P."""
        return Preconditioner(factor * self.entries, self.bases)


def _along(block: Tensor, basis: Tensor | None, axis: int) -> Tensor:
    """Return the products Q'x along one axis of a block."""
    if basis is None:
        return block
    return torch.tensordot(block, basis.to(block), dims=([axis], [0])).movedim(-1, axis)


@dataclass(frozen=True)
class InfinityNorm:
    """Largest absolute entry of one parameter, divided by a radius.

    Its dual norm is radius times the sum of absolute values, with the maximiser radius sign(y).

    Attributes:
        radius: Largest entry of a step of length 1.
    """

    radius: float = 1.0

    def maximum(self, block: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the dual norms ``(k,)`` of a block ``(k, *shape)``, and the maximisers."""
        return self.radius * _sums(block.abs()), self.radius * block.sign()


@dataclass(frozen=True)
class SpectralNorm:
    """Largest singular value of one parameter, divided by a radius.

    A parameter with more than two axes is the matrix of its first axis and all others. The dual
    norm is radius times the sum of the singular values, with the maximiser radius UV' for
    y = U diag(s) V'.

    Attributes:
        radius: Largest singular value of a step of length 1.
    """

    radius: float = 1.0

    def maximum(self, block: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the dual norms ``(k,)`` of a block ``(k, *shape)``, and the maximisers."""
        u, s, vt = torch.linalg.svd(block.flatten(2), full_matrices=False)
        return self.radius * s.sum(1), self.radius * (u @ vt).reshape(block.shape)


@dataclass(frozen=True)
class LargestNorm:
    """Largest of the norms of several parameters.

    Its dual norm is the sum of theirs.

    Attributes:
        norms: Norm of each parameter, by name.
    """

    norms: Mapping[str, InfinityNorm | SpectralNorm]

    def __call__(self, block: Block, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the dual norms ``(k,)`` of a block, and the maximisers."""
        parts = {name: norm.maximum(block[name]) for name, norm in self.norms.items()}
        total = reduce(torch.add, (dual for dual, _ in parts.values()))
        return total, {name: best for name, (_, best) in parts.items()}


@dataclass(frozen=True)
class PreconditionedNorm:
    """Norm sqrt(d'Pd) of several parameters, with the dual norm sqrt(y'P^-1 y).

    Attributes:
        preconditioner: Preconditioner of each parameter, by name.
    """

    preconditioner: Mapping[str, Preconditioner]

    def __call__(self, block: Block, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the dual norms ``(k,)`` of a block, and the maximisers."""
        solved = {name: P.power(block[name], -1) for name, P in self.preconditioner.items()}
        squares = [_sums(block[name] * step) for name, step in solved.items()]
        dual = reduce(torch.add, squares).sqrt()
        return dual, {name: _times(1 / dual, step) for name, step in solved.items()}


@dataclass(frozen=True)
class CombinedNorm:
    """Root of the weighted sum of the squares of norms of disjoint parts of a vector.

        |d|^2 = sum_i weight_i |d_i|_i^2,  (|y|*)^2 = sum_i (|y_i|_i*)^2 / weight_i

    Its steepest descent is that of each norm, with the step size 1 / weight_i.

    Attributes:
        parts: Weight and norm of each part.
    """

    parts: Sequence[tuple[float, LargestNorm | PreconditionedNorm]]

    def __call__(self, block: Block, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the dual norms ``(k,)`` of a block, and the maximisers."""
        made = [(weight, *norm(block)) for weight, norm in self.parts]
        dual = reduce(torch.add, (part**2 / weight for weight, part, _ in made)).sqrt()
        best = {
            name: _times(part / (weight * dual), leaf)
            for weight, part, maximisers in made
            for name, leaf in maximisers.items()
        }
        return dual, {name: best[name] for name in block}


def _sums(block: Tensor) -> Tensor:
    """Return the sum of the entries of each vector of a block."""
    return block.reshape(len(block), -1).sum(1)


def _times(factors: Tensor, block: Tensor) -> Tensor:
    """Multiply each vector of a block by its factor; a factor that is not finite counts as 0."""
    factors = torch.where(factors.isfinite(), factors, torch.zeros_like(factors))
    return factors.view(-1, *[1] * (block.dim() - 1)).to(block) * block
