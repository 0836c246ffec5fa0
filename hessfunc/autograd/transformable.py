"""Replacements with right derivatives of every order, under every transform of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.attention import ATTENTION
from hessfunc.autograd.forward_mode import FORWARD
from hessfunc.autograd.norms import NORMS
from hessfunc.autograd.overrides import Replacements
from hessfunc.autograd.recurrent import RECURRENT


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = tuple(axis for axis in range(v.dim()) if axis != dim)
    return v * (g * torch.rsqrt((v * v).sum(axes, keepdim=True)))


def _logsigmoid(input: Tensor) -> Tensor:
    # vmap of the derivatives of the original warns. exp(-40) is below the rounding of float64.
    return -F.softplus(-input, threshold=40.0)


TRANSFORMABLE: Replacements = {
    **FORWARD,
    **ATTENTION,
    **RECURRENT,
    **NORMS,
    torch._weight_norm: _weight_norm,
    F.logsigmoid: _logsigmoid,
}
