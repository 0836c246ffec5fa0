"""Batch normalisation by running statistics: an affine map, made one with the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.bilinear import Channels, affine
from hessfunc.autograd.fusion import source_of
from hessfunc.autograd.overrides import plain


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
    """``F.batch_norm``, to be differentiated twice.

    With running statistics it is ``scale x + shift``. After a convolution or a linear layer the
    scale is moved into its weights, so that products have no work with it: the result is torch's,
    its derivatives are those of the one layer. No gradient passes through the input itself, so
    a loss that asks for one there, inside of itself, is told that it is not in the graph.
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
