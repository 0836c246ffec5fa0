"""Jacobians of modules on a batch: how a Hessian goes back through one of them.

Outputs and inputs are flat, ``m`` and ``n`` entries an example. A matrix on the outputs goes back
in two ways: its rows times the mean Jacobian, or the mean of ``J_b' H J_b`` over examples.
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
    """The Jacobians J_b of one module, with respect to one or several inputs."""

    @abstractmethod
    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        """Rows ``(k, m)`` times the mean Jacobian: ``(k, n)`` for each input."""

    @property
    def entries(self) -> int:
        """The numbers in memory that it takes beside the matrices that it maps."""
        return 0

    def congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        """``J' H J`` with the mean Jacobian, for each pair of inputs."""
        half = self.pull(hessian)
        return [list(self.pull(part.mT)) for part in half]

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        """The mean of ``J_b' H J_b`` over examples, for each pair of inputs."""
        return self.congruence(hessian)


@dataclass(frozen=True)
class Identity(Jacobian):
    """J = I: a change of shape."""

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows,)

    def congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        return [[hessian]]


@dataclass(frozen=True)
class OfAll(Jacobian):
    """One linear map for all examples.

    Attributes:
        adjoint: cotangents ``(k, *output shape)`` -> ``(k, *input shape)`` for each input.
        shape: of one example's output.
        width: the entries of the largest tensor an example, of inputs and outputs.
    """

    adjoint: Callable[[Tensor], Sequence[Tensor]]
    shape: torch.Size
    width: int

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        parts = [
            [found.flatten(1) for found in self.adjoint(some.reshape(len(some), *self.shape))]
            for some in rows.split(max(1, AT_ONCE // self.width))
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))


@dataclass(frozen=True)
class Diagonal(Jacobian):
    """J_b = diag(slope_b), of an elementwise function.

    Attributes:
        slopes: ``(B, n)``, or ``(1, n)`` where all examples have the same.
    """

    slopes: Tensor

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows * self.slopes.mean(0),)

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        return [[hessian * (self.slopes.mT @ self.slopes / len(self.slopes))]]


@dataclass(frozen=True)
class Selection(Jacobian):
    """Each output is one of the inputs, and which one depends on the example: max-pooling.

    Attributes:
        chosen: the input of each output, ``(B, m)``.
        n: the number of inputs.
    """

    chosen: Tensor
    n: int

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
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
        for chosen in self.chosen:
            half = hessian.new_zeros(self.n, len(hessian)).index_add_(0, chosen, hessian)
            total.index_add_(1, chosen, half)
        return [[total / len(self.chosen)]]


@dataclass(frozen=True)
class EachExample(Jacobian):
    """A matrix of its own for each example.

    Attributes:
        formed: gives them, ``(B, m, n)``.
        shape: B, m and n.
    """

    formed: Callable[[], Tensor]
    shape: tuple[int, int, int]

    @property
    def entries(self) -> int:
        # Twice the Jacobians, and the second derivatives of the outputs.
        count, outputs, inputs = self.shape
        return count * inputs * (2 * outputs + inputs)

    @cached_property
    def matrices(self) -> Tensor:
        """The Jacobians, formed when they are first needed."""
        return self.formed()

    def pull(self, rows: Tensor, /) -> tuple[Tensor, ...]:
        return (rows @ self.matrices.mean(0),)

    def mean_congruence(self, hessian: Tensor, /) -> list[list[Tensor]]:
        images = (hessian @ self.matrices).flatten(0, 1)
        return [[self.matrices.flatten(0, 1).mT @ images / len(self.matrices)]]
