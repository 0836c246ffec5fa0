"""Smooth activations whose first and second derivatives are computed once and kept.

torch recomputes both for each product, including their exponentials. With kept derivatives, a
product only multiplies: for y = f(x) and the cotangent g of y,

    dy = f'(x) dx,   d(g f'(x)) = f'(x) dg + g f''(x) dx.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import (
    Saved,
    batched,
    is_final_gradient,
    is_last_product,
    once_more,
)
from hessfunc.autograd.overrides import plain

Map = Callable[[Tensor], Tensor]

# Smallest number of entries for which the call overhead pays off.
_LARGE = 2**14


@dataclass(frozen=True)
class _Activation:
    """Activation f and its derivatives, composed of functions that torch differentiates.

    Attributes:
        value: Activation f.
        slope: Derivative f'(x) as a function of the kept tensor.
        curve: Derivative of ``slope`` with respect to the kept tensor.
        keeps_output: Whether the kept tensor is f(x), as in torch, instead of x.
    """

    value: Map
    slope: Map
    curve: Map
    keeps_output: bool = False


def elementwise(original: Map) -> Callable[..., Tensor]:
    """Return a replacement of ``F.silu``, ``tanh`` or ``sigmoid`` for second derivatives."""
    activation = _ACTIVATIONS[original]

    def mapped(input: Tensor, *options: Any, **named: Any) -> Tensor:
        plainly = not options and (not named or named == {"inplace": False})
        if not (plainly and _applies(input)):
            return original(input, *options, **named)
        return _Mapped.apply(activation, input)  # type: ignore[no-untyped-call]

    return mapped


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Compute ``F.gelu`` so that its second derivative is fast."""
    activation = _GELUS.get(approximate)
    if activation is None or not _applies(input):
        return F.gelu(input, approximate=approximate)
    return _Mapped.apply(activation, input)  # type: ignore[no-untyped-call]


def _applies(x: Tensor) -> bool:
    return x.numel() >= _LARGE and x.requires_grad and plain(x)


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: _Activation, x: Tensor) -> Tensor:
        y = activation.value(x)
        if activation.keeps_output:
            ctx.save_for_backward(y)
        ctx.before = Saved() if activation.keeps_output else Saved(x)
        ctx.activation, ctx.slope = activation, None
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if (slope := ctx.slope) is not None and not torch.is_grad_enabled():
            ctx.slope = None if is_last_product() else slope
            return None, g * slope
        (kept,) = ctx.saved_tensors or ctx.before.tensors()
        if torch.is_grad_enabled() and batched(g):
            # vmap would pass its wrapped tensors to a Function without a vmap rule.
            return None, g * ctx.activation.slope(kept)
        if ctx.slope is None:
            with torch.no_grad():
                ctx.slope = ctx.activation.slope(kept)
        if not torch.is_grad_enabled():
            return None, g * ctx.slope
        options = ctx.slope, ctx.before
        return None, _Scaled.apply(ctx.activation, g, *once_more(kept), *options)  # type: ignore[no-untyped-call]


class _Scaled(torch.autograd.Function):
    """Cotangent g f'(x), given the slope f'(x)."""

    @staticmethod
    def forward(
        ctx: Any, activation: _Activation, g: Tensor, kept: Tensor, slope: Tensor, before: Saved
    ) -> Tensor:
        ctx.activation, ctx.slope, ctx.curve = activation, slope, None
        curved, final = ctx.needs_input_grad[2], is_final_gradient()
        if curved and final:
            ctx.curve = g * activation.curve(kept)
        ctx.saved = Saved(g, kept) if curved and not final else Saved()
        if final:
            before.free()
        return g * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        # The cotangent v of g slope(kept) gives v slope for g and v g curve for the kept tensor.
        _, needs_g, needs_kept, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and needs_kept:
            g, kept = ctx.saved.tensors()
            of_g = v * ctx.activation.slope(kept) if needs_g else None
            return None, of_g, v * g * ctx.activation.curve(kept), None, None
        slope, curve = ctx.slope, ctx.curve
        if needs_kept and curve is None:
            g, kept = ctx.saved.tensors()
            curve = ctx.curve = g * ctx.activation.curve(kept)
        if is_last_product():
            ctx.slope = ctx.curve = None
        of_kept = v * curve if needs_kept else None
        return None, v * slope if needs_g else None, of_kept, None, None


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# GELU: f = x Phi(x), f' = Phi + x phi, f'' = (2 - x^2) phi, with the normal density phi.
_GELU = _Activation(
    F.gelu,
    lambda x: torch.special.ndtr(x) + x * _normal_density(x),
    lambda x: (2 - x * x) * _normal_density(x),
)


def _inner(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t = tanh u, u' and u'' for u = c (x + a x^3), the cubic of the approximate GELU."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    return torch.tanh(c * (x + a * x**3)), c * (1 + 3 * a * x * x), 6 * c * a * x


def _slope_by_tanh(x: Tensor) -> Tensor:
    # f = x (1 + t) / 2 with t' = (1 - t^2) u'.
    t, du, _ = _inner(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du


def _curve_by_tanh(x: Tensor) -> Tensor:
    # f'' = t' + x t'' / 2 with t'' = (1 - t^2) (u'' - 2 t u'^2).
    t, du, ddu = _inner(x)
    return (1 - t * t) * (du + 0.5 * x * (ddu - 2 * t * du * du))


_GELUS = {
    "none": _GELU,
    "tanh": _Activation(lambda x: F.gelu(x, approximate="tanh"), _slope_by_tanh, _curve_by_tanh),
}


def _slope_of_silu(x: Tensor) -> Tensor:
    # f = x s with the sigmoid s, s' = s (1 - s).
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _curve_of_silu(x: Tensor) -> Tensor:
    # f' = s + x s' gives f'' = 2 s' + x s'' with s'' = s' (1 - 2 s).
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


# The kept tensor is y = f(x): slope(y) = dy/dx and curve(y) = d slope / dy. The chain rule of
# autograd multiplies by dy/dx.
_TANH = _Activation(torch.tanh, lambda y: 1 - y * y, lambda y: -2 * y, keeps_output=True)
_SIGMOID = _Activation(torch.sigmoid, lambda y: y * (1 - y), lambda y: 1 - 2 * y, keeps_output=True)
_ACTIVATIONS: dict[Any, _Activation] = {
    F.silu: _Activation(F.silu, _slope_of_silu, _curve_of_silu),
    torch.tanh: _TANH,
    Tensor.tanh: _TANH,
    torch.sigmoid: _SIGMOID,
    Tensor.sigmoid: _SIGMOID,
}
ELEMENTWISE = tuple(_ACTIVATIONS)
