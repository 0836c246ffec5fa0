"""Record how a loss calls its model, and check that the examples stay independent."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.contexts import kept_batch
from hessfunc.autograd.functorch import transforming
from hessfunc.copies import hooked, original_of
from hessfunc.losses import Loss
from hessfunc.spaces.space import Space
from hessfunc.training_mode import uses_batch_statistics


def refuse_dtensors(space: Space, /) -> None:
    """Raise if parameters are DTensors, because each rank has only a part of each layer."""
    if space.distributed:
        raise NotImplementedError(
            "structured blocks do not support DTensor parameters: pass `unsharded(model)` as "
            "params and build the loss from the module before sharding, or use "
            "`per_block(hvp(loss)(params, batch), params)`"
        )


def refuse_compiled(model: nn.Module, /) -> None:
    """Raise for a module that `torch.compile` has wrapped, or that has such a submodule.

    Raises:
        NotImplementedError: If it is a `torch.compile`d module, without layers of its own.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            place = f"model.{name}" if name else "model"
            raise NotImplementedError(
                f"{place} is compiled by `torch.compile`, and structured blocks are read from "
                f"the layers of the plain module: take `{place}._orig_mod`, for `functional(...)` "
                "as well, as parameters have other names there"
            )


@contextmanager
def differentiating(
    space: Space, params: Mapping[str, Tensor], batch: Any, /
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Context in which a model is differentiated, as in every product of the library.

    Yields:
        The parameters as leaves that require a gradient, and a copy of the batch.

    Raises:
        RuntimeError: If autocast is enabled.
        NotImplementedError: If an operation inside the context has no second derivative, or if a
            transform is active.
    """
    if transforming():
        raise NotImplementedError(
            "structured blocks are computed from a graph of autograd, which transforms of "
            "torch.func and torch.compile do not give: make them outside. Their products can be "
            "transformed as functions of the vectors"
        )
    refuse_autocast(space.device)
    with explained(space, batch), differentiable_twice(space.device):
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
        yield leaves, kept_batch(batch)


@dataclass(frozen=True)
class ModelCall:
    """Record of one call of a module by the loss.

    Attributes:
        arguments: Arguments by their names in ``forward``, including defaults.
        state: Parameters and buffers of the module.
        training: Training flag of each submodule.
        outputs: Value that the module returned.
    """

    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]
    training: Sequence[tuple[nn.Module, bool]]
    outputs: Tensor


def recorded_call(
    model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any, /
) -> ModelCall:
    """Evaluate the outputs of the loss, and record its call of the model.

    Raises:
        ValueError: If the loss does not call the model exactly once, or changes its outputs before
            the criterion; if the model mixes examples or is random; or if a parameter does not
            belong to the model.
    """
    calls: list[ModelCall] = []

    def record(
        called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        bound = inspect.signature(called.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        state = dict(called.named_parameters(remove_duplicate=False)) | dict(called.named_buffers())
        pairs = zip(model.modules(), called.modules(), strict=True)
        flags = [(module, part.training) for module, part in pairs]
        calls.append(ModelCall(bound.arguments, state, flags, outputs))

    with calling(model), hooked(after={model: record}):
        outputs = loss.outputs(params, batch)
    if len(calls) != 1:
        raise ValueError(
            f"the loss calls the model {len(calls)} times in a batch instead of once: pass the "
            "module from which the loss was made"
        )
    if outputs is not calls[0].outputs or not isinstance(outputs, Tensor):
        raise ValueError(
            "the model must return one tensor, and the loss must pass it to the criterion "
            "unchanged: move casts and other operations into the criterion or into the model"
        )
    for name, leaf in params.items():
        own = calls[0].state.get(name)
        if own is None or own.shape != leaf.shape:
            raise ValueError(
                f"{name!r} of shape {tuple(leaf.shape)} is not a parameter of the model: pass the "
                "params from `functional(model)`, or a part of them with `split` and `hold`"
            )
    return calls[0]


def full_name(path: str, own: str, /) -> str:
    """Return the name in the model of a parameter of the module at a path."""
    return f"{path}.{own}" if path else own


@contextmanager
def calling(model: nn.Module, /) -> Iterator[None]:
    """Context in which a loss calls its model, whose modules neither mix examples nor are random.

    Raises:
        ValueError: If a module is called that mixes examples or is random, or if the loss
            evaluates another model, or one of which ``model`` is a part.
    """
    called = []

    def refuse(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append(name)
        if uses_batch_statistics(module):
            raise ValueError(
                f"BatchNorm {name!r} in train mode uses batch statistics and mixes examples: call "
                "`model.eval()` before `functional(model)`, or use exact products, "
                "`per_block(hvp(loss)(params, batch), params)`"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise ValueError(
                f"{type(module).__name__} {name!r} in train mode changes with each call: call "
                "`model.eval()` before `functional(model)`"
            )

    hooks = {module: partial(refuse, name) for name, module in model.named_modules()}
    with hooked(before=hooks) as evaluated:
        yield
    _refuse_another(model, evaluated, is_called=bool(called))


def _refuse_another(model: nn.Module, evaluated: Sequence[nn.Module], *, is_called: bool) -> None:
    """Raise unless a loss evaluates the model, or modules that belong to it or share none of it."""
    this = type(model).__name__
    own, tensors = set(model.modules()), set(map(id, model.parameters()))

    def is_outside(module: nn.Module) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module not in own
        return any(id(leaf) not in tensors for leaf in module.parameters(recurse=False))

    for other in evaluated:
        parts = {name: original_of(module) for name, module in other.named_modules()}
        outside = [name for name, part in parts.items() if is_outside(part)]
        if outside and not own.isdisjoint(parts.values()):
            raise ValueError(
                f"the loss evaluates a {type(other).__name__}, whose module {outside[0]!r} does "
                f"not belong to this {this}: pass the module from which the loss was made"
            )
    if not is_called:
        names = dict.fromkeys(type(original_of(other)).__name__ for other in evaluated)
        others = " and ".join(f"another {n}" if n == this else f"a {n}" for n in names)
        instead = f"evaluates {others} and does not call" if others else "does not call"
        raise ValueError(
            f"the loss {instead} this {this}: pass the module from which the loss was made, not a "
            "copy of it"
        )
