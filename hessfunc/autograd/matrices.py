"""Matrix products by the library that is fastest on the processor."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hessfunc.autograd.functorch import batched

_torchs_own: ContextVar[bool] = ContextVar("torch's own products", default=False)


def has_faster(x: Tensor, /) -> bool:
    """Return whether `multiplied` uses oneDNN instead of ``@`` for large matrices of this dtype.

    torch multiplies with MKL, which favours Intel processors. For large float32 matrices, oneDNN
    takes about half of MKL's time on an AMD EPYC, and 1.0 to 1.3 times MKL's time on an Intel Xeon.
    The choice depends on the vendor of the processor instead of a timing, so that every run on a
    machine uses the same library.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not _torchs_own.get()
        and _has_both_libraries()
        and _vendor() != "GenuineIntel"
        and bool(torch.backends.mkldnn.enabled)
        and torch.get_float32_matmul_precision() == "highest"
    )


@contextmanager
def torchs_own() -> Iterator[None]:
    """Context manager in which products use ``@``; matvecs made inside keep using it."""
    token = _torchs_own.set(True)
    try:
        yield
    finally:
        _torchs_own.reset(token)


@cache
def _has_both_libraries() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def _vendor() -> str:
    """Return the vendor of the processor, such as ``"GenuineIntel"``, or ``"unknown"``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # Windows: "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel".
        name = platform.processor()
        return "GenuineIntel" if "intel" in name.lower() else name
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, "unknown")


def multiplied(a: Tensor, b: Tensor, /) -> Tensor:
    """Return ``a @ b`` computed by oneDNN, or by torch under autograd or vmap."""
    if batched(a, b) or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b
    return _operation()(a, b) if _as_operations.get() else _by_one_dnn(a, b)


def _by_one_dnn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


_as_operations: ContextVar[bool] = ContextVar("as operations", default=False)


@contextmanager
def as_operations() -> Iterator[None]:
    """Context manager in which `multiplied` is a custom operator that the compiler keeps.

    The compiler of torch accepts oneDNN's own operator only with constant weights.
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

    operator = torch.library.custom_op("hessfunc::multiplied", product, mutates_args=())
    operator.register_fake(lambda a, b: a.new_empty(len(a), b.shape[1]))
    return operator
