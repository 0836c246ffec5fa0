"""Recomputation: parts of a model whose activations are not kept, but made again when needed."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc import options
from hessfunc.autograd import differentiable_twice
from hessfunc.containers import batch_leaves
from hessfunc.selection import first_of
from hessfunc.trees import Tree, flatten, leaves

Pure = Callable[..., tuple[Tensor, ...]]


@options.validated(fn=options.called)
def recomputed(fn: Callable[..., Any], /) -> Callable[..., Any]:
    """A function that keeps its arguments alone for the derivatives, and computes the rest again.

    The kept graph of a Hessian product then holds the arguments of ``fn`` in place of its
    activations; a product evaluates ``fn`` two more times. Unlike ``torch.utils.checkpoint`` it
    saves memory under double backward and works under ``torch.func``. ``functional(model,
    recompute=...)`` applies it to the chosen modules.

    Args:
        fn: pure: what it depends on are its arguments, which may be any trees; tensors that
            require a gradient must not come by closure.

    Raises:
        TypeError: (from the function) it returns something else than floating-point tensors; an
            object among its arguments holds tensors that require a gradient.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        found, structure = flatten((args, kwargs))
        _refuse_hidden(found)
        floating = [i for i, leaf in enumerate(found) if _is_floating(leaf)]
        others = [
            i for i, leaf in enumerate(found) if isinstance(leaf, Tensor) and i not in floating
        ]
        returned: list[Any] = []
        replayed = _replay(found)

        def pure(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = list(found)
            for i, tensor in zip(floating + others, tensors, strict=True):
                leaves[i] = tensor
            inner_args, inner_kwargs = structure.unflatten(leaves)
            with replayed() if returned else nullcontext():
                out, out_structure = flatten(fn(*inner_args, **inner_kwargs))
            if not out or not all(_is_floating(leaf) for leaf in out):
                raise TypeError("a recomputed function must return floating-point tensors alone")
            returned[:] = [out_structure]
            # An argument that is returned as it is must not be saved as an output.
            return tuple(
                leaf.view_as(leaf) if any(leaf is one for one in tensors) else leaf for leaf in out
            )

        tensors = [found[i] for i in floating + others]
        out = _Recomputed.apply(pure, len(floating), *tensors)  # type: ignore[no-untyped-call]
        return returned[0].unflatten(out)

    return call


def _refuse_hidden(arguments: Sequence[Any]) -> None:
    """Raise where an object among the arguments holds tensors that require a gradient."""
    for leaf in arguments:
        inner = [] if isinstance(leaf, Tensor) else batch_leaves(leaf)
        if any(isinstance(x, Tensor) and x.requires_grad for x in inner):
            raise TypeError(
                f"a {type(leaf).__name__} among the arguments of a recomputed function holds "
                "tensors that require a gradient, which would be lost: pass them in a tuple or a "
                "dict"
            )


class Segment(nn.Module):
    """The forward of a module without its hooks, which have run outside of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.inner = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def segments_of(model: nn.Module, pattern: str, /) -> list[Segment]:
    """The outermost modules whose names match a glob.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, Segment] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and fnmatch.fnmatchcase(name, pattern):
            found[name] = Segment(module)
    if not found:
        raise no_module(f"recompute={pattern!r}", model)
    return list(found.values())


def no_module(choice: str, model: nn.Module, /) -> ValueError:
    """The error of a choice that fits none of the modules within."""
    if names := [name for name, _ in model.named_modules() if name]:
        return ValueError(f"{choice} chooses none of the modules {first_of(names)}")
    return ValueError(
        f"{choice} chooses nothing: a bare {type(model).__name__} has no modules within, and "
        "itself no name"
    )


@contextmanager
def recomputing(segments: list[Segment], /) -> Iterator[None]:
    """Inside, these modules keep their arguments alone, and compute the rest again.

    Raises:
        ValueError: (from the modules) one is called with a cache of keys and values.
    """

    def call(forward: Segment, *args: Any, **kwargs: Any) -> Any:
        if any(type(leaf).__name__.endswith("Cache") for leaf in leaves((args, kwargs))):
            raise ValueError(
                "the model keeps a cache of keys and values, which recomputation would fill "
                "again: set `model.config.use_cache = False`"
            )

        def pure(params: Tree, buffers: Tree, args: Any, kwargs: Any) -> Any:
            # Detached: BatchNorm refuses running statistics that it should differentiate.
            state = params, {name: buffer.detach().clone() for name, buffer in buffers.items()}
            return torch.func.functional_call(forward, state, args, kwargs)

        params, buffers = dict(forward.named_parameters()), dict(forward.named_buffers())
        return recomputed(pure)(params, buffers, args, kwargs)

    for forward in segments:
        forward.module.forward = functools.partial(call, forward)
    try:
        yield
    finally:
        for forward in segments:
            del forward.module.forward


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
    """A function of tensors, the first ``count`` of which are differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pure: Pure, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # As in the pullback: random layers draw another mask outside of torch.func.
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
        return torch.func.jvp(fn, tensors[: ctx.count], tangents[: ctx.count])[1]


class _Pulled(torch.autograd.Function):
    """The pullback of a function, as a function of cotangents and inputs, kept no more than it."""

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
        return torch.func.jvp(pulled, moving, tangents[3 : 3 + ctx.moving])[1]


def _of_first(pure: Pure, others: tuple[Tensor, ...]) -> Pure:
    return lambda *tensors: pure(*tensors, *others)


def _pullback(pure: Pure, outputs: int) -> Pure:
    def pulled(*tensors: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(pure, *tensors[outputs:])[1]
        return pullback(tuple(tensors[:outputs]))

    return pulled
