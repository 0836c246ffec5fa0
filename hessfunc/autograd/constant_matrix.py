"""Products with a constant symmetric matrix, as functions of autograd and of torch.func.

A kept graph holds the matrix at fixed parameters. Autograd and the transforms of `torch.func` take
everything inside it as a constant, which is right for the parameters only if they need no gradient,
and wrong for the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import Function

from hessfunc.autograd.functorch import nodes_of

# Product with the leaves of a block.
Product: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _OfVectors(Function):
    """Product of a constant symmetric matrix with a block, as a function of the block.

    By symmetry, both derivatives are products with the same matrix.
    """

    @staticmethod
    def forward(product: Product, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(product(tangents))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.product = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, *of_vectors(ctx.product, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return of_vectors(ctx.product, tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], product: Product, *tangents: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # The mapped axis joins the probe axis, so that all vectors go through one pass.
        size = info.batch_size
        blocks = [
            t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tangents, in_dims[1:], strict=True)
        ]
        outs = of_vectors(product, [t.flatten(0, 1) for t in blocks])
        return tuple(out.unflatten(0, (size, -1)) for out in outs), (0,) * len(outs)


def of_vectors(product: Product, tangents: Sequence[Tensor], /) -> tuple[Tensor, ...]:
    """Apply a constant symmetric matrix to a block, with the graph of the block.

    Args:
        product: Product with the leaves of a block.
        tangents: Leaves of the block.
    """
    outs: tuple[Tensor, ...] = _OfVectors.apply(product, *tangents)  # type: ignore[no-untyped-call]
    return outs


class _Refused(Function):
    """Identity whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(ctx.message)


def refusing_gradients(
    constants: Sequence[Tensor], outs: Sequence[Tensor], message: str, /
) -> Sequence[Tensor]:
    """Return products whose gradient is refused, as it would leave out some tensors.

    Args:
        constants: Tensors that require a gradient and are constants of the products.
        outs: Products.
        message: Message of the error that the backward pass raises.
    """
    refused: tuple[Tensor, ...] = _Refused.apply(  # type: ignore[no-untyped-call]
        message, len(outs), *outs, *constants
    )
    return refused


def leaves_of_graph(ends: Sequence[Tensor], inputs: Sequence[Tensor], /) -> list[Tensor]:
    """Return the leaves of a graph that require a gradient, other than its inputs."""
    known = set(map(id, inputs))
    leaves = [getattr(node, "variable", None) for node in nodes_of(ends)]
    found = {id(x): x for x in leaves if isinstance(x, Tensor) and id(x) not in known}
    return list(found.values())
