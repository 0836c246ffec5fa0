"""Backward through a kept graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge


def edges(tensors: Sequence[Tensor], /) -> list[GradientEdge]:
    """Return the places of tensors in their graph, which do not keep the tensors alive."""
    # Modes of the loss need not see that its graph is read.
    with torch._C.DisableTorchFunction():
        return [get_gradient_edge(tensor) for tensor in tensors]


def pullback(
    outputs: Sequence[Tensor | GradientEdge], inputs: Sequence[Tensor], /
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The function cotangents of outputs -> cotangents of inputs, through a graph that is kept.

    As `torch.autograd.grad`, less its checks of shapes, which take as long as a small product:
    cotangents must be like the outputs.
    """
    ends, starts = tuple(outputs), tuple(inputs)

    def pulled(cotangents: Sequence[Tensor]) -> list[Tensor]:
        if not ends:
            return [torch.zeros_like(leaf) for leaf in starts]
        found = _engine_run_backward(ends, tuple(cotangents), True, False, starts, True, False)
        return [
            torch.zeros_like(leaf) if g is None else g
            for leaf, g in zip(starts, found, strict=True)
        ]

    return pulled
