"""Curvature with respect to activations, by losses of perturbations inside a model."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.recomputed_blocks import no_module
from hessfunc.changes import note_read
from hessfunc.copies import hooked
from hessfunc.losses import Loss, supervised
from hessfunc.modules import functional
from hessfunc.options import validated
from hessfunc.trees import tree_map

# Key (module name, index of the call) of the perturbation in one call of a module.
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
    """Return a loss of perturbations of activations, and the zeros at which to evaluate it.

    Perturbations are added to the input or output of each selected module:

        loss, zeros = activations(model, criterion, "conv*")
        matvec = hvp(loss)(zeros(inputs), (inputs, targets))

    The matvec is the activation Hessian, a symmetric matrix over all selected activations;
    `ggnvp` of the same loss gives the Gauss-Newton matrix. The ``by_leaf`` attribute of a trace
    estimate is the trace by layer. A perturbation affects only its module, so on a skip connection
    the other branch does not change.

    Args:
        model: Module. Its parameters are read in each call, neither changed nor copied; see
            `functional`.
        criterion: Criterion ``(outputs, targets) -> scalar``.
        select: Modules to perturb: a glob over names (``"layer1.*.conv?"``, ``"*conv"``); a name
            or the end of one, such as ``"conv"`` for ``"block.conv"``; a module type or a tuple of
            types; or a predicate ``(name, module)``.
        at: Position of the perturbation: ``"input"`` for the first floating-point argument of a
            module, ``"output"`` for its first floating-point result.

    Returns:
        ``(loss, zeros)``. The loss takes ``(perturbations, batch)`` with batches
        ``(inputs, targets)``. ``zeros(inputs)`` returns a dict of zeros with keys (module name,
        index of the call).

    Raises:
        ValueError: If no module is selected or, raised by ``zeros`` and the loss, if a selected
            module has no floating-point tensor there or is called more often than ``zeros``
            recorded.

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
        perturbations: dict[Key, Tensor] = {}

        def record(key: Key, value: Tensor) -> Tensor:
            perturbations[key] = torch.zeros_like(value)
            return value

        device = next(iter(params.values())).device
        with differentiable_twice(device), torch.no_grad(), _hooks(chosen, at, record):
            model_fn(params, inputs)
        # Sort by the order of the modules in the model instead of the order of their calls.
        order = {name: i for i, name in enumerate(chosen)}
        return dict(sorted(perturbations.items(), key=lambda item: (order[item[0][0]], item[0][1])))

    def perturbed(perturbations: dict[Key, Tensor], inputs: Any) -> Any:
        def add(key: Key, value: Tensor) -> Tensor:
            if key not in perturbations:
                raise ValueError(
                    f"call {key[1] + 1} of module {key[0]!r} has no perturbation: pass "
                    "zeros(inputs) with the inputs of the batch"
                )
            if perturbations[key].shape != value.shape:
                raise ValueError(
                    f"the perturbation of {key[0]!r} has shape {tuple(perturbations[key].shape)}, "
                    f"but its activation has {tuple(value.shape)}: pass zeros(inputs) with the "
                    "inputs of the batch"
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


def _hooks(
    chosen: dict[str, nn.Module],
    at: Literal["input", "output"],
    change: Callable[[Key, Tensor], Tensor],
) -> AbstractContextManager[object]:
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

        new = tree_map(of_leaf, values)
        if not done:
            raise ValueError(
                f"module {name!r} has no floating-point tensor at its {at}: select other modules, "
                f"or pass at={'output' if at == 'input' else 'input'!r}"
            )
        return new

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return changed(name, (args, kwargs))

    def after(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return changed(name, output)

    if at == "input":
        return hooked(before={m: partial(before, name) for name, m in chosen.items()})
    return hooked(after={m: partial(after, name) for name, m in chosen.items()})
