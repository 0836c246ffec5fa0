"""Arithmetic of vectors that are lists of tensors, one for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.options import described, factor, tensors, validated


def _vectors(name: str, value: Any, /) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(
            f"{name} must be a list of vectors, not {described(value)}: pass {name}=[] for none"
        )
    return [tensors(f"each of {name}", vector) for vector in value]


def refuse_unlike(first: Sequence[Tensor], /, **others: Sequence[Tensor]) -> None:
    """Raise if vectors have different shapes.

    Args:
        first: Vector with the expected shapes.
        others: Other vectors by the names of their arguments.

    Raises:
        ValueError: If a vector has other shapes than the first.
    """
    expected = [tuple(x.shape) for x in first]
    for name, other in others.items():
        if (shapes := [tuple(x.shape) for x in other]) != expected:
            raise ValueError(
                f"{name} has tensors of shapes {shapes}, where {expected} is expected: pass one "
                "tensor for each parameter, with its shape"
            )


@validated(xs=tensors, ys=tensors)
def group_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors, a tensor without axes.

    Raises:
        ValueError: If the vectors have different shapes.
    """
    refuse_unlike(xs, ys=ys)
    return torch.stack([torch.sum(x * y) for x, y in zip(xs, ys, strict=True)]).sum()


@validated(params=tensors, update=tensors, alpha=factor)
def group_add(
    params: Sequence[Tensor], update: Sequence[Tensor], alpha: float | Tensor = 1
) -> Sequence[Tensor]:
    """Compute ``params + alpha * update`` in place, and return ``params``.

    Raises:
        ValueError: If the vectors have different shapes, or if the dtype of ``params`` cannot
            store the sum.
    """
    refuse_unlike(params, update=update)
    for param in params:
        if not param.is_floating_point():
            raise ValueError(
                f"a tensor of params has dtype {param.dtype}, which cannot store the sum: pass "
                "floating-point tensors"
            )
    for param, change in zip(params, update, strict=True):
        param.detach().add_(change.detach() * alpha)
    return params


@validated(v=tensors)
def normalization(v: Sequence[Tensor]) -> list[Tensor]:
    """Return the vector divided by its length; a vector of zeros is returned unchanged."""
    length = float(group_product(v, v)) ** 0.5
    return [x / (length or 1.0) for x in v]


@validated(w=tensors, v_list=_vectors)
def orthnormal(w: Sequence[Tensor], v_list: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Project orthonormal vectors out of w, and return a unit vector; w is not changed.

    Raises:
        ValueError: If a vector of ``v_list`` has other shapes than w.
    """
    for v in v_list:
        refuse_unlike(w, v_list=v)
    # w <- w - (w'v) v for each v. The second pass removes the rounding errors of the first, and
    # two passes are enough.
    for v in (*v_list, *v_list):
        along = group_product(w, v)
        w = [x - along * y for x, y in zip(w, v, strict=True)]
    return normalization(w)


@validated
def get_params_grad(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trainable parameters and copies of their gradients, zeros if there is none."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


@validated(gradsH=tensors, params=tensors, v=tensors)
def hessian_vector_product(
    gradsH: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return ``Hv``, the derivative of ``gradsH'v``, from a gradient with its graph.

    Entries of parameters on which the gradient does not depend are zero.

    Raises:
        ValueError: If the lists have different shapes, or if a parameter requires no gradient.
    """
    refuse_unlike(params, gradsH=gradsH, v=v)
    if not all(param.requires_grad for param in params):
        raise ValueError(
            "a tensor of params requires no gradient: pass the parameters with respect to which "
            "gradsH is the gradient, such as `hessian(...).params`"
        )
    curved = [(g, x) for g, x in zip(gradsH, v, strict=True) if g.requires_grad]
    if not curved:
        return tuple(map(torch.zeros_like, params))
    gradient, along = zip(*curved, strict=True)
    return torch.autograd.grad(
        gradient, params, along, retain_graph=True, allow_unused=True, materialize_grads=True
    )
