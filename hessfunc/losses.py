"""Losses as pure functions of parameters and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hessfunc import options
from hessfunc.options import validated
from hessfunc.selection import merge
from hessfunc.spaces.of import space_of
from hessfunc.trees import Tree, leaves, tree_map, unchanged

LossFunction: TypeAlias = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A pure loss ``(params, batch) -> scalar`` that also shows its two halves.

    Attributes:
        outputs: ``(params, batch) -> outputs``, the model.
        criterion: ``(outputs, batch) -> scalar``.
    """

    outputs: Callable[[Tree, Any], Any]
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, params: Tree, batch: Any, /) -> Tensor:
        return self.criterion(self.outputs(params, batch), batch)


@validated
def composed(
    outputs: Callable[[Tree, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    /,
    *,
    targets: Callable[[Any], Any] | None = None,
) -> Loss:
    """The loss of any batch: ``criterion(outputs(params, batch), batch)``.

    Args:
        outputs: ``(params, batch) -> outputs``.
        criterion: ``(outputs, batch) -> scalar``; with ``targets``, ``(outputs, targets)``.
        targets: batch -> targets. A usual criterion, such as ``cross_entropy``, then stays known,
            so that Gauss-Newton and Fisher matrices take its closed forms.

    Raises:
        TypeError: ``outputs`` is a module, which has no params to be given.
    """
    refuse_module(outputs)
    return Loss(outputs, criterion if targets is None else OfTargets(criterion, targets))


@validated
def supervised(
    model_fn: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], /
) -> Loss:
    """The loss of batches ``(inputs, targets)``: ``criterion(model_fn(params, inputs), targets)``.

    Args:
        model_fn: as `functional` returns it.
        criterion: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.cross_entropy``
            or a loss module.

    Raises:
        TypeError: ``model_fn`` is a module; from the loss: a batch is no pair.
    """
    refuse_module(model_fn)
    return Loss(_OfInputs(model_fn), OfTargets(criterion))


def refuse_module(function: object, /) -> None:
    """Raise where a module stands in place of a pure function.

    Raises:
        TypeError: it is so.
    """
    if isinstance(function, nn.Module):
        raise TypeError(
            f"{type(function).__name__} is a module, and no function of (params, ...): make it "
            "pure, `model_fn, params = functional(model)`, and take "
            "`supervised(model_fn, criterion)`"
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
    """A criterion of (outputs, targets) as one of (outputs, batch)."""

    criterion: Callable[[Any, Any], Tensor]
    targets: Callable[[Any], Any] = _targets

    def __call__(self, outputs: Any, batch: Any, /) -> Tensor:
        return self.criterion(outputs, self.targets(batch))


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
    remedy = (
        "for many batches take `over_batches(hvp(loss))(params, loader)`"
        if _is_many(batch)
        else "use `composed(outputs, criterion)` for any other batch"
    )
    raise TypeError(
        f"a supervised loss takes batches (inputs, targets), and got a {type(batch).__name__}"
        f"{size}: {remedy}"
    )


def _is_many(batch: Any) -> bool:
    """Whether it is batches (inputs, targets), not one."""
    return isinstance(batch, DataLoader) or (
        isinstance(batch, (tuple, list))
        and bool(batch)
        and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in batch)
    )


@validated
def hold(loss: LossFunction, rest: Mapping[str, Any], /) -> LossFunction:
    """A loss of some of the parameters alone; the others stay as they are.

    Args:
        loss: of all parameters. A `Loss` gives a `Loss`.
        rest: the parameters that are held, as `split` returns them. They are not copied: writes
            through ``.data`` or NumPy are not seen, so make loss and matvec again after those.

    Raises:
        RuntimeError: (from the loss) a held parameter has changed in place since.
    """
    if not rest:
        return loss
    fixed = tree_map(Tensor.detach, rest)
    refuse_if_changed = unchanged(space_of(fixed).names, leaves(fixed))

    def whole(chosen: Tree) -> dict[str, Any]:
        refuse_if_changed()
        return merge(chosen, fixed)

    return _of_whole(loss, whole)


def _of_whole(loss: LossFunction, whole: Callable[[Tree], Tree]) -> LossFunction:
    """The loss of a part of the parameters, from which ``whole`` makes all of them."""
    if isinstance(loss, Loss):
        outputs = loss.outputs
        return Loss(lambda part, batch: outputs(whole(part), batch), loss.criterion)
    return lambda part, batch: loss(whole(part), batch)


@options.validated(params=options.mapping)
def sliced(
    loss: LossFunction, params: Mapping[str, Tensor], slices: Mapping[str, Any], /
) -> tuple[LossFunction, dict[str, Tensor]]:
    """A loss of slices of some parameters alone, such as one attention head, and these slices.

    Args:
        loss: of all parameters. A `Loss` gives a `Loss`.
        params: all parameters, a flat dict.
        slices: for each parameter that is cut, any index that tensors take: ``slice(0, 8)``,
            ``numpy.s_[:, 0:8]``, a list of rows. All else is held fixed.

    Returns:
        ``(loss, chosen)``, with ``chosen`` a dict of the cut tensors.

    Raises:
        ValueError: There is no parameter of that name; a slice is no index of it, is empty, or
            names an entry twice.
    """
    if not slices:
        raise ValueError("slices is empty: name a parameter, and which part of it")
    if unknown := sorted(set(slices) - set(params)):
        raise ValueError(f"there is no parameter named {', '.join(unknown)}")
    fixed = {name: leaf.detach() for name, leaf in params.items()}
    places = {name: _places(name, fixed[name], index) for name, index in slices.items()}
    for name, place in places.items():
        if not len(place) or len(place.unique()) < len(place):
            raise ValueError(f"the slice of {name!r} is empty or names an entry twice")
    refuse_if_changed = unchanged(tuple(fixed), list(fixed.values()))

    def whole(chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        refuse_if_changed()
        # Out of place, for forward mode.
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
    """The numbers of the entries of a flat leaf that an index chooses."""
    try:
        found = torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)[index]
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"slices[{name!r}] is no index of a tensor of shape {tuple(leaf.shape)}: {error}"
        ) from None
    return found.flatten()
