"""Comparison of tensors with a report."""

from __future__ import annotations

import torch
from torch import Tensor


def allclose_report(
    tensor1: Tensor, tensor2: Tensor, rtol: float = 1e-5, atol: float = 1e-8
) -> bool:
    """Return whether two tensors agree as by ``torch.allclose``, and print differences."""
    if torch.allclose(tensor1, tensor2, rtol=rtol, atol=atol):
        return True
    apart = ~torch.isclose(tensor1, tensor2, rtol=rtol, atol=atol)
    print(
        f"{int(apart.sum())} of {apart.numel()} entries differ, by up to "
        f"{float((tensor1 - tensor2).abs().max()):.3e}"
    )
    return False
