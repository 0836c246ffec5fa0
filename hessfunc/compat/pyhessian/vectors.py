"""Arithmetic of vectors that are lists of tensors, one for each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def group_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors, a tensor without axes."""
    return torch.stack([torch.sum(x * y) for x, y in zip(xs, ys, strict=True)]).sum()


def group_add(
    params: Sequence[Tensor], update: Sequence[Tensor], alpha: float | Tensor = 1
) -> Sequence[Tensor]:
    """Compute ``params + alpha * update`` in place, and return ``params``."""
    for param, change in zip(params, update, strict=True):
        param.detach().add_(change.detach() * alpha)
    return params


def normalization(v: Sequence[Tensor]) -> list[Tensor]:
    """Return the vector divided by its length; a vector of zeros is returned unchanged."""
    length = float(group_product(v, v)) ** 0.5
    return [x / (length or 1.0) for x in v]


def orthnormal(w: Sequence[Tensor], v_list: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Project orthonormal vectors out of w, and return a unit vector; w is not changed."""
    # w <- w - (w'v) v for each v. The second pass removes the rounding errors of the first, and
    # two passes are enough.
    for v in (*v_list, *v_list):
        along = group_product(w, v)
        w = [x - along * y for x, y in zip(w, v, strict=True)]
    return normalization(w)


def get_params_grad(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trainable parameters and copies of their gradients, zeros if there is none."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def hessian_vector_product(
    gradsH: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return ``Hv``, the derivative of ``gradsH'v``, from a gradient with its graph.

    Entries of parameters on which the gradient does not depend are zero.
    """
    curved = [(g, x) for g, x in zip(gradsH, v, strict=True) if g.requires_grad]
    if not curved:
        return tuple(map(torch.zeros_like, params))
    gradient, along = zip(*curved, strict=True)
    return torch.autograd.grad(
        gradient, params, along, retain_graph=True, allow_unused=True, materialize_grads=True
    )
