"""What Hessian backpropagation needs to know of a module on a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessfunc.kronecker.blocks import Block, Congruence, Dense, DirectSum, Kronecker
from hessfunc.kronecker.jacobians import EachExample, Jacobian
from hessfunc.transforms.positive_curvature import Residual, positive


@dataclass(frozen=True)
class Call:
    """One call of a module, or of a function, on a batch.

    Attributes:
        function: ``(params, *inputs) -> output``, pure.
        params: the module's own parameters; empty for a function.
        inputs: the tensors that it is called on, the examples along their first axes.
        moving: the numbers of those inputs that depend on the parameters.
        module: for its options; None for a function.
        shape: of one example's output.
    """

    function: Callable[..., Tensor]
    params: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    moving: tuple[int, ...]
    module: nn.Module | None
    shape: torch.Size

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(self.params, *inputs)


@dataclass(frozen=True)
class Layer:
    """The derivatives of a module on a batch.

    Attributes:
        jacobian: of the output, with respect to the moving inputs.
        curvature: the gradient of the loss at the output ``(B, m)`` -> ``sum_b sum_k g_bk H_bk``
            with H_bk the Hessian of the k-th output with respect to the input: the matrix
            ``(n, n)``, or ``(n,)`` where it is diagonal. None where it is zero.
        parameters: how the output depends on each parameter, by its name in the module.
    """

    jacobian: Jacobian
    curvature: Callable[[Tensor], Tensor] | None = None
    parameters: Mapping[str, Dependence] = field(default_factory=dict)


def with_sign(curvature: Tensor, residual: Residual) -> Tensor:
    """A diagonal ``(n,)`` or a matrix ``(n, n)`` with what is negative replaced."""
    if curvature.dim() == 1 or residual == "none":
        return positive(curvature, residual)
    values, vectors = torch.linalg.eigh(curvature)
    return (vectors * positive(values, residual)) @ vectors.mT


class Dependence(ABC):
    """How the output of a module depends on one of its parameters."""

    @abstractmethod
    def entries(self, width: int, *, average: bool) -> int:
        """The numbers in memory that the block of an output of this width takes."""

    @abstractmethod
    def block(
        self,
        hessian: Tensor,
        slope: Tensor | None,
        residual: Residual,
        *,
        average: bool,
        max_blocks: int | None,
    ) -> Block:
        """The block of this parameter.

        Args:
            hessian: with respect to the output, ``(m, m)``.
            slope: the gradient of the loss at the output, ``(B, m)``; None where not needed.
            residual: what is done with negative curvature.
            average: take the mean Jacobian, not the mean of J'HJ.
            max_blocks: cut the rows of a linear layer in at most so many parts.
        """


@dataclass(frozen=True)
class SharedWeight(Dependence):
    """A weight that acts on all positions: ``z[b, g, o, p] = sum_k W[g, o, k] X[b, g, k, p]``.

    Attributes:
        of: the inputs of the module ``(B, ...)`` -> X.
        inputs: of the module.
        shape: of the parameter.
        groups: how many there are.
        is_affine: whether X is affine in the inputs, so that the mean X is X at the mean input.
        channels_last: whether the outputs are ordered (p, g, o), not (g, o, p).
        splits: whether its rows may be cut in parts.
    """

    of: Callable[[Tensor], Tensor]
    inputs: Tensor
    shape: torch.Size
    groups: int = 1
    is_affine: bool = True
    channels_last: bool = False
    splits: bool = False

    def each(self) -> Tensor:
        """X, ``(B, G, K, P)``."""
        return self.of(self.inputs)

    def mean(self) -> Tensor:
        """The mean of X over examples, ``(1, G, K, P)``."""
        if self.is_affine:
            return self.of(self.inputs.mean(0, keepdim=True))
        return self.each().mean(0, keepdim=True)

    def entries(self, width: int, *, average: bool) -> int:
        inner = min(self.shape.numel(), width) ** 2
        if average:
            return inner
        channels, fan_in = self.shape[0], self.shape[1:].numel()
        examples = len(self.inputs) * self.groups * fan_in * (width // channels)
        return inner + examples + (fan_in**2 if width == channels else 0)

    def slopes(self, slope: Tensor) -> Tensor:
        """The gradient at the outputs ``(B, m)`` as ``(B, G, O, P)``."""
        channels, groups = self.shape[0], self.groups
        if self.channels_last:
            slope = slope.view(len(slope), -1, channels).mT
        return slope.reshape(len(slope), groups, channels // groups, -1)

    def by_channel(self, hessian: Tensor) -> Tensor:
        """A matrix on the outputs with these ordered (g, o, p)."""
        channels = self.shape[0]
        positions = len(hessian) // channels
        if not self.channels_last or positions == 1:
            return hessian
        view = hessian.view(positions, channels, positions, channels)
        return view.permute(1, 0, 3, 2).reshape(hessian.shape)

    def block(
        self,
        hessian: Tensor,
        slope: Tensor | None,
        residual: Residual,
        *,
        average: bool,
        max_blocks: int | None,
    ) -> Block:
        ordered = self.by_channel(hessian)
        inputs = self.mean() if average else self.each()
        if max_blocks is None or not self.splits:
            return _of_weight(ordered, inputs, self.shape)
        positions = inputs.shape[-1]
        rows = torch.arange(len(ordered), device=ordered.device).view(-1, positions)
        parts = [
            _of_weight(
                ordered[part.flatten()][:, part.flatten()],
                inputs,
                torch.Size((len(part), *self.shape[1:])),
            )
            for part in rows.chunk(max_blocks)
        ]
        return DirectSum(tuple(parts), self.shape)


def _of_weight(hessian: Tensor, inputs: Tensor, shape: torch.Size) -> Block:
    examples, groups, fan_in, positions = inputs.shape
    hessian, inputs = hessian.contiguous(), inputs.contiguous()
    if examples > 1 and groups == positions == 1:
        rows = inputs[:, 0, :, 0]
        return Kronecker(hessian[None], (rows.mT @ rows / examples)[None], shape)
    block = Congruence(hessian, inputs, shape)
    # With more positions than inputs the matrix on the weights is the smaller one.
    return Dense(block.dense(), shape) if fan_in <= positions else block


@dataclass(frozen=True)
class General(Dependence):
    """A parameter of any differentiable module.

    Attributes:
        jacobians: of the output, ``(B, m, n)``, when called.
        examples: B.
        curvature: as in `Layer`, with respect to the parameter.
        shape: of the parameter.
    """

    jacobians: Callable[[], Tensor]
    examples: int
    curvature: Callable[[Tensor], Tensor]
    shape: torch.Size

    def entries(self, width: int, *, average: bool) -> int:
        n = self.shape.numel()
        return self._jacobian(width).entries + n**2

    def block(
        self,
        hessian: Tensor,
        slope: Tensor | None,
        residual: Residual,
        *,
        average: bool,
        max_blocks: int | None,
    ) -> Block:
        jacobian = self._jacobian(len(hessian))
        inner = jacobian.congruence if average else jacobian.mean_congruence
        ((matrix,),) = inner(hessian)
        if slope is not None and residual != "zero":
            matrix = matrix + with_sign(self.curvature(slope), residual)
        return Dense(matrix, self.shape)

    def _jacobian(self, width: int) -> EachExample:
        return EachExample(self.jacobians, (self.examples, width, self.shape.numel()))
