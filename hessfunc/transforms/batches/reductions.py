"""Combination of the losses of batches to the loss of a data set: a weighted mean or a sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hessfunc.containers import number_of
from hessfunc.losses import Loss, LossFunction
from hessfunc.options import described
from hessfunc.transforms.batches.divisor import positions_of, terms_of
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.halves import by_halves, warn_unknown
from hessfunc.transforms.criteria import Reduction, declared_reduction
from hessfunc.trees import Tree


@dataclass(frozen=True)
class Noted:
    """Loss for which a curvature was made.

    Attributes:
        loss: Loss ``(params, batch) -> scalar``.
        params: Parameters of the evaluation.
        batch: Batch of the evaluation.
    """

    loss: LossFunction
    params: Tree
    batch: Any

    @functools.cached_property
    def terms(self) -> float | None:
        """Divisor of the mean of a torch loss, read from the device once; None for other losses."""
        return terms_of(self.loss, self.batch)


@dataclass
class Inner:
    """Inner mean or sum over batches, which is one batch of an outer mean or sum.

    Attributes:
        average: Combination of the inner batches, known after a product.
        weight: Total weight of the inner batches in the last product; None on a mesh, where other
            ranks have parts of the weight.
    """

    average: Average
    weight: float | None = None


class NoTargetsError(ValueError):
    """Error that all targets of a batch are ignored, so that its mean is 0 / 0."""


@dataclass(frozen=True)
class _Watch:
    """Losses and means over batches that `watching` has collected.

    Attributes:
        losses: Losses and means in the order of their evaluation.
        optional: Batch that is left out if all of its targets are ignored; None for no batch.
    """

    losses: list[Noted | Inner]
    optional: Any


_watched: ContextVar[_Watch | None] = ContextVar("watched", default=None)


@contextmanager
def watching(*, optional: Any = None) -> Iterator[list[Noted | Inner]]:
    """Context manager that collects the losses for which curvatures are made in a list.

    Args:
        optional: Batch that raises `NoTargetsError` if all of its targets are ignored, before its
            loss is evaluated.
    """
    seen: list[Noted | Inner] = []
    token = _watched.set(_Watch(seen, optional))
    try:
        yield seen
    finally:
        _watched.reset(token)


@contextmanager
def noted(loss: LossFunction, params: Tree, batch: Any, /) -> Iterator[None]:
    """Context manager that reports a loss to `watching`, but not the losses derived from it."""
    # Dynamo does not trace context variables, so compiled means need a given weight.
    watch = None if torch.compiler.is_compiling() else _watched.get()
    if watch is None:
        yield
        return
    noted_loss = Noted(loss, params, batch)
    watch.losses.append(noted_loss)
    is_optional = watch.optional is not None and watch.optional is batch
    if is_optional and _reduction_of(loss) == "mean" and noted_loss.terms == 0:
        raise NoTargetsError("all targets of the batch are ignored")
    token = _watched.set(None)
    try:
        yield
    finally:
        _watched.reset(token)


def inner(average: Average, /) -> Inner | None:
    """Report a mean over batches to `watching`; return None outside of it."""
    watch = _watched.get()
    if watch is None:
        return None
    mean = Inner(average)
    watch.losses.append(mean)
    return mean


def _reduction_of(loss: LossFunction) -> Reduction | None:
    return declared_reduction(loss.criterion) if isinstance(loss, Loss) else None


_PASS = (
    "pass the number that the loss averages over, such as "
    "`weight=lambda batch: (batch[1] != -100).sum()` or "
    "`weight=lambda batch: class_weights[batch[1]].sum()`, or `weight=hessfunc.examples`"
)


@dataclass
class Average:
    """Combination of batches: a mean with given weights, a mean by examples, or a sum.

    Attributes:
        weight: Weight of a batch given by the user. With None, the weight is the divisor of the
            loss if it is a torch loss that is a mean over targets, and the number of examples if
            it is another mean. If the loss is a sum over examples, batches are summed.
        several: Whether the data may have more than one batch.
        reduction: Reduction of the loss; None if unknown.
    """

    weight: Callable[[Any], float] | None
    several: bool = True
    reduction: Reduction | None = None
    _is_tested: bool = False
    _shares: list[float] | None = None
    _terms: float | None = None
    _is_by_terms: bool = False
    _undecided: int = 0
    _positions: tuple[float, ...] | None = None
    _inner: list[Inner] = field(default_factory=list)
    _beside: float | None = None

    @classmethod
    def over(cls, weight: Callable[[Any], float] | None, batches: Iterable[Any], /) -> Average:
        """Return the combination of these batches, which are several unless their number is 1."""
        return cls(weight, number_of(batches) != 1)

    @property
    def is_sum(self) -> bool:
        """Whether batches are summed."""
        return self.reduction == "sum"

    def counts(self, batch: Any) -> bool:
        """Return whether a batch has a positive weight, before its loss is evaluated."""
        if self.weight is not None:
            return self.of(batch) > 0
        try:
            return examples(batch) > 0
        except ValueError:
            # A sum, or the mean of a single batch, does not need the number of examples.
            return True

    def of(self, batch: Any) -> float:
        """Return the weight of the batch of the last call of `decide`.

        Raises:
            ValueError: If the weight is negative, or the number of examples is ambiguous.
        """
        if self.weight is not None:
            given = self.weight(batch)
            try:
                counted = float(given)
            except (TypeError, ValueError):
                raise TypeError(
                    f"the weight of a batch is {described(given)}: return a number, such as the "
                    "number of examples, `len(batch[1])`"
                ) from None
            if not counted >= 0:
                raise ValueError(f"the weight of a batch is {counted}: it must be at least 0")
            return counted
        if self._inner:
            return self._of_inner(self._inner, self._beside)
        if self.is_sum or not self.several:
            return 1.0
        return float(examples(batch)) if self._terms is None else self._terms

    def later(self, batch: Any) -> Callable[[], float]:
        """Return a function that returns the weight of the batch of the last call of `decide`.

        The weight of an inner mean over batches is known only after its product.
        """
        if self.weight is None and self._inner:
            return functools.partial(self._of_inner, self._inner, self._beside)
        return functools.partial(float, self.of(batch))

    def _of_inner(self, parts: Sequence[Inner], beside: float | None) -> float:
        """Return the common weight of inner means over batches, or 1 for sums.

        Args:
            parts: Inner means or sums over batches, which are added.
            beside: Weight of another loss of the same batch that is added to them.
        """
        for part in parts:
            if part.average.weight is None and part.average.reduction is not None:
                self._take(part.average.reduction)
        if self.is_sum or not self.several:
            return 1.0
        weights = [part.weight for part in parts if part.weight is not None]
        others = weights if beside is None else [*weights, beside]
        if len(weights) < len(parts) or not all(
            math.isclose(weight, weights[0], rel_tol=1e-9) for weight in others
        ):
            raise ValueError(
                "`over_batches` within `over_batches` has no single weight, because the inner one "
                "is on a mesh or is added to a loss of another weight: pass a weight to the outer "
                "one, such as `weight=hessfunc.examples`"
            )
        return weights[0]

    def divisor(self, total: float) -> float:
        """Return the divisor of the weighted sum, given the sum of weights."""
        if self.weight is None and self.reduction is None and self._undecided > 1:
            self._undecided = 0
            warn_unknown("no batch has two examples, which would distinguish a mean from a sum")
        return 1.0 if self.is_sum else total

    def look(self, loss: LossFunction, params: Tree, batch: Any) -> None:
        """Determine the reduction of a loss that is evaluated on a batch, unless it is known."""
        self.decide([Noted(loss, params, batch)])

    def decide(
        self, seen: Sequence[Noted | Inner], *, batch: Any = None, counted: bool = False
    ) -> None:
        """Determine the reduction of the losses of one curvature, and the weight of their batch.

        Args:
            seen: Losses of the curvature, and inner means over batches.
            batch: Larger batch on which the reduction is tested; by default the batch on which
                the losses were evaluated.
            counted: Whether batches have been weighted by their examples already.

        Raises:
            ValueError: If the losses have different reductions or no single weight.
        """
        if self.weight is not None:
            return
        self._inner = [item for item in seen if isinstance(item, Inner)]
        losses = [item for item in seen if isinstance(item, Noted)]
        for noted_loss in losses:
            tested = noted_loss if batch is None else replace(noted_loss, batch=batch)
            reduction = _reduction_of(noted_loss.loss)
            if reduction is None and self.several and not self._is_tested:
                outcome = by_halves(tested.loss, tested.params, tested.batch)
                self._undecided += outcome is None
                self._is_tested = outcome is not None
                reduction = None if outcome == "unknown" else outcome
            if reduction is not None:
                self._take(reduction)
        self._terms = None
        if losses and self.several and not self.is_sum:
            self._weigh(losses, counted=counted)
            if self._terms is None:
                self._compare_positions(losses[0].batch)
        self._beside = None
        if self._inner and losses and self.several and not self.is_sum:
            count = examples(losses[0].batch) if self._terms is None else self._terms
            self._beside = float(count)

    def _take(self, reduction: Reduction) -> None:
        if self.reduction not in (None, reduction):
            raise ValueError(
                "a mean over examples and a sum over examples are added up: use the same "
                "`reduction` for both losses, or pass `weight=hessfunc.examples`"
            )
        self.reduction = reduction

    def _weigh(self, losses: Sequence[Noted], *, counted: bool) -> None:
        """Take the divisor of the losses as the weight if they have a common one.

        Raises:
            ValueError: If the losses have different divisors whose ratio to the number of
                examples varies between batches.
        """
        terms = [item.terms for item in losses]
        alike = len(set(terms)) == 1 and len({id(item.batch) for item in losses}) == 1
        if alike and not counted and self._shares is None:
            self._terms = terms[0]
            self._is_by_terms |= terms[0] is not None
            return
        if self._is_by_terms:
            raise ValueError(f"losses that are added up are means over different targets: {_PASS}")
        try:
            counts = [examples(item.batch) for item in losses]
        except ValueError:
            return
        shares = [
            term / count
            for term, count in zip(terms, counts, strict=True)
            if term is not None and count
        ]
        if self._shares is None:
            self._shares = shares
        for share, other in zip(shares, self._shares, strict=False):
            if not math.isclose(share, other, rel_tol=1e-5):
                raise ValueError(
                    f"the loss is a mean over targets, and one batch has {share:.4g} targets per "
                    f"example, but another has {other:.4g} (ignored targets, class weights or "
                    f"lengths), so the number of examples is not its weight: {_PASS}"
                )

    def _compare_positions(self, batch: Any) -> None:
        """Warn if batches differ in the positions of their examples, over which a loss may average.

        A mean over all positions of a batch, such as the loss of a language model, is weighted by
        the positions, and a mean over examples by the examples. The halves of a batch, which have
        the same length, do not distinguish them.
        """
        positions = positions_of(batch)
        if self._positions is None:
            self._positions = positions
        elif positions and self._positions and positions != self._positions:
            warn_unknown(
                f"one batch has {self._positions[0]:g} positions per example and another has "
                f"{positions[0]:g}, over which the loss may average"
            )
            self._positions = ()
