"""The tensors beneath those that `torch.vmap` hands to a backward formula.

A formula that sees the whole block can choose how its probe axis lies, and so spare the copies
and broadcasts of vmap's own rules, for which each operation stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge


def batched(*tensors: Tensor | None) -> bool:
    """Whether vmap, or a gradient with `is_grads_batched`, has wrapped one of these."""
    return any(
        t is not None and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )


def on_blocks(formula: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """A formula of plain tensors, on tensors some of which vmap may have wrapped.

    Where one is, the formula sees it with a leading probe axis, and must return a block.
    """
    level = max((_level(tensor) for tensor in tensors), default=0)
    if level == 0:
        return formula(*tensors)
    found = formula(*(_beneath(tensor, level) for tensor in tensors))
    return functorch._add_batch_dim(found, 0, level)


def _level(tensor: Tensor | None) -> int:
    if tensor is None or not functorch.is_batchedtensor(tensor):
        return 0
    return int(functorch.maybe_get_level(tensor))


def _beneath(tensor: Tensor | None, level: int) -> Tensor | None:
    if tensor is None or _level(tensor) != level:
        return tensor
    return functorch.get_unwrapped(tensor).movedim(functorch.maybe_get_bdim(tensor), 0)


_linear_in_cotangents: ContextVar[bool] = ContextVar("linear in cotangents", default=False)


@contextmanager
def linear_in_cotangents() -> Iterator[None]:
    """Inside, gradients are taken that will be differentiated by their cotangents alone.

    So it is in a Gauss-Newton matrix: the graph need not know how a gradient depends on the
    parameters, and is smaller.
    """
    token = _linear_in_cotangents.set(True)
    try:
        yield
    finally:
        _linear_in_cotangents.reset(token)


def once_more(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a gradient was computed from, as far as the gradient will be differentiated by it."""
    if not _linear_in_cotangents.get():
        return tensors
    return tuple(None if t is None else t.detach() for t in tensors)


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
