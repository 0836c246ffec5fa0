"""How the loss of a data set follows from those of its batches: as a weighted mean, or as a sum."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string

from hessfunc.autograd import differentiable_twice
from hessfunc.losses import Loss, LossFunction, OfTargets
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.examples import examples, rows_of
from hessfunc.trees import Tree

Reduction: TypeAlias = Literal["mean", "sum"]


class ReductionWarning(UserWarning):
    """Whether a loss is a mean or a sum over examples could not be told."""


def declared_reduction(criterion: Any, /) -> Reduction | None:
    """Return the reduction of a loss module or function of torch, or None where it is not known.

    Partials and the wrappers of this library are looked through. A subclass of a loss module may
    compute anything, so its reduction is not known.
    """
    while isinstance(criterion, OfTargets) or hasattr(criterion, "output_hessian"):
        criterion = criterion.criterion
    options: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        options = criterion.keywords | options
        criterion = criterion.func
    if isinstance(criterion, nn.Module):
        of_torch = type(criterion).__module__ == nn.modules.loss.__name__
        found = getattr(criterion, "reduction", None) if of_torch else None
    elif getattr(criterion, "__module__", None) == F.__name__:
        parameter = inspect.signature(criterion).parameters.get("reduction")
        found = options.get("reduction", None if parameter is None else parameter.default)
        legacy = options.get("size_average"), options.get("reduce")
        if legacy != (None, None):
            found = legacy_get_string(*legacy, emit_warning=False)
    else:
        return None
    if found == "batchmean":
        return "mean"
    return found if found in ("mean", "sum") else None


_OF_CLASSES = {F.cross_entropy: nn.CrossEntropyLoss, F.nll_loss: nn.NLLLoss}


def _terms(loss: Loss, batch: Any) -> float | None:
    """Return what a mean over classified targets divides by; None of any other loss.

    Ignored targets do not count, and others by the weights of their classes.
    """
    criterion = loss.criterion
    if not isinstance(criterion, OfTargets):
        return None
    targets = criterion.targets(batch)
    inner: Any = criterion.criterion
    options: dict[str, Any] = {}
    while isinstance(inner, functools.partial):
        options = inner.keywords | options
        inner = inner.func
    if type(inner) in _OF_CLASSES.values():
        options = {"weight": inner.weight, "ignore_index": inner.ignore_index}
    elif not any(inner is function for function in _OF_CLASSES):
        return None
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    kept = targets[targets != options.get("ignore_index", -100)]
    weight = options.get("weight")
    return float(len(kept) if weight is None else weight.to(kept.device)[kept].sum())


@dataclass(frozen=True)
class Noted:
    """A loss of which a curvature was made."""

    loss: LossFunction
    params: Tree
    batch: Any


_watched: ContextVar[list[Noted] | None] = ContextVar("watched", default=None)


@contextmanager
def watching() -> Iterator[list[Noted]]:
    """Inside, the losses of which curvatures are made are added to a list."""
    seen: list[Noted] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


@contextmanager
def noted(loss: LossFunction, params: Tree, batch: Any, /) -> Iterator[None]:
    """Show a loss to `watching`; losses that are derived from it inside are not shown."""
    seen = _watched.get()
    if seen is None:
        yield
        return
    seen.append(Noted(loss, params, batch))
    token = _watched.set(None)
    try:
        yield
    finally:
        _watched.reset(token)


@dataclass
class Average:
    """How batches are put together: by weights of the user, by examples, or as a sum.

    Attributes:
        weight: Weight of a batch, for a weighted mean. None: the examples of a batch where the
            loss is a mean over them; where it is a sum over examples, batches are summed.
        several: Whether there is more than one batch, as far as it is known.
        reduction: Reduction of the loss, once it is known.
    """

    weight: Callable[[Any], float] | None
    several: bool = True
    reduction: Reduction | None = None
    _is_tested: bool = False
    _share: float | None = None
    _is_told: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether batches are summed."""
        return self.reduction == "sum"

    def counts(self, batch: Any) -> bool:
        """Whether a batch has a weight, before its loss is evaluated."""
        if self.weight is not None:
            return self.of(batch) > 0
        try:
            return examples(batch) > 0
        except ValueError:
            # Of a sum, or of one batch, the number of examples is not needed.
            return True

    def of(self, batch: Any) -> float:
        """Return the weight of a batch whose loss is decided.

        Raises:
            ValueError: The weight is negative, or the number of examples is a guess.
        """
        if self.weight is not None:
            counted = float(self.weight(batch))
            if not counted >= 0:
                raise ValueError(f"the weight of a batch is {counted}: at least 0")
            return counted
        if self.is_sum or not self.several:
            return 1.0
        return float(examples(batch))

    def divisor(self, total: float) -> float:
        """Return the number by which the weighted sum is divided, given the sum of weights."""
        return 1.0 if self.is_sum else total

    def look(self, loss: LossFunction, params: Tree, batch: Any) -> None:
        """Find the reduction of a loss that is evaluated on a batch, unless it is known."""
        self.decide([Noted(loss, params, batch)])

    def decide(self, seen: list[Noted], *, batch: Any = None) -> None:
        """Find the reduction of the losses of one curvature, unless it is known.

        Args:
            seen: Losses and what they were evaluated on.
            batch: Batch that tells more than that on which they were evaluated.

        Raises:
            ValueError: The losses have different reductions.
        """
        if self.weight is not None:
            return
        for one in seen:
            if batch is not None:
                one = replace(one, batch=batch)
            found = declared_reduction(one.loss.criterion) if isinstance(one.loss, Loss) else None
            if found is None and self.several and not self._is_tested:
                found = self._tested(one)
            if found is not None:
                if self.reduction not in (None, found):
                    raise ValueError(
                        "a mean over examples and a sum over examples are added up: give both "
                        "losses one `reduction`, or pass `weight=hessfunc.examples`"
                    )
                self.reduction = found
                if found == "mean" and self.several and not self._is_told:
                    self._compare(one)

    def _compare(self, one: Noted) -> None:
        """Warn where a mean over targets is weighted by examples that have more or fewer."""
        terms = _terms(one.loss, one.batch) if isinstance(one.loss, Loss) else None
        try:
            count = examples(one.batch)
        except ValueError:
            return
        if terms is None or not count:
            return
        share = terms / count
        if self._share is None:
            self._share = share
        elif not math.isclose(share, self._share, rel_tol=1e-5):
            self._is_told = True
            warnings.warn(
                f"the loss is a mean over targets, of which a batch has {share:.4g} an example "
                f"and another {self._share:.4g} (ignored targets, weights of classes, lengths); "
                "batches are weighted by their examples. Pass `weight=`, what the loss is a mean "
                "over, such as `lambda batch: (batch[1] != -100).sum()`, or `hessfunc.examples`",
                ReductionWarning,
                stacklevel=2,
            )

    def _tested(self, one: Noted) -> Reduction | None:
        """Compare the loss of a batch with those of its halves."""
        try:
            count = examples(one.batch)
        except ValueError:
            return None
        if count < 2:
            return None
        self._is_tested = True
        half = count // 2
        try:
            rows, build = rows_of(one.batch)
            halves = [build([row[:half] for row in rows]), build([row[half:] for row in rows])]
            whole, first, second = _values(one, [one.batch, *halves])
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _warn(f"the loss of half a batch could not be evaluated ({reason})")
            return None
        share = half / count
        is_mean = _is_close(whole, share * first + (1 - share) * second)
        is_sum = _is_close(whole, first + second)
        if is_mean and is_sum:
            self._is_tested = False
            return None
        if not is_mean and not is_sum:
            _warn(
                f"the loss of a batch is {float(whole):.4g}, and those of its halves are "
                f"{float(first):.4g} and {float(second):.4g}"
            )
            return None
        return "mean" if is_mean else "sum"


def _values(one: Noted, batches: list[Any]) -> list[Tensor]:
    space = space_of(one.params)
    params = space.tree([leaf.detach() for leaf in space.tree_leaves(one.params)])
    values = []
    for batch in batches:
        # Random layers draw alike each time.
        with differentiable_twice(space.device), torch.no_grad():
            values.append(one.loss(params, batch).detach())
    return values


def _is_close(value: Tensor, other: Tensor) -> bool:
    rtol = max(1e-3, 8 * torch.finfo(value.dtype).eps)
    return bool(torch.isclose(value, other, rtol=rtol, atol=0))


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}, so it is not known to be a mean or a sum over examples; batches are weighted "
        "by their examples. Pass `weight=`, what the loss is a mean over: `hessfunc.examples`, "
        "or such as `lambda batch: (batch[1] != -100).sum()`",
        ReductionWarning,
        stacklevel=2,
    )
