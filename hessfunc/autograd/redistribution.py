"""Second derivatives of changes of the placement of DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, _api

from hessfunc.autograd.shared import Shared


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Context manager in which the backward of `DTensor.from_local` is differentiable.

    torch sums that gradient over ranks without recording the sum in the graph, so a Hessian would
    lack terms. Every model with a tensor-parallel layer that is not its first layer is affected.
    """
    function = _api._FromTorchTensor
    plain = function.backward
    function.backward = staticmethod(_backward)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        function.backward = staticmethod(plain)  # type: ignore[method-assign]


def _backward(context: Any, gradient: DTensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    placements = context.grad_placements
    if placements is None:
        placements = _api._normalize_placements_for_grad(context.forward_input_placements)
    return gradient.redistribute(placements=placements).to_local(), *(None,) * 6


TWICE_DIFFERENTIABLE = Shared(_twice_differentiable)
