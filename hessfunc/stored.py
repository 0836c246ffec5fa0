"""Tensors that are stored in a narrower dtype, or on another device, than they are computed with.

Weights of 16 bits with products in float32, weights in the memory of the host that a GPU computes
with, and both of them in a memory-mapped file are such tensors. An operation converts the tensors
that it reads, so that the copy of one weight exists at a time. Autograd saves the stored tensors
instead of their copies, and derivatives have the dtype and the device of the computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hessfunc.numerics import indexed

_aten = torch.ops.aten
# Functions that return some entries of their first argument in a new tensor.
_LOOKUPS = {
    *(_aten.embedding.default, _aten.index_select.default),
    *(_aten.index.Tensor, _aten.gather.default),
}


class Stored(Tensor):
    """Read-only tensor whose entries are converted when an operation reads them.

    Views and clones of it are stored alike. All other operations return plain tensors.

    Attributes:
        held: Tensor that holds the entries.
    """

    held: Tensor
    # Operations return tensors of torch's own class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor, /, dtype: torch.dtype, device: torch.device) -> Stored:
        stored: Stored = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=dtype,
            device=device,
        )
        stored.held = held
        return stored

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({self.held!r}, dtype={self.dtype}, device={str(self.device)!r})"

    @property
    def _version(self) -> int:  # type: ignore[override]
        return self.held._version

    @staticmethod
    def copies(func: Any, /) -> bool:
        """Return whether an operation reads converted copies of its stored arguments."""
        is_view = func.is_view and func is not _aten.view.dtype
        return not is_view and func is not _aten.clone.default and func not in _LOOKUPS

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, Stored):
            if func in _LOOKUPS:
                others = tree_map_only(Tensor, lambda x: x.to(first.held.device), args[1:])
                return _converted(func(first.held, *others, **kwargs), first)
            if not cls.copies(func):
                alike = func(first.held, *args[1:], **kwargs)
                return tree_map_only(Tensor, lambda x: Stored(x, first.dtype, first.device), alike)
            if func._schema.is_mutable:
                raise RuntimeError(
                    f"a parameter that is stored as {first.held.dtype} on {first.held.device} and "
                    f"read as {first.dtype} on {first.device} cannot be changed in place: change "
                    "the parameter of the model"
                )
        args, kwargs = tree_map_only(Stored, lambda x: _converted(x.held, x), (args, kwargs))
        return func(*args, **(kwargs or {}))


def _converted(entries: Tensor, like: Stored) -> Tensor:
    # A copy to the host that does not block would be read before it has arrived.
    return entries.to(like.device, like.dtype, non_blocking=like.device.type != "cpu")


def read_as(
    tensor: Tensor, /, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Return a tensor whose entries are read in a wider dtype, or on another device.

    Args:
        tensor: Tensor that holds the entries. A DTensor, and a tensor that requires a gradient, are
            returned as they are.
        dtype: Dtype of the computation; None, or one that does not contain the dtype of the tensor,
            for that of the tensor.
        device: Device of the computation; None for that of the tensor.
    """
    wide = dtype is not None and torch.promote_types(tensor.dtype, dtype) == dtype
    to = tensor.dtype if dtype is None or not wide else dtype
    there = tensor.device if device is None else indexed(device)
    converts = (to, there) != (tensor.dtype, tensor.device) and tensor.is_floating_point()
    if not converts or tensor.requires_grad or hasattr(tensor, "device_mesh"):
        return tensor
    return Stored(tensor, to, there)
