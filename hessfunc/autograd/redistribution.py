"""Second derivatives through the change of a DTensor's placement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, _api


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, gradients of what stands behind `DTensor.from_local` have derivatives.

    torch adds a gradient up over ranks there without telling autograd, so that a Hessian would
    lack terms. It is so wherever a tensor-parallel layer does not come first in a model.
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
