"""Layer norm and batch norm whose second derivatives take few passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.bilinear import Channels, affine
from hessfunc.autograd.functorch import (
    Saved,
    batched,
    is_final_gradient,
    is_last_product,
    once_more,
)
from hessfunc.autograd.fusion import source_of
from hessfunc.autograd.overrides import plain


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``F.layer_norm`` so that its second derivative over the last axis is fast."""
    applies = len(normalized_shape) == 1 and input.requires_grad
    if not (applies and plain(input, weight, bias)):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    x = input.reshape(-1, input.shape[-1])
    with torch.no_grad():
        value, mean, scale = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        z = (x - mean).mul_(scale)
        # Keep a detached tensor. The returned one would keep its own graph alive, in a cycle.
        kept = z.detach()
    returned = value if weight is None else z
    standard = _Standardised.apply(x, [returned], kept, scale, eps)  # type: ignore[no-untyped-call]
    if weight is not None:
        standard = affine(Channels(2), standard, weight, bias, value=value)
    return standard.view(input.shape)


class _Standardised(torch.autograd.Function):
    """Standardised rows z = r (x - mean x) with r = (var x + eps)^-1/2.

    The Jacobian of a row of length C is symmetric: P = r (I - 11'/C - zz'/C).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, returned: list[Tensor], z: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        ctx.before = Saved(x)
        ctx.known, ctx.eps = (z, scale), eps
        return returned[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        z, scale = ctx.known
        if not torch.is_grad_enabled():
            of_x = _projected(_centred(g), z, scale)[0]
        elif batched(g):
            # vmap would pass its wrapped tensors to a Function without a vmap rule.
            (x,) = ctx.before.tensors()
            of_x = _by_definition(g, x, ctx.eps)
        else:
            (x,) = ctx.before.tensors()
            of_x = _Projected.apply(g, *once_more(x), z, scale, ctx.eps, ctx.before)  # type: ignore[no-untyped-call]
        return of_x, None, None, None, None


def _centred(v: Tensor) -> Tensor:
    return v - v.mean(-1, keepdim=True)


def _projected(centred: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return P v = r (v - mean(v z) z) and mean(v z), given v minus its mean."""
    along = _mean_product(centred, z)
    return torch.addcmul(centred, along, z, value=-1).mul_(scale), along


def _mean_product(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).mean(-1, keepdim=True)


class _Projected(torch.autograd.Function):
    """Product P g of the Jacobian with a cotangent.

    For a cotangent v of P g, with the means of v and g subtracted, a = mean(v z) and
    b = mean(g z):

        d<v, P g>/dg = P v,
        d<v, P g>/dx = -r^2 (b v + a g + z (mean(v g) - 3 a b)).
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, z: Tensor, scale: Tensor, eps: float, before: Saved
    ) -> Tensor:
        ctx.known, ctx.eps = (z, scale), eps
        curved, final = ctx.needs_input_grad[1], is_final_gradient()
        ctx.of_gradient = _of_gradient(g, z, scale) if curved and final else None
        ctx.saved = Saved(g, x) if curved and not final else Saved()
        if final:
            before.free()
        return _projected(_centred(g), z, scale)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        needs_x = ctx.needs_input_grad[1]
        if torch.is_grad_enabled() and needs_x:
            saved_g, saved_x = ctx.saved.tensors()
            return *_by_autograd(saved_g, saved_x, v, ctx.eps), None, None, None, None
        z, scale = ctx.known
        centred = _centred(v)
        of_g, a = _projected(centred, z, scale)
        if not needs_x:
            return of_g, None, None, None, None, None
        if ctx.of_gradient is None:
            ctx.of_gradient = _of_gradient(ctx.saved.tensors()[0], z, scale)
        scaled, b = ctx.of_gradient
        if is_last_product():
            ctx.known = ctx.of_gradient = None
        of_x = torch.addcmul(b * centred, a, scaled)
        along = _mean_product(centred, scaled) - 3 * a * b
        return of_g, of_x.addcmul(along, z).neg(), None, None, None, None


def _of_gradient(g: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return r^2 g, with the mean of g subtracted, and its b; neither depends on v."""
    scaled = _centred(g) * scale**2
    return scaled, _mean_product(scaled, z)


def _by_definition(g: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return P g, composed of functions that torch differentiates."""
    centred = _centred(x)
    scale = torch.rsqrt(_mean_product(centred, centred) + eps)
    return _projected(_centred(g), centred * scale, scale)[0]


def _by_autograd(g: Tensor, x: Tensor, v: Tensor, eps: float) -> tuple[Tensor | None, ...]:
    # Used for derivatives of higher order than a Hessian product. The views separate g from x,
    # on which it may depend.
    g, x = g.view_as(g), x.view_as(x)
    moving = [t for t in (g, x) if t.requires_grad]
    gradient = torch.autograd.grad(
        _by_definition(g, x, eps), moving, v, create_graph=True, allow_unused=True
    )
    slopes = iter(gradient)
    return tuple(next(slopes) if t.requires_grad else None for t in (g, x))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``F.batch_norm`` so that its second derivative is fast.

    With running statistics, batch norm is ``scale x + shift``. After a convolution or linear layer
    B(x, w) + b it is fused into that layer:

        scale (B(x, w) + b) + shift = B(x, scale w) + (scale b + shift).

    The value is torch's; the derivatives are those of the fused layer. No gradient passes through
    the input itself, so a loss that differentiates with respect to the input gets autograd's
    error that it is not in the graph.
    """
    known = running_mean, running_var, weight, bias
    if (
        training
        or running_mean is None
        or running_var is None
        or running_mean.requires_grad
        or running_var.requires_grad
        or not plain(input, *known)
    ):
        return F.batch_norm(input, *known, training, momentum, eps)
    with torch.no_grad():
        value = F.batch_norm(input, *known, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else weight * scale
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    source = source_of(input)
    if source is None or source.w.dtype != scale.dtype:
        form = Channels(input.dim())
        return affine(form, input, scale, shift, value=value)
    if source.b is not None:
        shift = shift + source.b * scale
    w = source.w * scale.view(-1, *[1] * (source.w.dim() - 1))
    return affine(source.form, source.x, w, shift, value=value)
