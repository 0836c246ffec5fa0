"""Functions of torch whose gradients, or second derivatives, are wrong as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.transforms.kernels.embedding import pure_lookup
from hessfunc.transforms.kernels.replaced import Replacements

__all__ = ["EXACT"]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The fused kernel's second derivative leaves out that |v| depends on v.
    return v * (g / torch.norm_except_dim(v, 2, dim))


EXACT: Replacements = {torch._weight_norm: _weight_norm, **pure_lookup()}
