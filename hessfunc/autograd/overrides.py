"""Mode that replaces torch functions where they are differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

Replacements: TypeAlias = Mapping[Any, Callable[..., Any]]


class Replaced(TorchFunctionMode):
    """Mode that calls replacements for some functions of torch.

    Attributes:
        replaced: Replacement of each torch function. It calls the original function for arguments
            that it does not support.
        hooks: Names of the hooks that were registered on tensors or nodes.
    """

    def __init__(self, replaced: Replacements) -> None:
        super().__init__()
        self.replaced = replaced
        self.hooks: list[str] = []
        self._gets_no_gradient = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (seen := _WATCHED.get(func)) is not None:
            seen(self, args)
        elif self._gets_no_gradient:
            self._refuse_what_needs_a_gradient(args, kwargs)
        return self.replaced.get(func, func)(*args, **(kwargs or {}))

    def _refuse_what_needs_a_gradient(self, args: Any, kwargs: dict[str, Any] | None) -> None:
        if torch.is_grad_enabled():
            # Gradients are enabled again, so the checkpoint has ended.
            self._gets_no_gradient = False
        elif needs_gradient(args, kwargs):
            raise NotImplementedError(
                "torch.utils.checkpoint with use_reentrant=True has inputs that need no gradient, "
                "so the parameters inside get none: turn it off, for instance with "
                "`model.gradient_checkpointing_disable()`, and use "
                "`functional(model, recompute='model.layers.*')`"
            )

    def _see_grad_mode(self, args: Any) -> None:
        self._gets_no_gradient = not args[0] and _in_checkpoint_of_constants()

    def _see_hook(self, args: Any) -> None:
        self.hooks.append(f"the hook {getattr(args[1], '__qualname__', args[1])}")

    def _see_node(self, args: Any) -> None:
        # A caller that reads `grad_fn` can register a hook on it.
        if args[0].requires_grad:
            self.hooks.append("a hook on `grad_fn`")


def getter(name: str, /) -> Any:
    """Return the function that a mode intercepts when an attribute of a tensor is read."""
    return vars(torch._C.TensorBase)[name].__get__


_WATCHED: Mapping[Any, Callable[[Replaced, Any], None]] = {
    torch._C._set_grad_enabled: Replaced._see_grad_mode,
    Tensor.register_hook: Replaced._see_hook,
    getter("grad_fn"): Replaced._see_node,
}


def needs_gradient(args: Any, kwargs: Mapping[str, Any] | None = None, /) -> bool:
    """Return whether an argument, or an element of a list or tuple, needs a gradient."""
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (tuple, list)) and needs_gradient(value):
            return True
    return False


def _in_checkpoint_of_constants() -> bool:
    """Return whether the call is inside a reentrant checkpoint without inputs that need grad."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if (
            isinstance(context, torch.autograd.function.BackwardCFunction)
            and "checkpoint" in type(context).__name__.lower()
        ):
            return not any(context.needs_input_grad)
        frame = frame.f_back
    return False


def plain(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are real, of torch's own classes, and evaluated plainly.

    Evaluation is not plain under transforms of torch.func, forward mode, autocast, inference mode,
    or hooks on saved tensors. Checkpointing uses such hooks to recompute a region.
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
