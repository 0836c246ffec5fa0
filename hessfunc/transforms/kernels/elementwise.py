"""Smooth activations, whose first and second derivatives are computed once and kept.

torch computes them anew for each product, from the exponentials on. A product needs no more than
two multiplications: with y = f(x) and g the gradient at y,

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

from hessfunc.transforms.kernels.replaced import plain

__all__ = ["elementwise", "gelu"]

Map = Callable[[Tensor], Tensor]

# Entries below which a call costs more than what it saves.
_LARGE = 2**14


@dataclass(frozen=True)
class _Activation:
    """f and its derivatives, each of functions that torch differentiates."""

    value: Map
    slope: Map
    curve: Map


def elementwise(original: Map, twice: bool) -> Callable[..., Tensor]:
    """``F.silu``, ``tanh`` or ``sigmoid``, to be differentiated twice."""
    activation = _ACTIVATIONS[original]

    def mapped(input: Tensor, *options: Any, **named: Any) -> Tensor:
        if any(options) or any(named.values()) or not _applies(input):
            return original(input, *options, **named)
        return _Mapped.apply(activation, input, twice)  # type: ignore[no-untyped-call]

    return mapped


def gelu(twice: bool) -> Callable[..., Tensor]:
    """``F.gelu``, to be differentiated twice."""

    def mapped(input: Tensor, *, approximate: str = "none") -> Tensor:
        if not _applies(input):
            return F.gelu(input, approximate=approximate)
        activation = _GELU if approximate == "none" else _GELU_BY_TANH
        return _Mapped.apply(activation, input, twice)  # type: ignore[no-untyped-call]

    return mapped


def _applies(x: Tensor) -> bool:
    return x.numel() >= _LARGE and x.requires_grad and plain(x)


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: _Activation, x: Tensor, twice: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation, ctx.twice = activation, twice
        ctx.slope = None
        return activation.value(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        if ctx.slope is None:
            with torch.no_grad():
                ctx.slope = ctx.activation.slope(x)
        if not torch.is_grad_enabled():
            return None, g * ctx.slope, None
        x = x if ctx.twice else x.detach()
        return None, _Scaled.apply(ctx.activation, g, x, ctx.slope), None  # type: ignore[no-untyped-call]


class _Scaled(torch.autograd.Function):
    """g f'(x), with the slope f'(x) at hand."""

    @staticmethod
    def forward(ctx: Any, activation: _Activation, g: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.activation, ctx.slope = activation, slope
        ctx.curve = None
        return g * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, x = ctx.saved_tensors
        _, needs_g, needs_x, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            of_g = v * ctx.activation.slope(x) if needs_g else None
            of_x = v * g * ctx.activation.curve(x) if needs_x else None
            return None, of_g, of_x, None
        if needs_x and ctx.curve is None:
            ctx.curve = g * ctx.activation.curve(x)
        of_x = v * ctx.curve if needs_x else None
        return None, v * ctx.slope if needs_g else None, of_x, None


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


_GELU = _Activation(
    F.gelu,
    lambda x: torch.special.ndtr(x) + x * _normal_density(x),
    lambda x: (2 - x * x) * _normal_density(x),
)


def _inner(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh of the cubic of the approximate GELU, and the cubic's derivatives."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    return torch.tanh(c * (x + a * x**3)), c * (1 + 3 * a * x * x), 6 * c * a * x


def _slope_by_tanh(x: Tensor) -> Tensor:
    t, du, _ = _inner(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du


def _curve_by_tanh(x: Tensor) -> Tensor:
    t, du, ddu = _inner(x)
    return (1 - t * t) * (du + 0.5 * x * (ddu - 2 * t * du * du))


_GELU_BY_TANH = _Activation(lambda x: F.gelu(x, approximate="tanh"), _slope_by_tanh, _curve_by_tanh)


def _slope_of_silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _curve_of_silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _slope_of_tanh(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x) ** 2


def _curve_of_tanh(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return -2 * t * (1 - t * t)


def _slope_of_sigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _curve_of_sigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (1 - 2 * s)


_TANH = _Activation(torch.tanh, _slope_of_tanh, _curve_of_tanh)
_SIGMOID = _Activation(torch.sigmoid, _slope_of_sigmoid, _curve_of_sigmoid)
_ACTIVATIONS: dict[Any, _Activation] = {
    F.silu: _Activation(F.silu, _slope_of_silu, _curve_of_silu),
    torch.tanh: _TANH,
    Tensor.tanh: _TANH,
    torch.sigmoid: _SIGMOID,
    Tensor.sigmoid: _SIGMOID,
}
