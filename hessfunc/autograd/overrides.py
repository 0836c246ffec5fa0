"""Functions of torch that are computed in another way where they are differentiated twice."""

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
    """Mode in which some functions of torch are computed by others.

    Attributes:
        replaced: Each function of torch, with the one that is called in its place; it calls the
            former where it does not apply.
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
            # The checkpoint is over.
            self._gets_no_gradient = False
        elif needs_gradient(args, kwargs):
            raise NotImplementedError(
                "torch.utils.checkpoint with use_reentrant=True has inputs that need no gradient, "
                "so the parameters inside of it get none: turn it off, such as by "
                "`model.gradient_checkpointing_disable()`, and take "
                "`functional(model, recompute='model.layers.*')`"
            )

    def _see_grad_mode(self, args: Any) -> None:
        self._gets_no_gradient = not args[0] and _in_checkpoint_of_constants()

    def _see_hook(self, args: Any) -> None:
        self.hooks.append(f"the hook {getattr(args[1], '__qualname__', args[1])}")

    def _see_node(self, args: Any) -> None:
        # A caller that reads the node can register a hook on it.
        if args[0].requires_grad:
            self.hooks.append("a hook on `grad_fn`")


def getter(name: str, /) -> Any:
    """Return the function that modes see when an attribute of a tensor is read."""
    return vars(torch._C.TensorBase)[name].__get__


_WATCHED: Mapping[Any, Callable[[Replaced, Any], None]] = {
    torch._C._set_grad_enabled: Replaced._see_grad_mode,
    Tensor.register_hook: Replaced._see_hook,
    getter("grad_fn"): Replaced._see_node,
}


def needs_gradient(args: Any, kwargs: Mapping[str, Any] | None = None, /) -> bool:
    """Whether an argument of a function, or a member of a sequence of them, needs a gradient."""
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (tuple, list)) and needs_gradient(value):
            return True
    return False


def _in_checkpoint_of_constants() -> bool:
    """Whether the caller is a reentrant checkpoint none of whose inputs needs a gradient."""
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
