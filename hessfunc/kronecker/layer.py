"""Derivatives of a module on a batch, as Hessian backpropagation needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessfunc.kronecker.block import Block
from hessfunc.kronecker.composite_blocks import DirectSum
from hessfunc.kronecker.factored_blocks import Congruence, Dense, Kronecker
from hessfunc.kronecker.jacobians import EachExample, Jacobian
from hessfunc.options import described
from hessfunc.transforms.taps import Residual, positive


@dataclass(frozen=True)
class Call:
    """Call of a module or of a function on a batch.

    Attributes:
        function: Pure function ``(params, *inputs) -> output``.
        params: Own parameters of the module; empty for a function.
        inputs: Input tensors, with the examples along their first axes.
        moving: Indices of the inputs that depend on the parameters.
        module: Module, for its options; None for a function.
        shape: Shape of the output of one example.
    """

    function: Callable[..., Tensor]
    params: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    moving: tuple[int, ...]
    module: nn.Module | None
    shape: torch.Size

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(self.params, *inputs)


def of_rule(name: str, value: object, /) -> Call:
    """Return a call, the argument of a rule."""
    if isinstance(value, Call):
        return value
    raise TypeError(
        f"{name} must be a Call, not {described(value)}: register the rule of a module type with "
        "`rule(Swish)(elementwise)`, for instance, and backpropagation calls it"
    )


@dataclass(frozen=True)
class Layer:
    """Derivatives of a module on a batch.

    Attributes:
        jacobian: Jacobian of the output with respect to the moving inputs.
        curvature: Function from the gradient g of the loss at the output, ``(B, m)``, to
            ``sum_b sum_k g_bk H_bk``, where H_bk is the Hessian of the k-th output with respect to
            the input. The result is ``(n, n)``, or ``(n,)`` if it is diagonal. None if it is zero.
        parameters: Dependence of the output on each parameter, by its name in the module.
    """

    jacobian: Jacobian
    curvature: Callable[[Tensor], Tensor] | None = None
    parameters: Mapping[str, Dependence] = field(default_factory=dict)


def with_sign(curvature: Tensor, residual: Residual) -> Tensor:
    """Replace the negative eigenvalues of a diagonal ``(n,)`` or a matrix ``(n, n)``."""
    if curvature.dim() == 1 or residual == "none":
        return positive(curvature, residual)
    values, vectors = torch.linalg.eigh(curvature)
    return (vectors * positive(values, residual)) @ vectors.mT


class Dependence(ABC):
    """Dependence of the output of a module on one of its parameters."""

    @abstractmethod
    def entries(self, width: int, *, average: bool) -> int:
        """Return the number of entries in memory of the block for an output of a given width."""

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
        """Return the diagonal block of the parameter.

        Args:
            hessian: Hessian with respect to the output, ``(m, m)``.
            slope: Gradient of the loss at the output, ``(B, m)``; None if it is not needed.
            residual: Treatment of negative curvature, as in `hbp`.
            average: Whether to use the mean Jacobian instead of the mean of J'HJ.
            max_blocks: Largest number of parts into which the rows of a linear layer are split.
        """


@dataclass(frozen=True)
class SharedWeight(Dependence):
    """Weight that acts on all positions: ``z[b, g, o, p] = sum_k W[g, o, k] X[b, g, k, p]``.

    Attributes:
        of: Function from the inputs of the module, ``(B, ...)``, to X.
        inputs: Inputs of the module.
        shape: Shape of the parameter.
        groups: Number of groups, G.
        is_affine: Whether X is affine in the inputs, so that the mean X is X at the mean input.
        channels_last: Whether the outputs are ordered (p, g, o) instead of (g, o, p).
        splits: Whether the rows may be split into parts.
    """

    of: Callable[[Tensor], Tensor]
    inputs: Tensor
    shape: torch.Size
    groups: int = 1
    is_affine: bool = True
    channels_last: bool = False
    splits: bool = False

    def each(self) -> Tensor:
        """Return X, ``(B, G, K, P)``."""
        return self.of(self.inputs)

    def mean(self) -> Tensor:
        """Return the mean of X over examples, ``(1, G, K, P)``."""
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
        """View the gradient at the outputs, ``(B, m)``, as ``(B, G, O, P)``."""
        channels, groups = self.shape[0], self.groups
        if self.channels_last:
            slope = slope.view(len(slope), -1, channels).mT
        return slope.reshape(len(slope), groups, channels // groups, -1)

    def by_channel(self, hessian: Tensor) -> Tensor:
        """Reorder the rows and columns of a matrix on the outputs as (g, o, p)."""
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
    """Return the block ``mean_b J_b' H J_b`` of a weight with inputs X, ``(M, G, K, P)``."""
    examples, groups, fan_in, positions = inputs.shape
    hessian, inputs = hessian.contiguous(), inputs.contiguous()
    if examples > 1 and groups == positions == 1:
        # One group and one position: J_b = I (x) x_b', and mean_b J_b' H J_b = H (x) mean_b x x'.
        rows = inputs[:, 0, :, 0]
        return Kronecker(hessian[None], (rows.mT @ rows / examples)[None], shape)
    block = Congruence(hessian, inputs, shape)
    # If there are more positions than inputs, the matrix on the weight is smaller than H.
    return Dense(block.dense(), shape) if fan_in <= positions else block


@dataclass(frozen=True)
class General(Dependence):
    """Parameter of any differentiable module.

    Attributes:
        jacobians: Function that computes the Jacobians of the output, ``(B, m, n)``.
        examples: Number of examples, B.
        curvature: Second term with respect to the parameter, as in `Layer`.
        shape: Shape of the parameter.
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
        # H_theta = J' H_z J + sum_k g_k Hess_theta z_k.
        ((matrix,),) = inner(hessian)
        if slope is not None and residual != "zero":
            matrix = matrix + with_sign(self.curvature(slope), residual)
        return Dense(matrix, self.shape)

    def _jacobian(self, width: int) -> EachExample:
        return EachExample(self.jacobians, (self.examples, width, self.shape.numel()))
