"""Jacobians of modules on a batch, which propagate a Hessian backwards.

Outputs and inputs are flat, with ``m`` and ``n`` entries for each example. A matrix H on the
outputs is propagated in one of two ways (Dangel, Harmeling and Hennig 2019, arXiv 1902.01813):

    Jbar' H Jbar  with the mean Jacobian Jbar = mean_b J_b,  or  mean_b J_b' H J_b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.memory import AT_ONCE


class Jacobian(ABC):
    """Jacobians J_b of one module, with respect to one or several inputs."""

    @abstractmethod
    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        """Multiply rows ``(k, m)`` by the mean Jacobian: ``(k, n)`` for each input."""

    @property
    def entries(self) -> int:
        """Number of entries in memory, in addition to the matrices that are propagated."""
        return 0

    def congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        """Return ``Jbar' H Jbar`` with the mean Jacobian, for each pair of inputs."""
        # With half_i = H J_i, the block is half_i' J_j = J_i' H J_j, because H is symmetric.
        half = self.pull(hessian)
        return [list(self.pull(part.mT)) for part in half]

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        """Return the mean of ``J_b' H J_b`` over examples, for each pair of inputs."""
        return self.congruence(hessian)


@dataclass(frozen=True)
class Identity(Jacobian):
    """Jacobian J = I of a change of shape."""

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows,)

    def congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        return [[hessian]]


@dataclass(frozen=True)
class OfAll(Jacobian):
    """Linear map that all examples share.

    Attributes:
        adjoint: Transposed map from cotangents ``(k, *output shape)`` to ``(k, *input shape)`` for
            each input.
        shape: Shape of the output of one example.
        width: Number of entries of the largest input or output of one example.
    """

    adjoint: Callable[[Tensor], Sequence[Tensor]]
    shape: torch.Size
    width: int

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        parts = [
            [pulled.flatten(1) for pulled in self.adjoint(part.reshape(len(part), *self.shape))]
            for part in rows.split(max(1, AT_ONCE // self.width))
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@dataclass(frozen=True)
class Diagonal(Jacobian):
    """Jacobians J_b = diag(slope_b) of an elementwise function.

    Attributes:
        slopes: Slopes ``(B, n)``, or ``(1, n)`` if all examples share them.
    """

    slopes: Tensor

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows * self.slopes.mean(0),)

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        # mean_b diag(s_b) H diag(s_b) = H * mean_b(s_b s_b'), entry by entry.
        return [[hessian * (self.slopes.mT @ self.slopes / len(self.slopes))]]


@dataclass(frozen=True)
class Selection(Jacobian):
    """Jacobians of a selection of inputs that depends on the example, such as max-pooling.

    Attributes:
        chosen: Index of the input that each output equals, ``(B, m)``.
        n: Number of inputs.
    """

    chosen: Tensor
    n: int

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        # Jbar[i, j] is the fraction of examples whose output i is input j: a sparse matrix.
        count, outputs = self.chosen.shape
        places = torch.stack(
            [torch.arange(outputs, device=rows.device).expand(count, -1), self.chosen]
        )
        share = torch.full((count * outputs,), 1 / count, dtype=rows.dtype, device=rows.device)
        mean = torch.sparse_coo_tensor(
            places.flatten(1), share, (outputs, self.n), check_invariants=False
        )
        return (torch.sparse.mm(mean.coalesce().mT, rows.mT).mT,)

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        total = hessian.new_zeros(self.n, self.n)
        # (J' H J)[c_i, c_j] += H[i, j], first along the rows, then along the columns.
        for chosen in self.chosen:
            half = hessian.new_zeros(self.n, len(hessian)).index_add_(0, chosen, hessian)
            total.index_add_(1, chosen, half)
        return [[total / len(self.chosen)]]


@dataclass(frozen=True)
class EachExample(Jacobian):
    """Jacobians that are dense matrices, one for each example.

    Attributes:
        formed: Function that computes the Jacobians, ``(B, m, n)``.
        shape: Sizes B, m and n.
    """

    formed: Callable[[], Tensor]
    shape: tuple[int, int, int]

    @property
    def entries(self) -> int:
        # Two copies of the Jacobians, (B, m, n), and the second derivatives, (B, n, n).
        count, outputs, inputs = self.shape
        return count * inputs * (2 * outputs + inputs)

    @cached_property
    def matrices(self) -> Tensor:
        """Jacobians ``(B, m, n)``, computed on first use."""
        return self.formed()

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows @ self.matrices.mean(0),)

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        # sum_b J_b' (H J_b) is one product of matrices with B m rows.
        products = (hessian @ self.matrices).flatten(0, 1)
        return [[self.matrices.flatten(0, 1).mT @ products / len(self.matrices)]]
