"""Functions of torch that are computed in another way where they are differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
    """Whether these are real tensors of torch's own, in no surroundings that change what is done.

    Such are transforms of torch.func, forward mode, autocast, inference mode, and hooks on what
    is saved for the backward pass, as those of checkpointing, which computes a region again.
    """
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_inference_mode_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return False
    present = [t for t in tensors if t is not None]
    if any(torch.is_autocast_enabled(device) for device in {t.device.type for t in present}):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_complex() for t in present)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The fused kernel's second derivative leaves out that |v| depends on v.
    return v * (g / torch.norm_except_dim(v, 2, dim))


# What is wrong as it is.
EXACT: Replacements = {torch._weight_norm: _weight_norm}
