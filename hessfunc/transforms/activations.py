"""Curvature with respect to activations: losses of perturbations inside a model."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.recompute import no_module
from hessfunc.losses import Loss, supervised
from hessfunc.modules import functional, note_read
from hessfunc.options import validated
from hessfunc.trees import tree_map

# One perturbation for each call of each chosen module: (module name, number of the call).
Key: TypeAlias = tuple[str, int]
Select: TypeAlias = (
    str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool]
)


@validated
def activations(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    select: Select,
    /,
    *,
    at: Literal["input", "output"] = "input",
) -> tuple[Loss, Callable[[Any], dict[Key, Tensor]]]:
    """A loss of perturbations of activations, and the zeros at which to take its curvature.

    Each chosen module alone sees its perturbation, in what it reads or in what it gives: on a skip
    connection the other branch does not. Then

        loss, zeros = activations(model, criterion, "conv*")
        matvec = hvp(loss)(zeros(inputs), (inputs, targets))

    is the activation Hessian, a symmetric matrix over all chosen activations, and `ggnvp` of the
    same loss its Gauss-Newton matrix. A trace estimate's ``by_leaf`` is the trace by layer.

    Args:
        model: the module; its parameters are read in each call, not changed and not copied: see
            `functional`.
        criterion: ``(outputs, targets) -> scalar``.
        select: which modules: a glob over names (``"layer1.*.conv?"``, ``"*conv"``); a name or the
            last parts of one, as in ``"conv"`` of ``"block.conv"``; a module type or a tuple of
            types; or a predicate ``(name, module)``.
        at: ``"input"``: what a module reads, its first floating-point argument; ``"output"``: what
            it gives, the first floating-point tensor.

    Returns:
        ``(loss, zeros)``: ``loss(perturbations, batch)`` of batches ``(inputs, targets)``, and
        ``zeros(inputs)``, a dict of zeros keyed (module name, number of the call).

    Raises:
        ValueError: no module is chosen, or (from ``zeros`` and the loss) a chosen module has no
            floating-point tensor there, or is called more often than ``zeros`` saw.

    Source: Yao, Gholami, Keutzer and Mahoney 2020, arXiv 1912.07145, with activations in place of
    parameters; Dong et al. 2020, arXiv 1911.03852 (HAWQ-V2).
    """
    if at not in ("input", "output"):
        raise ValueError(f"at={at!r}: choose 'input' or 'output'")
    chosen = {name: m for name, m in model.named_modules() if _is_chosen(select, name, m)}
    if not chosen:
        raise no_module(repr(select), model)
    model_fn, params = functional(model, trainable_only=False)

    def zeros(inputs: Any, /) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}

        def record(key: Key, value: Tensor) -> Tensor:
            found[key] = torch.zeros_like(value)
            return value

        device = next(iter(params.values())).device
        with differentiable_twice(device), torch.no_grad(), _hooks(chosen, at, record):
            model_fn(params, inputs)
        # The order of the modules in the model, not that of the calls.
        order = {name: i for i, name in enumerate(chosen)}
        return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1])))

    def perturbed(perturbations: dict[Key, Tensor], inputs: Any) -> Any:
        def add(key: Key, value: Tensor) -> Tensor:
            if key not in perturbations:
                raise ValueError(
                    f"module {key[0]!r} is called for time {key[1] + 1}, and there is no "
                    "perturbation for it: make zeros(inputs) of the same inputs"
                )
            if perturbations[key].shape != value.shape:
                raise ValueError(
                    f"the perturbation of {key[0]!r} has shape {tuple(perturbations[key].shape)}, "
                    f"its activation {tuple(value.shape)}: make zeros(inputs) of the same inputs"
                )
            return value + perturbations[key]

        note_read(params.items())
        with _hooks(chosen, at, add):
            return model_fn(params, inputs)

    return supervised(perturbed, criterion), zeros


def _is_chosen(select: Select, name: str, module: nn.Module) -> bool:
    if isinstance(select, str):
        is_end = name == select or name.endswith(f".{select}")
        return bool(name) and (is_end or fnmatch.fnmatchcase(name, select))
    if isinstance(select, (type, tuple)):
        return isinstance(module, select)
    return select(name, module)


@contextmanager
def _hooks(
    chosen: dict[str, nn.Module],
    at: Literal["input", "output"],
    change: Callable[[Key, Tensor], Tensor],
) -> Iterator[None]:
    calls: Counter[str] = Counter()

    def changed(name: str, values: Any) -> Any:
        key = name, calls[name]
        calls[name] += 1
        done = False

        def of_leaf(value: Any) -> Any:
            nonlocal done
            if done or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            done = True
            return change(key, value)

        found = tree_map(of_leaf, values)
        if not done:
            raise ValueError(f"module {name!r} has no floating-point tensor at its {at}")
        return found

    handles = []
    for name, module in chosen.items():
        if at == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: changed(name, (args, kwargs)),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                module.register_forward_hook(lambda _, __, out, name=name: changed(name, out))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
