"""Copies of models without their parameters, which other objects hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hessfunc.containers import batch_leaves
from hessfunc.copies import structural_copy


class Absent(Tensor):
    """Parameter of a block outside of the block: it has a shape and a dtype, but no entries.

    Attributes:
        parameter: Name of the parameter in the model.
        placed_on: Device of the shards of the parameter.
    """

    parameter: str
    placed_on: torch.device

    @staticmethod
    def of(name: str, parameter: Tensor, /) -> Absent:
        """Return the stand-in of a parameter."""
        entry = torch.empty((), dtype=parameter.dtype, device="meta")
        absent = entry.expand(parameter.shape).as_subclass(Absent)
        absent.parameter, absent.placed_on = name, parameter.device
        return absent

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent({self.parameter!r}, {tuple(self.shape)}, {self.dtype})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.placed_on

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _OF_NO_ENTRY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        names = [x.parameter for x in batch_leaves((args, kwargs)) if isinstance(x, Absent)]
        raise RuntimeError(
            f"parameter {names[0]!r} is used outside of the block that gathers it: choose a block "
            "that contains all uses of the parameter, or none, with `shard=` of `functional`"
        )


# Functions of a tensor that read none of its entries; attributes are read by ``__get__``.
_OF_NO_ENTRY = {"__get__", "__set__", "dim", "size", "stride", "numel", "is_floating_point"}
_OF_NO_ENTRY |= {"is_complex", "element_size", "ndimension", "__len__", "__hash__"}


def name_of(leaf: Tensor, /) -> str:
    """Return the name in the model of an absent parameter."""
    assert isinstance(leaf, Absent)
    return leaf.parameter


def of_fsdp(model: nn.Module, /) -> bool:
    """Return whether `fully_shard` has been applied to a model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def without_parameters(model: nn.Module, named: Mapping[str, Tensor], /) -> nn.Module:
    """Return a copy of a model whose parameters are `Absent`.

    Args:
        model: Model, which may be one of `fully_shard`.
        named: Parameters of the model by name.

    Raises:
        NotImplementedError: If the model cannot be copied.
    """
    skeleton = _without_fsdp(model) if of_fsdp(model) else structural_copy(model)
    if skeleton is None:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be copied without its parameters (`copy.deepcopy` "
            "raises, or its functions or hooks refer to one of its own modules): use "
            "`functional(model)` and `space=sharded(params, mesh)`, which divide the vectors"
        )
    absent = {id(leaf): Absent.of(name, leaf) for name, leaf in named.items()}
    for module in skeleton.modules():
        for key, leaf in module._parameters.items():
            if leaf is not None:
                module._parameters[key] = absent[id(leaf)]  # type: ignore[assignment]
    return skeleton


def _without_fsdp(model: nn.Module) -> nn.Module:
    """Return a copy of a model of `fully_shard` with the classes and hooks from before."""
    memo: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copies = {}
    for module in model.modules():
        kind = type(module)
        if isinstance(module, FSDPModule):
            kind = kind.__mro__[module._orig_cls_mro_index]
        copies[module] = memo[id(module)] = object.__new__(kind)
    for module, copied in copies.items():
        for key, value in vars(module).items():
            if key in _OF_FSDP or key.startswith("__composable_api_state_key"):
                continue
            if key.endswith("_hooks") and isinstance(value, dict):
                value = type(value)((k, v) for k, v in value.items() if not _is_of_fsdp(v))
            vars(copied)[key] = copy.deepcopy(value, memo)
    return memo[id(model)]


_OF_FSDP = {"_is_fsdp_managed_module", "_fsdp_use_orig_params"}


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
