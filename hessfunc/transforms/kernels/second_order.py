"""The functions of torch that are replaced where a gradient is differentiated in reverse mode."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.transforms.kernels.batch_norm import batch_norm
from hessfunc.transforms.kernels.convolution import convolution
from hessfunc.transforms.kernels.elementwise import elementwise, gelu
from hessfunc.transforms.kernels.layer_norm import layer_norm
from hessfunc.transforms.kernels.linear import linear
from hessfunc.transforms.kernels.replaced import EXACT, Replacements

__all__ = ["replacements"]

_SATURATING = (torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid)


@cache
def replacements(*, twice: bool) -> Replacements:
    """Functions whose products are faster, and as exact.

    Args:
        twice: whether the gradient is differentiated with respect to the parameters, as in a
            Hessian, or with respect to its cotangents alone, as in a Gauss-Newton matrix.
    """
    return {
        **EXACT,
        F.conv1d: convolution(F.conv1d, 1, twice),
        F.conv2d: convolution(F.conv2d, 2, twice),
        F.conv3d: convolution(F.conv3d, 3, twice),
        F.batch_norm: batch_norm(twice),
        F.linear: linear(twice),
        F.layer_norm: layer_norm(twice),
        F.gelu: gelu(twice),
        **{f: elementwise(f, twice) for f in (F.silu, *_SATURATING)},
        Tensor.view: _view,
    }


def _view(self: Tensor, *shape: Any) -> Tensor:
    # Of a convolution's output, whose layout is not that of torch's.
    try:
        return self.view(*shape)
    except RuntimeError:
        return self.reshape(*shape)
