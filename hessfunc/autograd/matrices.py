"""Products of matrices, by the library that suits the processor."""

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
    """Whether `multiplied` calls another library than ``@`` for large matrices of this dtype.

    MKL favours processors of Intel, its maker: on an AMD EPYC oneDNN multiplies large float32
    matrices in about half of MKL's time, on an Intel Xeon in 1.0 to 1.3 of it. The processor's
    vendor decides, rather than a trial, so that each run on a machine takes the same library.
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
    """Inside, products of matrices are torch's own: curvature that is made here keeps to them."""
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
    """The processor's vendor, as the processor itself spells it where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # Windows: "Intel64 Family 6 Model 85 Stepping 7, GenuineIntel".
        name = platform.processor()
        return "GenuineIntel" if "intel" in name.lower() else name
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, "unknown")


def multiplied(a: Tensor, b: Tensor, /) -> Tensor:
    """``a @ b`` by oneDNN, or by torch itself where it is differentiated or mapped over."""
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
