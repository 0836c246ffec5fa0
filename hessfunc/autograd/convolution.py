"""Convolutions as bilinear maps.

torch's second derivative of a convolution computes the gradient of the weights as a convolution
with kernels as large as the images. Under vmap it also copies all activations to another memory
layout. The maps here do neither, and keep the channels-last layout of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd.bilinear import Bilinear, affine
from hessfunc.autograd.fusion import Source, remember
from hessfunc.autograd.overrides import plain


@dataclass(frozen=True)
class Convolution(Bilinear):
    """Convolution y = x * w with x ``[N, C, ...]`` and w ``[O, C / groups, ...]``.

        y[n, o, p] = sum_ck x[n, c, s p + d k - pad] w[o, c, k]

    Its transpose in x is the transposed convolution of g with w, and its transpose in w the
    correlation of g and x. A block on the images joins the batch axis.

    Attributes:
        stride: Stride along each axis of the image.
        padding: Zero padding along each axis of the image.
        dilation: Dilation along each axis of the image.
        groups: Number of groups of channels.
        inputs: Shape of x.
        weights: Shape of w.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: torch.Size
    weights: torch.Size

    @property
    def dims(self) -> int:
        return len(self.inputs)

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        if x.dim() > len(self.inputs):
            return self._out(x.flatten(0, 1), w).unflatten(0, (len(x), -1))
        if w.dim() > len(self.weights):
            return _block([self._out(x, each) for each in w])
        return self._out(x, w)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        if g.dim() > len(self.inputs):
            return self._left(g.flatten(0, 1), w).unflatten(0, (len(g), -1))
        if w.dim() > len(self.weights):
            return _block([self._left(g, each) for each in w])
        return self._left(g, w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        if g.dim() > len(self.inputs):
            return torch.stack([self._right(each, x) for each in g])
        if x.dim() > len(self.inputs):
            return torch.stack([self._right(g, each) for each in x])
        return self._right(g, x)

    def _out(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, w, None, *self._options())

    def _left(self, g: Tensor, w: Tensor) -> Tensor:
        # The kernel reads only the shape and the layout of x.
        shape = (len(g), *self.inputs[1:])
        x = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=_layout(g))
        return self._backward(g, x, w, [True, False, False])[0]

    def _right(self, g: Tensor, x: Tensor) -> Tensor:
        w = x.new_empty(self.weights)
        return self._backward(g, x, w, [False, True, False])[1]

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Sequence[Any]:
        options = self._options()
        return torch.ops.aten.convolution_backward(g, x, w, None, *options, mask)

    def _options(self) -> tuple[Any, ...]:
        none = [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, False, none, self.groups


def _layout(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=last)
    return last if is_last else torch.contiguous_format


def _block(products: Sequence[Tensor]) -> Tensor:
    """Stack activations to a block, keeping the memory layout of each."""
    first = products[0]
    shape = (len(products) * len(first), *first.shape[1:])
    rows = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=_layout(first))
    block = rows.unflatten(0, (len(products), -1))
    for target, each in zip(block, products, strict=True):
        target.copy_(each)
    return block


def convolution(original: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """Return a replacement of ``F.conv1d``, ``conv2d`` or ``conv3d`` for second derivatives.

    Args:
        original: Function of torch, used for arguments that are not supported.
        dims: Number of axes of an image.
    """

    def convolved(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or input.dim() != dims + 2 or not plain(input, weight, bias):
            return original(input, weight, bias, stride, padding, dilation, groups)
        options = _tuple(stride, dims), _tuple(padding, dims), _tuple(dilation, dims)
        form = Convolution(*options, groups, input.shape, weight.shape)
        y = affine(form, input, weight, bias)
        remember(y, Source(form, input, weight, bias))
        return y

    return convolved


def _tuple(option: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(option, Sequence):
        return tuple(option) * (dims // len(option))
    return (int(option),) * dims
