"""Linear layers as bilinear maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.bilinear import Bilinear, affine
from hessfunc.autograd.fusion import Source, remember
from hessfunc.autograd.matrices import has_faster, multiplied
from hessfunc.autograd.overrides import plain

# Smallest number of multiplications for which the call overhead pays off.
_LARGE = 2**20


@dataclass(frozen=True)
class Linear(Bilinear):
    """Matrix product y = x w' with x ``[R, C]`` and w ``[O, C]``.

    <g, x w'> = <g w, x> = <g' x, w>, so that left(g, w) = g w and right(g, x) = g' x.
    """

    @property
    def dims(self) -> int:
        return 2

    def out(self, x: Tensor, w: Tensor, /) -> Tensor:
        if x.dim() == 3:
            return multiplied(x.flatten(0, 1), w.mT).unflatten(0, (len(x), -1))
        if w.dim() == 3:
            return torch.stack([multiplied(x, each.mT) for each in w])
        return multiplied(x, w.mT)

    def left(self, g: Tensor, w: Tensor, /) -> Tensor:
        if g.dim() == 3:
            return multiplied(g.flatten(0, 1), w).unflatten(0, (len(g), -1))
        if w.dim() == 3:
            return torch.stack([multiplied(g, each) for each in w])
        return multiplied(g, w)

    def right(self, g: Tensor, x: Tensor, /) -> Tensor:
        if g.dim() == 3:
            rows, features = x.shape
            if rows < features:
                # Copying the transposes of g, R O entries, is cheaper than stacking results, C O.
                return multiplied(g.mT.reshape(-1, rows), x).unflatten(0, (len(g), -1))
            return torch.stack([multiplied(each.mT, x) for each in g])
        if x.dim() == 3:
            transposed = g.mT.contiguous()
            return torch.stack([multiplied(transposed, each) for each in x])
        return multiplied(g.mT, x)

    def tangent(self, x: Tensor, w: Tensor, dx: Tensor, dw: Tensor, /) -> Tensor:
        if dx.dim() == 2 or dw.dim() == 2:
            return super().tangent(x, w, dx, dw)
        tangents = self.out(dx, w)
        for target, each in zip(tangents, dw, strict=True):
            target.add_(multiplied(x, each.mT))
        return tangents


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear`` so that its second derivative is fast."""
    large = weight.dim() == 2 and input.numel() * len(weight) >= _LARGE
    one_bias = bias is None or bias.dim() == 1
    if not (large and one_bias and plain(input, weight, bias) and has_faster(input)):
        return F.linear(input, weight, bias)
    form = Linear()
    x = input.reshape(-1, input.shape[-1])
    y = affine(form, x, weight, bias)
    if input.dim() > 2:
        return y.view(*input.shape[:-1], -1)
    remember(y, Source(form, x, weight, bias))
    return y
