"""Values whose derivative is given by the cotangents of products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from hessfunc.autograd.functorch import transforming
from hessfunc.trees import Matvec, Tree, leaves

# Function from cotangents of the values to cotangents of the products.
Pull: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _Answer(Function):
    """Constant values, with the derivative that ``pull`` states."""

    @staticmethod
    def forward(ctx: Any, pull: Pull, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.pull, ctx.count = pull, count
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        # Autograd enables gradients in a backward pass only to differentiate it again.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the second derivative of an eigenvalue, an eigenvector or a matrix function is "
                "not available: call backward without `create_graph=True`, or differentiate the "
                "products themselves, such as `inner(v, apply(matvec, v))`"
            )
        return None, None, *(None,) * ctx.count, *ctx.pull(cotangents)


def answer(values: Sequence[Tensor], products: Sequence[Tensor], pull: Pull, /) -> list[Tensor]:
    """Return values with a graph through products.

    Args:
        values: Values, which have no graph themselves.
        products: Leaves of products with their graph.
        pull: Function from cotangents of the values to cotangents of the products.
    """
    outs = _Answer.apply(pull, len(values), *values, *products)  # type: ignore[no-untyped-call]
    return list(outs)


def products_with_graph(matvec: Matvec, block: Tree, /) -> list[Tensor]:
    """Return the leaves of the products with a block, after checking that they have a graph.

    Raises:
        ValueError: If no product depends on a tensor that requires a gradient.
        NotImplementedError: If a transform is active.
    """
    if transforming():
        raise NotImplementedError(
            "answers about a matrix look at numbers, which a transform of torch.func hides: use "
            "plain autograd with `differentiable=True`, or differentiate the products themselves, "
            "such as `inner(v, apply(matvec, v))`"
        )
    with torch.enable_grad():
        products = leaves(matvec(block))
    if not any(product.requires_grad for product in products):
        raise ValueError(
            "the products of the matvec have no graph, so the answer would be a constant: make the "
            "curvature with `differentiable=True`, from params that require a gradient"
        )
    return products
