"""Linear dependence of convolutions and transposed convolutions on their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.kronecker.linear_maps import Layout, LinearMap


def _channels(bias: Tensor) -> LinearMap:
    """Return the dependence on the bias of a convolution, with the outputs along the axis 1."""

    def slopes(gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient), 1, len(bias), -1)

    return LinearMap(Layout((1, len(bias), 1)), slopes, lambda: bias.detach().new_ones(1, 1, 1, 1))


def convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[tuple[Tensor, LinearMap]]:
    """Yield the dependence of a convolution on its weight and bias."""
    dims, kernel = weight.dim() - 2, weight.shape[2:]
    if input.dim() != dims + 2:
        return
    strides, dilations = _each(stride, dims), _each(dilation, dims)
    channels = weight.shape[0] // groups

    def inputs() -> Tensor:
        x = F.pad(input.detach(), _padding(padding, kernel, dilations))
        return unfolded(x, kernel, strides, dilations, groups)

    layout = Layout((groups, channels, weight[0].numel()))
    yield weight, LinearMap(layout, _by_channel(groups, channels), inputs)
    if bias is not None:
        yield bias, _channels(bias)


def transposed_convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[tuple[Tensor, LinearMap]]:
    """Yield the dependence of a transposed convolution on its weight and bias."""
    dims, kernel = weight.dim() - 2, weight.shape[2:]
    if input.dim() != dims + 2:
        return
    strides, paddings, dilations = (_each(x, dims) for x in (stride, padding, dilation))
    channels, sizes = weight.shape[1], output.shape[2:]

    def inputs() -> Tensor:
        # A transposed convolution is a convolution with the inputs spread by the stride, framed by
        # d (K - 1) - p zeros before, and with the kernel reversed.
        frames = [d * (k - 1) - p for d, k, p in zip(dilations, kernel, paddings, strict=True)]
        spread = [s * (n - 1) + 1 for s, n in zip(strides, input.shape[2:], strict=True)]
        x = input.detach().new_zeros(*input.shape[:2], *spread)
        places: list[Any] = [..., *(slice(None, None, stride) for stride in strides)]
        x[tuple(places)] = input.detach()
        lengths = [n + d * (k - 1) for n, d, k in zip(sizes, dilations, kernel, strict=True)]
        ends = [n - f - s for n, f, s in zip(lengths, frames, spread, strict=True)]
        pads = [pad for pair in zip(frames, ends, strict=True) for pad in pair]
        x = F.pad(x, [pad for i in reversed(range(dims)) for pad in pads[2 * i : 2 * i + 2]])
        x = unfolded(x, kernel, (1,) * dims, dilations, groups)
        # (N, G, I * K, P) -> the kernel in its own order.
        x = x.unflatten(2, (-1, *kernel)).flip(list(range(3, 3 + dims)))
        return x.flatten(2, 2 + dims)

    taps = torch.Size(kernel).numel()
    layout = Layout((groups, weight.shape[0] // groups, channels, taps), (0, 2, 1, 3))
    yield weight, LinearMap(layout, _by_channel(groups, channels), inputs)
    if bias is not None:
        yield bias, _channels(bias)


def _by_channel(groups: int, channels: int) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.reshape(len(gradient), groups, channels, -1)


def unfolded(
    x: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    groups: int,
    /,
) -> Tensor:
    """Return the padded inputs that each weight of a kernel multiplies, ``(N, G, K, P)``."""
    dims, channels = len(kernel), x.shape[1]
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *positions, *kernel) -> (N, C, *kernel, *positions)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    fan_in = channels // groups * torch.Size(kernel).numel()
    return x.reshape(len(x), groups, fan_in, -1)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return given * dims if len(given) == 1 else given


def _padding(padding: Any, kernel: torch.Size, dilations: tuple[int, ...]) -> list[int]:
    """Return the padding of each end of each axis, from the last axis to the first, as `F.pad`."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        return [pad for total in reversed(totals) for pad in (total // 2, total - total // 2)]
    return [pad for size in reversed(_each(padding, len(kernel))) for pad in (size, size)]
