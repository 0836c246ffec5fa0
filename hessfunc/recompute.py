"""Recomputation: parts of a model whose activations are not kept, but made again when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hessfunc.transforms.kernels import differentiable_twice
from hessfunc.trees import flatten

__all__ = ["recomputed"]

Pure = Callable[..., tuple[Tensor, ...]]


def recomputed(fn: Callable[..., Any], /) -> Callable[..., Any]:
    """A function that keeps its arguments alone for the derivatives, and computes the rest again.

    The kept graph of a Hessian product then holds the arguments of ``fn`` in place of its
    activations; a product evaluates ``fn`` two more times. Unlike ``torch.utils.checkpoint`` it
    saves memory under double backward and works under ``torch.func``. ``functional(model,
    recompute=...)`` applies it to the chosen modules.

    Args:
        fn: pure: what it depends on are its arguments, which may be any trees; tensors that
            require a gradient must not come by closure.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        found, structure = flatten((args, kwargs))
        places = [i for i, leaf in enumerate(found) if _is_floating(leaf)]
        returned: list[Any] = []
        replayed = _replay(found)

        def pure(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = list(found)
            for i, tensor in zip(places, tensors, strict=True):
                leaves[i] = tensor
            inner_args, inner_kwargs = structure.unflatten(leaves)
            with replayed() if returned else nullcontext():
                out, out_structure = flatten(fn(*inner_args, **inner_kwargs))
            returned[:] = [out_structure]
            return tuple(out)

        out = _Recomputed.apply(pure, *(found[i] for i in places))  # type: ignore[no-untyped-call]
        return returned[0].unflatten(out)

    return call


def _replay(found: list[Any]) -> Callable[[], AbstractContextManager[None]]:
    """Contexts in which a second evaluation draws the same random numbers as the first."""
    tensors = (leaf for leaf in found if isinstance(leaf, Tensor))
    device = next((t.device for t in tensors), torch.device("cpu"))
    state = torch.random.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed() -> Iterator[None]:
        with differentiable_twice(device):
            torch.random.set_rng_state(state)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, device)
            yield

    return replayed


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pure: Pure, *tensors: Tensor) -> tuple[Tensor, ...]:
        # As in the pullback: random layers draw another mask outside of torch.func.
        return torch.func.vjp(pure, *tensors)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pure = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = (*cotangents, *ctx.saved_tensors)
        return None, *_Pulled.apply(ctx.pure, len(cotangents), *tensors)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(ctx.pure, ctx.saved_tensors, tangents)[1]


class _Pulled(torch.autograd.Function):
    """The pullback of a function, as a function of cotangents and inputs, kept no more than it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pure: Pure, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _pullback(pure, outputs)(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pulled = _pullback(*inputs[:2])
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        pullback = torch.func.vjp(ctx.pulled, *ctx.saved_tensors)[1]
        return None, None, *pullback(cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(ctx.pulled, ctx.saved_tensors, tangents)[1]


def _pullback(pure: Pure, outputs: int) -> Pure:
    def pulled(*tensors: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(pure, *tensors[outputs:])[1]
        return pullback(tuple(tensors[:outputs]))

    return pulled
