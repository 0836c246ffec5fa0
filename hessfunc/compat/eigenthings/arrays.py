"""Results as NumPy arrays."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["array"]


def array(tensor: Tensor, /) -> NDArray[Any]:
    """A tensor as a NumPy array; bfloat16, which NumPy does not know, becomes float32."""
    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return known.cpu().numpy()
