"""Layer normalisation, with what depends on the gradient alone computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.transforms.kernels.bilinear import Layer, affine
from hessfunc.transforms.kernels.replaced import plain

__all__ = ["layer_norm"]


def layer_norm(twice: bool) -> Callable[..., Tensor]:
    """``F.layer_norm`` over the last axis, to be differentiated twice."""

    def normalised(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        applies = len(normalized_shape) == 1 and input.requires_grad
        if not (applies and plain(input, weight, bias)):
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        x = input.reshape(-1, input.shape[-1])
        with torch.no_grad():
            value, mean, scale = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
            known = (x - mean).mul_(scale)
        standard = _Standardised.apply(x, [known], scale, eps, twice)  # type: ignore[no-untyped-call]
        if weight is not None:
            standard = affine(Features(), standard, weight, bias, value=value, twice=twice)
        return standard.view(input.shape)

    return normalised


@dataclass(frozen=True)
class Features(Layer):
    """y = x with each column c times w_c, with x ``[R, C]``."""

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        return x * self.spread(w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        return g * self.spread(w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        return (g * x).sum(-2)

    def spread(self, b: Tensor, /) -> Tensor:
        return b.unsqueeze(-2)

    def gathered(self, g: Tensor, /) -> Tensor:
        return g.sum(-2)


class _Standardised(torch.autograd.Function):
    """z = r (x - mean x), r = (var x + eps)^-1/2, of each row.

    Its Jacobian is symmetric: P = r (I - 11'/C - zz'/C).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, known: list[Tensor], scale: Tensor, eps: float, twice: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.known = known[0].view_as(known[0]), scale
        ctx.eps, ctx.twice = eps, twice
        return known[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        z, scale = ctx.known
        if not torch.is_grad_enabled():
            return _projected(g - g.mean(-1, keepdim=True), z, scale)[0], None, None, None, None
        (x,) = ctx.saved_tensors
        x = x if ctx.twice else x.detach()
        return _Projected.apply(g, x, z, scale, ctx.eps), None, None, None, None  # type: ignore[no-untyped-call]


def _projected(centred: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """P v and mean(v z), of v less its mean."""
    along = _mean_product(centred, z)
    return torch.addcmul(centred, along, z, value=-1).mul_(scale), along


def _mean_product(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).mean(-1, keepdim=True)


class _Projected(torch.autograd.Function):
    """P g. With a = mean(v z), b = mean(g z), and v and g less their means,

    d<v, P g>/dx = -r^2 (b v + a g + z (mean(v g) - 3 a b)).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, z: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.known, ctx.eps = (z, scale), eps
        ctx.of_gradient = None
        return _projected(g - g.mean(-1, keepdim=True), z, scale)[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_by_autograd(g, x, v, ctx.eps), None, None, None
        z, scale = ctx.known
        centred = v - v.mean(-1, keepdim=True)
        of_g, a = _projected(centred, z, scale)
        if not ctx.needs_input_grad[1]:
            return of_g, None, None, None, None
        if ctx.of_gradient is None:
            scaled = (g - g.mean(-1, keepdim=True)) * scale**2
            ctx.of_gradient = scaled, _mean_product(scaled, z)
        scaled, b = ctx.of_gradient
        of_x = torch.addcmul(b * centred, a, scaled)
        along = _mean_product(centred, scaled) - 3 * a * b
        return of_g, of_x.addcmul(along, z).neg(), None, None, None


def _by_autograd(g: Tensor, x: Tensor, v: Tensor, eps: float) -> tuple[Tensor | None, ...]:
    # Derivatives of a higher order than those of a product. Views, as g may depend on x.
    g, x = g.view_as(g), x.view_as(x)
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(_mean_product(centred, centred) + eps)
    found = _projected(g - g.mean(-1, keepdim=True), centred * scale, scale)[0]
    return torch.autograd.grad(found, (g, x), v, create_graph=True, allow_unused=True)
