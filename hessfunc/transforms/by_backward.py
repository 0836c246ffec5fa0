"""The Hessian of a module whose gradients come by `.backward()` alone."""

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
from hessfunc.autograd import precise, refuse_autocast, same_draws
from hessfunc.autograd.constants import Constants
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.custom_functions import refuse_unless_derivatives
from hessfunc.autograd.embedding import pure_lookup
from hessfunc.autograd.forward_mode import DIFFERENCES
from hessfunc.autograd.overrides import Replaced
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.chunks import Chunks, Curvature, block_matvec
from hessfunc.transforms.hessian import filled, gradient_differences, kept, scalar
from hessfunc.trees import Matvec, Tree


@options.validated(loss=options.function_of(1, "a batch"))
def hvp_by_backward(model: nn.Module, loss: Callable[[Any], Tensor], /) -> Curvature:
    """The Hessian of a module that is sharded by `fully_shard`, or wrapped in another way.

        H v = (g(params + t v) - g(params - t v)) / 2t,   t = eps^(1/3) |params| / |v|

    with g what ``loss(batch).backward()`` leaves in ``.grad``. No rank ever holds more of the
    model than in training, and vectors are cut as the parameters are:

        params = dict(model.named_parameters())
        loss = lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        hf.lanczos(hf.hvp_by_backward(model, loss)(params, batch), params, k=10)

    It is accurate to about 1e-9 in float64 and 1e-4 in float32 for smooth losses. With kinks (ReLU,
    max-pooling), or parameters that are cast to a narrower dtype on the way, it means little.

    What is detached, or computed under ``no_grad``, is constant, as in `hvp`; in a module that is
    sharded by `fully_shard`, which detaches much itself, it moves with the parameters.

    Each product moves the module's parameters and puts the same bits back, even if the loss
    raises. Gradients and buffers stay as they were. Randomness in the loss is the same for every
    product.

    Args:
        model: the module; parameters that are not among ``params`` are held fixed.
        loss: ``batch -> scalar``, which calls the module. `fully_shard` takes the mean of the
            gradients of the ranks, so the matrix is that of the mean over ranks of their losses,
            each on its own batch; every rank must make the same products.

    Returns:
        A curvature function ``(params, batch) -> matvec``, with ``params`` some or all of
        ``model.named_parameters()``, by name.

    Raises:
        ValueError: (from the curvature function) the module has no parameter of that name; the
            loss is not a finite scalar that depends on params.
        NotImplementedError: (from the curvature function) a custom function's backward is not the
            derivative of its forward, as in a straight-through estimator.
        RuntimeError: (from the matvec) params have changed in place since it was made. Another
            rank has failed: at once, or after the timeout where it failed within the loss.

    Cost: a product is two gradients. Four numbers for each of the shard's are kept meanwhile.
    """

    def curvature(params: Tree, batch: Any) -> Matvec:
        space = space_of(params)
        refuse_autocast(space.device)
        own = _parameters(model, space)
        leaves = space.tree_leaves(params)

        sharded = bool(_sharded_modules(model))
        mode = Replaced(pure_lookup()) if sharded else Constants(DIFFERENCES)

        def value_at_present(_: object = None) -> list[Tensor]:
            return [scalar(loss(batch))]

        def gradient(at: Sequence[Tensor], *, first: bool = False) -> list[Tensor]:
            with _moved(model, own, at), same_draws(space.device), precise(space.device):
                if isinstance(mode, Constants):
                    mode.start()
                with mode:
                    (value,) = value_at_present()
                if isinstance(mode, Constants):
                    mode.finish()
                if first and not sharded:
                    refuse_unless_derivatives([value], own, value_at_present)
                # A rank that raised alone would leave the others waiting in the backward pass.
                space.on_all(partial(_refuse_infinite, value))
                value.backward()
                return filled([parameter.grad for parameter in own], own)

        with torch.inference_mode(False):
            batch = kept_batch(batch)
            point = kept(leaves)
            gradient(point, first=True)
        product = gradient_differences(gradient, space, point)
        # Those that are not moved are read from the module by each product.
        moved = set(map(id, own))
        fixed = [(name, p) for name, p in model.named_parameters() if id(p) not in moved]
        return block_matvec(
            product, space, leaves, batch, chunks=Chunks(1), copies=point, fixed=fixed
        )

    return curvature


def _refuse_infinite(loss: Tensor) -> None:
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}")


def _parameters(model: nn.Module, space: Space) -> list[nn.Parameter]:
    _reshard(model)
    named = dict(model.named_parameters())
    if unknown := [name for name in space.names if name not in named]:
        raise ValueError(
            f"{type(model).__name__} has no parameter named {', '.join(unknown[:4])}: params are "
            "dict(model.named_parameters()), or some of them"
        )
    return [named[name] for name in space.names]


@contextmanager
def _moved(model: nn.Module, own: Sequence[nn.Parameter], at: Sequence[Tensor]) -> Iterator[None]:
    """Inside, these parameters are elsewhere, gradients are empty and may be taken."""
    _reshard(model)
    everything = [*model.parameters(), *model.buffers()]
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    moved = [*own, *model.buffers()]
    before = [tensor.detach().clone() for tensor in moved]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        # Graphs that the user keeps see parameters that have never changed.
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
    """Free what `fully_shard` has gathered, so that the module's parameters are the shards."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []
