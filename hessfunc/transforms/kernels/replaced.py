"""Functions of torch that are computed in another way where they are differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["EXACT", "Replaced", "Replacements", "plain"]

Replacements: TypeAlias = Mapping[Any, Callable[..., Any]]


class Replaced(TorchFunctionMode):
    """Inside, these functions of torch are others.

    Attributes:
        replaced: the function of torch, and the one that is called in its place; it calls the
            former where it does not apply.
    """

    def __init__(self, replaced: Replacements) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors of torch's own, outside of autocast and of transforms."""
    if torch._C._are_functorch_transforms_active():
        return False
    if any(t is not None and torch.is_autocast_enabled(t.device.type) for t in tensors):
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The fused kernel's second derivative leaves out that |v| depends on v.
    return v * (g / torch.norm_except_dim(v, 2, dim))


# What is wrong as it is.
EXACT: Replacements = {torch._weight_norm: _weight_norm}
