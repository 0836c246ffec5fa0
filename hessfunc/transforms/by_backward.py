"""Hessian of a module whose gradients are only available through `.backward()`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from hessfunc import options
from hessfunc.autograd import precise, refuse_autocast
from hessfunc.autograd.constants import Constants
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.custom_functions import refuse_unless_derivatives
from hessfunc.autograd.embedding import pure_lookup
from hessfunc.autograd.forward_mode import DIFFERENCES
from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.overrides import Replaced
from hessfunc.changes import Named, Reads
from hessfunc.randomness import seeded
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.chunks import Chunks, Curvature
from hessfunc.transforms.evaluation import Point, filled, kept, requiring_gradients, scalar
from hessfunc.transforms.hessian import gradient_differences
from hessfunc.trees import Matvec, Tree


@options.validated(loss=options.function_of(1, "a batch"))
def hvp_by_backward(model: nn.Module, loss: Callable[[Any], Tensor], /) -> Curvature:
    """Return the Hessian of a module that is sharded by `fully_shard` or wrapped in another way.

        H v = (g(params + t v) - g(params - t v)) / 2t,   t = eps^(1/3) |params| / |v|

    g is the gradient that ``loss(batch).backward()`` stores in ``.grad``. No rank holds more of the
    model than in training, and vectors are sharded like the parameters:

        params = dict(model.named_parameters())
        loss = lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        hf.lanczos(hf.hvp_by_backward(model, loss)(params, batch), params, k=10)

    Products of `functional(model)` are exact. It takes `fully_shard` models on a mesh of one axis.

    For smooth losses, products are accurate to about 1e-9 in float64 and 1e-4 in float32. They are
    not reliable with kinks (ReLU, max-pooling), or if parameters are cast to a narrower dtype.

    Detached values, and values computed under ``no_grad``, are constant as in `hvp`. A module
    sharded by `fully_shard` is an exception: `fully_shard` itself detaches tensors, so there such
    values change with the parameters.

    Each product changes the module's parameters temporarily and restores the same bits, even if
    the loss raises. Gradients and buffers are restored too. Randomness in the loss is the same for
    every product.

    Args:
        model: Module. Parameters that are not in ``params`` are held fixed.
        loss: Loss ``batch -> scalar`` that calls the module. `fully_shard` averages gradients over
            ranks, so the matrix belongs to the mean over ranks of the losses, each on the batch of
            its rank. Every rank must compute the same products.

    Returns:
        Curvature function ``(params, batch) -> matvec``, where ``params`` is a dict of some or all
        of ``model.named_parameters()``.

    Raises:
        ValueError: If the module has no parameter of a given name, or if the loss is not a finite
            scalar that depends on params; raised by the curvature function.
        NotImplementedError: If the backward of a custom function is not the derivative of its
            forward, as in a straight-through estimator; raised by the curvature function.
        RuntimeError: If params have changed in place since the matvec was made, or if another rank
            has failed; raised by the matvec. A failure inside the loss is noticed after the
            timeout.

    Cost: two gradients per product. A product keeps four numbers per entry of the shard.
    """

    def curvature(params: Tree, batch: Any) -> Matvec:
        if transforming():
            raise NotImplementedError(
                "`hvp_by_backward` calls `.backward()`, which transforms of torch.func and "
                "torch.compile do not follow: use `hvp(loss)` inside of them"
            )
        space = space_of(params)
        refuse_autocast(space.device)
        own = _parameters(model, space)
        leaves = space.tree_leaves(params)

        sharded = bool(_sharded_modules(model))
        mode = Replaced(pure_lookup()) if sharded else Constants(DIFFERENCES)

        def value_at_present(_: object = None) -> list[Tensor]:
            return [scalar(loss(batch))]

        def gradient(at: Sequence[Tensor], *, first: bool = False) -> list[Tensor]:
            with _moved(model, own, at), seeded(0, space.device), precise(space.device):
                if isinstance(mode, Constants):
                    mode.start()
                with mode:
                    (value,) = value_at_present()
                if isinstance(mode, Constants):
                    mode.finish()
                if first and not sharded:
                    refuse_unless_derivatives([value], own, value_at_present)
                # If one rank raised alone, the others would wait in the collectives of backward.
                space.on_all(partial(_refuse_infinite, value))
                value.backward()
                return filled([parameter.grad for parameter in own], own)

        with torch.inference_mode(False):
            constants = requiring_gradients(leaves, batch)
            batch = kept_batch(batch)
            point = kept(space, leaves)
            gradient(point, first=True)
        # Each product reads the rest of the module again, so it must not change.
        moved = set(map(id, own))
        fixed: Named = {
            id(p): (name, p) for name, p in model.named_parameters() if id(p) not in moved
        }
        buffers: Named = {id(buffer): (name, buffer) for name, buffer in model.named_buffers()}
        at = Point(space, leaves, point, batch, Reads(fixed, buffers), constants)
        product = gradient_differences(gradient, space, point)
        return at.matvec(product, chunks=Chunks(1), again=True)

    return curvature


def _refuse_infinite(loss: Tensor) -> None:
    if not loss.isfinite():
        raise ValueError(
            f"the loss is {loss.item()}: check the parameters and the batch for NaN and infinite "
            "entries"
        )


def _parameters(model: nn.Module, space: Space) -> list[nn.Parameter]:
    _reshard(model)
    named = dict(model.named_parameters())
    if unknown := [name for name in space.names if name not in named]:
        raise ValueError(
            f"{type(model).__name__} has no parameter named {', '.join(unknown[:4])}: pass "
            "dict(model.named_parameters()), or a part of this dict"
        )
    return [named[name] for name in space.names]


@contextmanager
def _moved(model: nn.Module, own: Sequence[nn.Parameter], at: Sequence[Tensor]) -> Iterator[None]:
    """Context manager that sets parameters to other values and clears all gradients.

    On exit, parameters, buffers and gradients are restored.
    """
    _reshard(model)
    everything = [*model.parameters(), *model.buffers()]
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    moved = [*own, *model.buffers()]
    before = [tensor.detach().clone() for tensor in moved]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        # Keep the version counters, so that graphs that the user holds stay valid.
        with _unsafe_preserve_version_counter(tuple(everything)):
            _copy(own, at)
            with torch.enable_grad():
                yield
    finally:
        _reshard(model)
        with _unsafe_preserve_version_counter(tuple(everything)):
            _copy(moved, before)
        for parameter, grad in kept:
            parameter.grad = grad


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _reshard(model: nn.Module) -> None:
    """Free the parameters that `fully_shard` gathered, so that the module holds its shards."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []
