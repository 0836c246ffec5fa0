"""Mode that replaces torch functions where they are differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import FrameType, FunctionType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from hessfunc.stored import Stored

Replacements: TypeAlias = Mapping[Any, Callable[..., Any]]


class RandomSource(Protocol):
    """Source of random numbers, such as `Streams`."""

    def replacements(self, given: Replacements) -> Replacements:
        """Return the replacements of random functions, besides given replacements."""


class Replaced(TorchFunctionMode):
    """Mode that calls replacements for some functions of torch.

    It belongs to the thread that enters it, unlike the settings of torch's backends. Within some
    functions of torch that are written in Python, it stays active.

    Attributes:
        replaced: Replacement of each torch function. It calls the original function for arguments
            that it does not support.
        hooks: Names of the hooks that were registered on tensors or nodes.
        source: Source of the random numbers, or None for torch's own random streams.
        recomputes: Whether `recomputed` functions recompute their activations.
    """

    def __init__(
        self,
        replaced: Replacements,
        source: RandomSource | None = None,
        *,
        recomputes: bool = True,
    ) -> None:
        super().__init__()
        self._given = replaced
        self.recomputes = recomputes
        self.hooks: list[str] = []
        self.draw_from(source)
        self._gets_no_gradient = False

    def draw_from(self, source: RandomSource | None) -> None:
        """Set the source of random numbers."""
        self.source = source
        drawn = {} if source is None else source.replacements(self._given)
        self.replaced: Replacements = {**self._given, **drawn}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (seen := _WATCHED.get(func)) is not None:
            seen(self, args)
        elif self._gets_no_gradient:
            self._refuse_what_needs_a_gradient(args, kwargs)
        replacement = self.replaced.get(_of_torch(func))
        if replacement is None and (body := BODIES.get(func)) is not None:
            if not torch.compiler.is_compiling():
                with self:
                    return body(*args, **(kwargs or {}))
            if func is F.multi_head_attention_forward:
                return _with_weights(*args, **(kwargs or {}))
        return (replacement or func)(*args, **(kwargs or {}))

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


def _of_torch(function: Any) -> Any:
    """Return the function of torch that an operator of ATen implements, or the function itself.

    Modules from `torch.export` call operators, `torch.ops.aten.layer_norm.default`.
    """
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _implemented(function)
    return function


@cache
def _implemented(operator: Any) -> Any:
    namespace, _, name = str(operator).partition(".")
    name = name.partition(".")[0]
    places: tuple[Any, ...] = (torch, torch._C._nn, vars(torch._C)["_linalg"])
    found = (getattr(place, name, None) for place in places if namespace == "aten")
    return next((function for function in found if function is not None), operator)


def getter(name: str, /) -> Any:
    """Return the function that a mode intercepts when an attribute of a tensor is read."""
    return vars(torch._C.TensorBase)[name].__get__


_WATCHED: Mapping[Any, Callable[[Replaced, Any], None]] = {
    torch._C._set_grad_enabled: Replaced._see_grad_mode,
    Tensor.register_hook: Replaced._see_hook,
    getter("grad_fn"): Replaced._see_node,
}


def current() -> Replaced | None:
    """Return the innermost mode that is active in this thread, or None."""
    modes = (mode for mode in reversed(_get_current_function_mode_stack()))
    return next((mode for mode in modes if isinstance(mode, Replaced)), None)


def _body(function: Any) -> Any:
    """Return a function of torch without its call of the active modes.

    A mode is inactive while it handles a call, so that it would not see the calls inside.
    """
    dispatch = {n: _never for n in function.__code__.co_names if n.startswith("has_torch_function")}
    body = FunctionType(
        function.__code__,
        {**function.__globals__, **dispatch},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _with_weights(*args: Any, need_weights: bool = True, **kwargs: Any) -> Any:
    """Compute ``F.multi_head_attention_forward`` with its weights, without a fused kernel.

    Dynamo cannot trace the body of the function while the mode is active.
    """
    attend: Any = F.multi_head_attention_forward
    outputs, weights = attend(*args, need_weights=True, **kwargs)
    return outputs, weights if need_weights else None


def _never(*tensors: Any) -> bool:
    return False


def _custom_function(*args: Any, **kwargs: Any) -> Any:
    """Call an `autograd.Function` under the transforms of torch.func."""
    keys = torch._ops._compute_keyset(args, kwargs, custom_function_call.non_fallthrough_keys)
    return custom_function_call.dispatch(keys.highestPriorityTypeId(), *args, **kwargs)


# Functions written in Python that draw random numbers or attend, and calls of the user's own.
BODIES: Mapping[Any, Callable[..., Any]] = {
    custom_function_call: _custom_function,
    # These two dispatch on `return_indices`, and name themselves to a mode.
    F.fractional_max_pool2d: _body(vars(F)["_fractional_max_pool2d"]),
    F.fractional_max_pool3d: _body(vars(F)["_fractional_max_pool3d"]),
    **{
        function: _body(function)
        for function in (
            *(F.multi_head_attention_forward, F.gumbel_softmax, F.rrelu),
            *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
            *(F.alpha_dropout, F.feature_alpha_dropout),
            *(F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices),
        )
    },
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


_OWN_CLASSES = (Tensor, torch.nn.Parameter, Stored)


def plain(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are real, not of a user's class, and evaluated plainly.

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
    return all(type(t) in _OWN_CLASSES and not t.is_complex() for t in present)
