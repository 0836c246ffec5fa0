"""The number over which a loss averages: targets, or positions of the examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import is_wrapped
from hessfunc.containers import batch_leaves
from hessfunc.losses import Loss, LossFunction, OfTargets
from hessfunc.numerics import wide_dtype
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.criteria import (
    declared_reduction,
    function_and_options,
    without_wrappers,
)

HIDDEN = (
    "the weight of a batch depends on values that a transform of torch.func hides: pass a weight "
    "to `over_batches`, such as `weight=lambda batch: len(batch[1])`"
)


def terms_of(loss: LossFunction, batch: Any, /) -> float | None:
    """Return the divisor of the mean of a torch loss, up to a constant; None for other losses.

    A mean over class targets divides by the number of targets that are not ignored, or by the sum
    of their class weights. A mean over floating-point targets divides by their number of entries.
    """
    if not isinstance(loss, Loss) or not isinstance(loss.criterion, OfTargets):
        return None
    function, options = function_and_options(without_wrappers(loss.criterion))
    targets = loss.criterion.targets(batch)
    if declared_reduction(loss.criterion) is None or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        if options.get("reduction") == "batchmean" or not _has_examples(batch):
            return None
        classes = targets.shape[min(1, targets.dim() - 1)] if function is F.cross_entropy else 1
        return targets.numel() / max(1, classes)
    if function not in (F.cross_entropy, F.nll_loss):
        return None
    if is_wrapped(targets):
        raise NotImplementedError(HIDDEN)
    kept = targets != options.get("ignore_index", -100)
    weight = options.get("weight")
    if weight is None:
        return float(kept.sum())
    return float(weight.to(targets.device)[targets[kept]].sum(dtype=wide_dtype(targets.device)))


def _has_examples(batch: Any) -> bool:
    try:
        examples(batch)
    except ValueError:
        return False
    return True


def positions_of(batch: Any, /) -> tuple[float, ...]:
    """Return the entries per example of integer tensors, such as tokens and labels.

    The result is empty if a tensor has one entry per example, as the targets of a classification.
    """
    try:
        count = examples(batch)
    except ValueError:
        return ()
    tensors = [x for x in batch_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0]
    if not count or any(x.numel() == count for x in tensors):
        return ()
    return tuple(x.numel() / count for x in tensors if not x.is_floating_point())
