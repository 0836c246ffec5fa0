"""Losses as pure functions of parameters and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hessfunc import options
from hessfunc.changes import note_read, unchanged
from hessfunc.options import validated
from hessfunc.selection import first_of, merge
from hessfunc.spaces.of import space_of
from hessfunc.trees import Tree, leaves, tree_map

LossFunction: TypeAlias = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """Pure loss ``(params, batch) -> scalar`` with its two parts, the model and the criterion.

    Attributes:
        outputs: Model, ``(params, batch) -> outputs``.
        criterion: Criterion, ``(outputs, batch) -> scalar``.
    """

    outputs: Callable[[Tree, Any], Any]
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, params: Tree, batch: Any, /) -> Tensor:
        return self.criterion(self.outputs(params, batch), batch)

    def of(self, whole: Callable[[Tree], Tree], /) -> Loss:
        """Return the loss as a function of other parameters, which ``whole`` maps to these."""
        outputs = self.outputs
        return Loss(lambda params, batch: outputs(whole(params), batch), self.criterion)


@validated
def composed(
    outputs: Callable[[Tree, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    /,
    *,
    targets: Callable[[Any], Any] | None = None,
) -> Loss:
    """Return the loss ``criterion(outputs(params, batch), batch)`` for batches of any type.

    Examples:
        >>> model_fn = lambda params, batch: batch["x"] @ params
        >>> def criterion(outputs, batch):
        ...     return (batch["weight"] * (outputs - batch["y"]) ** 2).mean()
        >>> loss = hf.composed(model_fn, criterion)
        >>> batch = {"x": torch.eye(2), "y": torch.zeros(2), "weight": torch.tensor([1.0, 3.0])}
        >>> hf.matrix(hf.hvp(loss)(torch.zeros(2), batch), torch.zeros(2))
        tensor([[1., 0.],
                [0., 3.]])

    Args:
        outputs: Model, ``(params, batch) -> outputs``.
        criterion: Criterion, ``(outputs, batch) -> scalar``, or ``(outputs, targets) -> scalar``
            if ``targets`` is given.
        targets: Function that returns the targets of a batch. It lets Gauss-Newton and Fisher
            matrices recognise a standard criterion, such as ``cross_entropy``, and use its closed
            forms.

    Raises:
        TypeError: If ``outputs`` is an ``nn.Module``, which takes no params.
    """
    refuse_module(outputs)
    return Loss(outputs, criterion if targets is None else OfTargets(criterion, targets))


@validated
def supervised(
    model_fn: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], /
) -> Loss:
    """Return the loss ``criterion(model_fn(params, inputs), targets)``.

    The loss takes batches that are pairs ``(inputs, targets)``.

    Examples:
        >>> model_fn, params = hf.functional(torch.nn.Linear(3, 2))
        >>> loss = hf.supervised(model_fn, torch.nn.functional.mse_loss)
        >>> loss(params, (torch.randn(5, 3), torch.randn(5, 2))).shape
        torch.Size([])

    Args:
        model_fn: Model ``(params, inputs) -> outputs``, as returned by `functional`.
        criterion: Criterion ``(outputs, targets) -> scalar``, such as
            ``torch.nn.functional.cross_entropy`` or a loss module.

    Raises:
        TypeError: If ``model_fn`` is an ``nn.Module`` or, raised by the returned loss, if a batch
            is not a pair.
    """
    refuse_module(model_fn)
    return Loss(_OfInputs(model_fn), OfTargets(criterion))


def refuse_module(function: object, /) -> None:
    """Raise if a module is passed instead of a pure function.

    Raises:
        TypeError: If ``function`` is an ``nn.Module``.
    """
    if isinstance(function, nn.Module):
        raise TypeError(
            f"{type(function).__name__} is a module, not a function of (params, ...): use "
            "`model_fn, params = functional(model)` and `supervised(model_fn, criterion)`"
        )


@dataclass(frozen=True)
class _OfInputs:
    model_fn: Callable[[Tree, Any], Any]

    def __call__(self, params: Tree, batch: Any, /) -> Any:
        return self.model_fn(params, _pair(batch)[0])


def _targets(batch: Any) -> Any:
    return _pair(batch)[1]


@dataclass(frozen=True)
class OfTargets:
    """Criterion of (outputs, targets) as a criterion of (outputs, batch)."""

    criterion: Callable[[Any, Any], Tensor]
    targets: Callable[[Any], Any] = _targets

    def __call__(self, outputs: Any, batch: Any, /) -> Tensor:
        return self.criterion(outputs, self.targets(batch))


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
    remedy = (
        "for several batches use `over_batches(hvp(loss))(params, loader)`"
        if _is_many(batch)
        else "use `composed(outputs, criterion)` for any other batch"
    )
    raise TypeError(
        f"a supervised loss takes a batch (inputs, targets), but got a {type(batch).__name__}"
        f"{size}: {remedy}"
    )


def _is_many(batch: Any) -> bool:
    """Return whether ``batch`` is a loader or a sequence of pairs instead of one pair."""
    return isinstance(batch, DataLoader) or (
        isinstance(batch, (tuple, list))
        and bool(batch)
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in batch)
    )


@validated
def hold(loss: LossFunction, rest: Mapping[str, Any], /) -> LossFunction:
    """Return the loss as a function of some parameters, with the others held fixed.

    Examples:
        >>> loss = lambda params, batch: params["a"].square().sum() * params["b"].sum()
        >>> part, rest = hf.split({"a": torch.ones(2), "b": torch.ones(3)}, "a")
        >>> hf.matrix(hf.hvp(hf.hold(loss, rest))(part, None), part)
        tensor([[6., 0.],
                [0., 6.]])

    Args:
        loss: Loss of all parameters. A `Loss` gives a `Loss`.
        rest: Parameters to hold fixed, as returned by `split`. They are not copied.

    Returns:
        Loss ``(chosen, batch) -> scalar``.

    Raises:
        RuntimeError: If a fixed parameter has changed in place; raised by the returned loss.
    """
    if not rest:
        return loss
    fixed = tree_map(Tensor.detach, rest)
    named = list(zip(space_of(fixed).names, leaves(fixed), strict=True))
    refuse_if_changed = unchanged(*zip(*named, strict=True))

    def whole(chosen: Tree) -> dict[str, Any]:
        refuse_if_changed()
        note_read(named)
        return merge(chosen, fixed)

    return _of_whole(loss, whole)


def _of_whole(loss: LossFunction, whole: Callable[[Tree], Tree]) -> LossFunction:
    """Return the loss of some parameters, which ``whole`` extends to all parameters."""
    if isinstance(loss, Loss):
        return loss.of(whole)
    return lambda part, batch: loss(whole(part), batch)


@options.validated(params=options.mapping)
def sliced(
    loss: LossFunction, params: Mapping[str, Tensor], slices: Mapping[str, Any], /
) -> tuple[LossFunction, dict[str, Tensor]]:
    """Return the loss as a function of slices of some parameters, and these slices.

    A slice may be one attention head, for instance. All other entries are held fixed.

    Args:
        loss: Loss of all parameters. A `Loss` gives a `Loss`.
        params: Flat dict of all parameters.
        slices: Index for each parameter that is sliced. Any index that tensors accept:
            ``slice(0, 8)``, ``numpy.s_[:, 0:8]`` or a list of rows.

    Returns:
        ``(loss, chosen)``, where ``chosen`` is a dict of the sliced tensors.

    Raises:
        ValueError: If no parameter has a given name, or if a slice is not a valid index, is empty
            or contains an entry twice.
    """
    if not slices:
        raise ValueError("slices is empty: pass for instance slices={'0.weight': slice(0, 8)}")
    if unknown := sorted(set(slices) - set(params)):
        raise ValueError(
            f"there is no parameter named {', '.join(unknown)} among {first_of(list(params))}"
        )
    fixed = {name: leaf.detach() for name, leaf in params.items()}
    places = {name: _places(name, fixed[name], index) for name, index in slices.items()}
    for name, place in places.items():
        if not len(place) or len(place.unique()) < len(place):
            raise ValueError(
                f"the slice of {name!r} is empty or contains an entry twice: pass distinct "
                f"indices, such as slices={{{name!r}: slice(0, 1)}}"
            )
    refuse_if_changed = unchanged(tuple(fixed), list(fixed.values()))

    def whole(chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        refuse_if_changed()
        note_read(fixed.items())
        # Forward mode needs `index_put` out of place: the fixed tensors carry no tangents.
        changed = {
            name: fixed[name]
            .flatten()
            .index_put((places[name],), part.flatten())
            .view(fixed[name].shape)
            for name, part in chosen.items()
        }
        return fixed | changed

    chosen = {name: fixed[name][index] for name, index in slices.items()}
    return _of_whole(loss, whole), chosen


def _places(name: str, leaf: Tensor, index: Any) -> Tensor:
    """Return the positions in the flat leaf of the entries that an index chooses."""
    try:
        positions = torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)[index]
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"slices[{name!r}] is not a valid index of a tensor of shape {tuple(leaf.shape)}: "
            f"{error}"
        ) from None
    return positions.flatten()
