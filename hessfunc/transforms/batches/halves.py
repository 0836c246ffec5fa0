"""Distinction of a mean from a sum over examples, by the losses of the halves of a batch."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice
from hessfunc.autograd.errors import first_line
from hessfunc.autograd.functorch import transforming
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.divisor import HIDDEN
from hessfunc.transforms.batches.examples import examples, microbatches
from hessfunc.transforms.criteria import Reduction
from hessfunc.trees import Tree


class ReductionWarning(UserWarning):
    """Warning that the reduction of a loss, mean or sum over examples, could not be determined."""


def by_halves(
    loss: LossFunction, params: Tree, batch: Any, /
) -> Reduction | Literal["unknown"] | None:
    """Return the reduction of a loss, by comparing the loss of a batch with those of its halves.

    With the losses a and b of the halves, and the share s of examples in the first half, a mean is
    ``s a + (1 - s) b`` and a sum is ``a + b``.

    Returns:
        None if this batch does not distinguish a mean from a sum, and ``"unknown"``, with a
        warning, if the loss is neither.
    """
    try:
        count = examples(batch)
    except ValueError:
        return None
    if count < 2:
        return None
    if transforming():
        raise NotImplementedError(HIDDEN)
    half = (count + 1) // 2
    try:
        whole, first, second = _values(loss, params, [batch, *microbatches(batch, half)])
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        warn_unknown(f"the loss of half a batch could not be evaluated ({first_line(error)})")
        return "unknown"
    share = half / count
    is_mean = _is_close(whole, share * first + (1 - share) * second)
    is_sum = _is_close(whole, first + second)
    if is_mean and is_sum:
        return None
    if not is_mean and not is_sum:
        warn_unknown(
            f"the loss of a batch is {float(whole):.4g}, and the losses of its halves are "
            f"{float(first):.4g} and {float(second):.4g}"
        )
        return "unknown"
    return "mean" if is_mean else "sum"


def _values(loss: LossFunction, params: Tree, batches: list[Any]) -> list[Tensor]:
    space = space_of(params)
    point = space.tree([leaf.detach() for leaf in space.tree_leaves(params)])
    values = []
    for batch in batches:
        # Random layers draw the same numbers in each evaluation.
        with differentiable_twice(space.device), torch.no_grad():
            values.append(loss(point, batch).detach())
    return values


def _is_close(value: Tensor, other: Tensor) -> bool:
    rtol = max(1e-3, 8 * torch.finfo(value.dtype).eps)
    return bool(torch.isclose(value, other, rtol=rtol, atol=0))


def warn_unknown(reason: str, /) -> None:
    """Warn that the reduction of a loss is unknown."""
    warnings.warn(
        f"{reason}, so the loss is not known to be a mean or a sum over examples; batches are "
        "weighted by their examples. Pass the number that the loss averages over, "
        "`weight=hessfunc.examples` or `weight=lambda batch: (batch[1] != -100).sum()`",
        ReductionWarning,
        stacklevel=2,
    )
