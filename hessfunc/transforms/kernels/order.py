"""Of which order the derivatives are that will be taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["linear_in_cotangents", "once_more"]

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
