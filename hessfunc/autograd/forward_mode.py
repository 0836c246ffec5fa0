"""Compositions of torch functions that forward mode can differentiate.

torch has no forward derivative for the backward of the original functions, or one that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.chunked_attention import IN_CHUNKS
from hessfunc.autograd.corrections import EXACT, REFUSED, SYMMETRIC
from hessfunc.autograd.embedding import padded_embedding
from hessfunc.autograd.functorch import nodes_of
from hessfunc.autograd.overrides import Replacements, getter


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None:
        options = {"size_average": size_average, "reduce": reduce, "weight": weight}
        weighted: Any = F.mse_loss
        return weighted(input, target, reduction=reduction, **options)
    difference = input - target
    return _reduced(difference * difference, size_average, reduce, reduction)


def _huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    difference = input - target
    size = difference.abs()
    near = 0.5 * difference * difference
    values = torch.where(size <= delta, near, delta * (size - 0.5 * delta))
    return _reduced(values if weight is None else values * weight, None, None, reduction)


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _reduced(-F.logsigmoid(target * input), size_average, reduce, reduction)


def _reduced(
    values: Tensor, size_average: bool | None, reduce: bool | None, reduction: str
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    match reduction:
        case "mean":
            return values.mean()
        case "sum":
            return values.sum()
    return values


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    # The backward of the original has a forward derivative only where it is recorded.
    return input * torch.sigmoid(input)


def _set_grad_enabled(mode: bool) -> Any:
    """Switch reverse and forward mode together, so that ``no_grad`` makes constants in both."""
    torch._C._set_fwd_grad_enabled(mode)
    return torch._C._set_grad_enabled(mode)


def _data(tensor: Tensor, *_: Any) -> Tensor:
    # `.data` of a tensor wrapped by torch.func would keep its tangent.
    return tensor.detach()


_with_tangents: ContextVar[bool] = ContextVar("with tangents", default=False)


# Nodes whose backward, unless it is recorded, reads factors of a matrix that carry no tangent; that
# of a recomputed function may contain them.
_RECORDED = ("LinalgSolveEx", "LinalgDet", "LinalgSlogdet", "_Recomputed")


def must_record(ends: Sequence[Tensor], /) -> bool:
    """Return whether a backward pass has its forward derivative only if it is recorded."""
    return any(node.name().startswith(_RECORDED) for node in nodes_of(ends))


def pulled_once(pullback: Callable[..., tuple[Tensor, ...]], cotangent: Tensor, /) -> Any:
    """Return a pullback of torch.func with the tangents of its result, and free its graph.

    `torch.func.grad` would record the backward pass, and keep both graphs until its end.
    """
    token = _with_tangents.set(True)
    try:
        return pullback(cotangent, retain_graph=False, create_graph=False)
    finally:
        _with_tangents.reset(token)


def _grad(*args: Any, **kwargs: Any) -> Any:
    """Compute ``torch.autograd.grad``; without ``create_graph`` the result is a constant."""
    if _with_tangents.get():
        # Gradients inside the backward pass are those of the user's own functions.
        _with_tangents.set(False)
        return torch.autograd.grad(*args, **kwargs)
    gradient = torch.autograd.grad(*args, **kwargs)
    if kwargs.get("create_graph", args[4] if len(args) > 4 else False):
        return gradient
    return tuple(None if g is None else g.detach() for g in gradient)


FORWARD: Replacements = {
    **EXACT,
    **SYMMETRIC,
    **REFUSED,
    **IN_CHUNKS,
    F.embedding: padded_embedding,
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
    F.glu: _glu,
    F.silu: _silu,
    torch._C._set_grad_enabled: _set_grad_enabled,
    getter("data"): _data,
    torch.autograd.grad: _grad,
}

# Replacements for finite differences.
DIFFERENCES: Replacements = {
    **EXACT,
    **SYMMETRIC,
    **IN_CHUNKS,
    F.embedding: padded_embedding,
}
