"""What a loss gives to a model, and takes from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.contexts import kept_batch
from hessfunc.losses import Loss
from hessfunc.modules import uses_batch_statistics
from hessfunc.spaces.space import Space


def refuse_dtensors(space: Space, /) -> None:
    """Raise where parameters are DTensors: a rank sees a part of each layer alone."""
    if space.distributed:
        raise NotImplementedError(
            "blocks with structure are of parameters that every rank has whole: take them from "
            "`unsharded(model)`, and the module before it was sharded; or `per_block` of products"
        )


def refuse_compiled(model: nn.Module, /) -> None:
    """Raise for a module that `torch.compile` has wrapped, or that has such a submodule.

    Raises:
        NotImplementedError: It has no layers of its own.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            place = f"model.{name}" if name else "model"
            raise NotImplementedError(
                f"{place} is compiled by `torch.compile`, and blocks with structure are read from "
                f"the layers of the plain module: take `{place}._orig_mod`, for `functional(...)` "
                "as well, as parameters have other names there"
            )


@contextmanager
def linearising(
    space: Space, params: Mapping[str, Tensor], batch: Any, /
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Differentiate a model inside, in the surroundings of every product of the library.

    Returns:
        The parameters as leaves that need a gradient, and a copy of the batch.

    Raises:
        RuntimeError: Autocast is enabled.
        NotImplementedError: (from what is done inside) an operation has no second derivative.
    """
    refuse_autocast(space.device)
    with explained(space, batch), differentiable_twice(space.device):
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
        yield leaves, kept_batch(batch)


@dataclass(frozen=True)
class Called:
    """A module as the loss calls it.

    Attributes:
        arguments: by their names in its forward, defaults included.
        state: its parameters and buffers.
        training: the training flag of each of its modules.
        outputs: what it returns.
    """

    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]
    training: Sequence[tuple[nn.Module, bool]]
    outputs: Tensor


def called(model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any, /) -> Called:
    """What the loss gives to the model, and takes from it.

    Raises:
        ValueError: the loss does not call the model once, or does not take its outputs as they
            are; the model mixes examples, or is random; or a parameter is not the model's.
    """
    found: list[Called] = []

    def record(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        flags = [(module, module.training) for module in model.modules()]
        found.append(Called(bound.arguments, state, flags, outputs))

    with refusing_train_mode(model), hooked({model: record}):
        outputs = loss.outputs(params, batch)
    if len(found) != 1:
        raise ValueError(
            f"the loss calls the model {len(found)} times a batch, and must call it once: give the "
            "module of which the loss is made"
        )
    if outputs is not found[0].outputs or not isinstance(outputs, Tensor):
        raise ValueError(
            "the model must return one tensor, and the loss take it as it is, not cast or changed: "
            "put what is done to it in between into the criterion, or into the model"
        )
    for name, leaf in params.items():
        own = found[0].state.get(name)
        if own is None or own.shape != leaf.shape:
            raise ValueError(
                f"{name!r} of shape {tuple(leaf.shape)} is no parameter of the model: take those "
                "that `functional(model)` returns, or some of them by `split` and `hold`"
            )
    return found[0]


def full_name(path: str, own: str, /) -> str:
    """The name in the model of a parameter of the module at this path."""
    return f"{path}.{own}" if path else own


@contextmanager
def hooked(hooks: Mapping[nn.Module, Callable[..., Any]], /) -> Iterator[None]:
    """Inside, modules call these functions of (module, args, kwargs, output) after they ran."""
    handles = [
        module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def refusing_train_mode(model: nn.Module, /) -> Iterator[None]:
    """Inside, a module that mixes examples or is random raises when it is called."""
    names = {module: name for name, module in model.named_modules()}

    def refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
        if uses_batch_statistics(module):
            raise ValueError(
                f"BatchNorm {names[module]!r} takes the statistics of the batch and mixes "
                "examples, which must be apart: call `model.eval()` before `functional(model)`, or "
                "take exact products, `per_block(hvp(loss)(params, batch), params)`"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise ValueError(
                f"{type(module).__name__} {names[module]!r} in train mode is another function at "
                "each call: call `model.eval()` before `functional(model)`"
            )

    handles = [module.register_forward_pre_hook(refuse) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
