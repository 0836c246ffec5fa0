"""Recompute the activations of functions instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.chunked_attention import IN_CHUNKS
from hessfunc.autograd.corrections import EXACT
from hessfunc.autograd.functorch import evaluating, forward_modes, transforms_itself
from hessfunc.autograd.overrides import Replacements, current
from hessfunc.autograd.streams import replay
from hessfunc.containers import batch_leaves
from hessfunc.trees import flatten

Pure = Callable[..., tuple[Tensor, ...]]


@options.validated(fn=options.plain_callable)
def recomputed(fn: Callable[..., Any], /) -> Callable[..., Any]:
    """Return a function that recomputes its activations for derivatives instead of keeping them.

    The kept graph of a Hessian product then holds only the arguments of ``fn``, and each product
    evaluates ``fn`` two more times. Unlike ``torch.utils.checkpoint``, it saves memory under double
    backward and works under ``torch.func``. ``functional(model, recompute=...)`` applies it to
    selected modules. Inside transforms of ``torch.func`` around a product, and in nested forward
    mode, activations are kept.

    Args:
        fn: Pure function of arguments that may be any trees. It must not use tensors that require
            a gradient through a closure.

    Raises:
        TypeError: If ``fn`` returns anything but floating-point tensors, or if an object among the
            arguments holds tensors that require a gradient; raised by the returned function.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = current()
        # In nested forward mode, torch loses the outer tangent of a custom function.
        if forward_modes() > 1 or (mode is not None and not mode.recomputes):
            return fn(*args, **kwargs)
        arguments, structure = flatten((args, kwargs))
        _refuse_hidden(arguments)
        floating = [i for i, leaf in enumerate(arguments) if _is_floating(leaf)]
        others = [
            i for i, leaf in enumerate(arguments) if isinstance(leaf, Tensor) and i not in floating
        ]
        returned: list[Any] = []
        device = _device_of(arguments)
        again = replay(device)
        itself = transforms_itself()
        replaced: Replacements = EXACT if itself else {**EXACT, **IN_CHUNKS}
        first: Callable[[], AbstractContextManager[None]] = nullcontext if itself else evaluating

        def pure(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = list(arguments)
            for i, tensor in zip(floating + others, tensors, strict=True):
                leaves[i] = tensor
            inner_args, inner_kwargs = structure.unflatten(leaves)
            with differentiable_twice(device, replaced, streams=again()) if returned else first():
                out, out_structure = flatten(fn(*inner_args, **inner_kwargs))
            _refuse_changed((inner_args, inner_kwargs), leaves)
            if not out or not all(_is_floating(leaf) for leaf in out):
                raise TypeError("a recomputed function must return only floating-point tensors")
            returned[:] = [out_structure]
            # autograd.Function must not save a returned argument as an output: return a view.
            return tuple(
                leaf.view_as(leaf) if any(leaf is x for x in tensors) else leaf for leaf in out
            )

        tensors = [arguments[i] for i in floating + others]
        out = _Recomputed.apply(pure, len(floating), *tensors)  # type: ignore[no-untyped-call]
        return returned[0].unflatten(out)

    return call


def _refuse_hidden(arguments: Sequence[Any]) -> None:
    """Raise if an object among the arguments holds tensors that require a gradient."""
    for leaf in arguments:
        inner = [] if isinstance(leaf, Tensor) else batch_leaves(leaf)
        if any(isinstance(x, Tensor) and x.requires_grad for x in inner):
            raise TypeError(
                f"a {type(leaf).__name__} among the arguments of a recomputed function holds "
                "tensors that require a gradient, which would be lost: pass them in a tuple or a "
                "dict"
            )


def _refuse_changed(given: Any, before: Sequence[Any]) -> None:
    """Raise if a function has changed a container among its arguments."""
    after, _ = flatten(given)
    if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
        raise NotImplementedError(
            "a recomputed function changes a list or a dict among its arguments, which its caller "
            "would not see: return the values instead"
        )


def _device_of(arguments: list[Any]) -> torch.device:
    tensors = (leaf for leaf in arguments if isinstance(leaf, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Recomputed(torch.autograd.Function):
    """Function of tensors; only the first ``count`` of them are differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pure: Pure, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Evaluate under torch.func like the pullback: random layers draw other masks outside.
        return torch.func.vjp(_of_first(pure, tensors[count:]), *tensors[:count])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pure, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = (*cotangents, *ctx.saved_tensors)
        pulled = _Pulled.apply(ctx.pure, len(cotangents), ctx.count, *tensors)  # type: ignore[no-untyped-call]
        return None, None, *pulled, *[None] * (len(ctx.saved_tensors) - ctx.count)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        fn = _of_first(ctx.pure, tensors[ctx.count :])
        return torch.func.jvp(fn, _apart(tensors[: ctx.count]), _apart(tangents[: ctx.count]))[1]


class _Pulled(torch.autograd.Function):
    """Pullback (cotangents, inputs) -> gradient of a recomputed function, recomputed as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pure: Pure, outputs: int, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        moving = outputs + count
        return _pullback(_of_first(pure, tensors[moving:]), outputs)(*tensors[:moving])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pure, ctx.outputs, count = inputs[:3]
        ctx.moving = ctx.outputs + count
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        moving, others = ctx.saved_tensors[: ctx.moving], ctx.saved_tensors[ctx.moving :]
        pulled = _pullback(_of_first(ctx.pure, others), ctx.outputs)
        pullback = torch.func.vjp(pulled, *moving)[1]
        return None, None, None, *pullback(cotangents), *[None] * len(others)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        moving, others = ctx.saved_tensors[: ctx.moving], ctx.saved_tensors[ctx.moving :]
        pulled = _pullback(_of_first(ctx.pure, others), ctx.outputs)
        return torch.func.jvp(pulled, _apart(moving), _apart(tangents[3 : 3 + ctx.moving]))[1]


def _apart(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors whose entries share no memory, unlike those of an expanded cotangent."""
    return tuple(t.contiguous() for t in tensors)


def _of_first(pure: Pure, others: tuple[Tensor, ...]) -> Pure:
    return lambda *tensors: pure(*tensors, *others)


def _pullback(pure: Pure, outputs: int) -> Pure:
    def pulled(*tensors: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(pure, *tensors[outputs:])[1]
        return pullback(tuple(tensors[:outputs]))

    return pulled
