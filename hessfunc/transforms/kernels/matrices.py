"""Products of matrices, by the faster of the libraries that torch was built with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hessfunc.transforms.kernels.probes import batched

__all__ = ["as_operations", "has_faster", "multiplied", "torchs_own"]

# How much faster it must be in the trial: noise must not decide.
_MARGIN = 1.3
_TRIALS = 5


def has_faster(x: Tensor, /) -> bool:
    """Whether `multiplied` beats ``@`` on large matrices of this dtype, on this machine."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and not _torchs_own.get() and _one_dnn_is_faster()


_torchs_own: ContextVar[bool] = ContextVar("torchs own", default=False)


@contextmanager
def torchs_own() -> Iterator[None]:
    """Graphs built inside multiply matrices by torch's own library."""
    token = _torchs_own.set(True)
    try:
        yield
    finally:
        _torchs_own.reset(token)


def multiplied(a: Tensor, b: Tensor, /) -> Tensor:
    """``a @ b``, by oneDNN: on CPUs that MKL does not favour it is twice as fast.

    By torch itself where it is to be differentiated, or mapped over.
    """
    if batched(a, b) or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b
    return _operation()(a, b) if _as_operations.get() else _by_one_dnn(a, b)


def _by_one_dnn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


_as_operations: ContextVar[bool] = ContextVar("as operations", default=False)


@contextmanager
def as_operations() -> Iterator[None]:
    """Inside, `multiplied` is one operation, which a compiler leaves as it is.

    Of oneDNN's own operation torch's compiler wants constant weights.
    """
    token = _as_operations.set(True)
    try:
        yield
    finally:
        _as_operations.reset(token)


@cache
def _operation() -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return _by_one_dnn(a, b)

    found = torch.library.custom_op("hessfunc::multiplied", product, mutates_args=())
    found.register_fake(lambda a, b: a.new_empty(len(a), b.shape[1]))
    return found


@cache
def _one_dnn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if torch.get_float32_matmul_precision() != "highest":
        return False
    # Modes that count operations, or watch memory, should not see the trial.
    with _disable_current_modes():
        a = torch.ones(512, 512, dtype=torch.float32, device="cpu")
        try:
            return _MARGIN * _seconds(multiplied, a) < _seconds(torch.mm, a)
        except (RuntimeError, AttributeError):
            return False


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor) -> float:
    spent = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        product(a, a)
        spent.append(time.perf_counter() - start)
    return min(spent)
