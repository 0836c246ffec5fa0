"""Weights of examples in the empirical Fisher matrix of a criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.errors import first_line
from hessfunc.autograd.functorch import transforming
from hessfunc.transforms.batches.examples import Rows, rows_of
from hessfunc.transforms.criteria import (
    Reduction,
    cross_entropy_scale,
    declared_reduction,
    function_and_options,
    is_known,
    with_targets,
)
from hessfunc.trees import Tree


def example_weights(
    criterion: Callable[[Any, Any], Tensor],
    outputs: Tree,
    batch: Any,
    count: int,
    reduction: Reduction,
    /,
) -> Tensor | float:
    """Return the weights c_b with which ``sum_b c_b r_b r_b'`` is the empirical Fisher matrix.

    r_b is the part of example b in the gradient of the loss, and g_b is the gradient of the
    example's own loss. For a sum over examples, r_b = g_b, the matrix is ``sum_b g_b g_b'`` and
    c_b = 1. For a mean, r_b = s_b g_b, the matrix is ``sum_b s_b g_b g_b'`` and c_b = 1 / s_b. The
    share s_b of an example is one over the number of examples or, if targets are ignored, one over
    the number of examples that are not ignored.
    """
    if reduction == "sum":
        return 1.0
    inner, targets = with_targets(criterion, batch)
    function, options = function_and_options(inner)
    if function is not F.cross_entropy or targets.is_floating_point():
        return float(count)
    alone = {"reduction": "mean", "label_smoothing": 0.0}
    scale = cross_entropy_scale(outputs, targets, **{**options, **alone})
    share = scale.reshape(count, -1).sum(1)
    return torch.where(share > 0, 1 / share, 0.0)


def reduction_over_examples(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any, /
) -> Reduction | None:
    """Return whether a criterion is a mean or a sum over examples; None for a single example.

    A criterion with a closed form is known. Any other criterion is evaluated on each example.

    Raises:
        ValueError: If the criterion is neither the mean nor the sum of its examples, or cannot be
            evaluated on a single example.
        NotImplementedError: If the criterion is not known and a transform is active.
    """
    inner, targets = with_targets(criterion, batch)
    function, options = function_and_options(inner)
    if is_known(function):
        is_legacy = "size_average" in options or "reduce" in options
        return declared_reduction(inner) if is_legacy else options.get("reduction", "mean")
    if transforming():
        raise NotImplementedError(
            "whether the criterion is a mean or a sum over examples is tested on its values, which "
            "a transform or torch.compile hides: use a loss of torch such as cross_entropy, or "
            "call the curvature function once outside of the transform"
        )
    advice = (
        "an empirical Fisher matrix needs the gradient of each example: use a criterion that is "
        "a mean or a sum over the first axis of the outputs, or a known one, for instance "
        "`composed(outputs, cross_entropy, targets=lambda batch: batch['labels'])`"
    )
    rows, targets_rows = rows_of(outputs, what="outputs"), rows_of(targets, what="targets")
    try:
        alone = torch.stack([inner(*pair) for pair in _apart(rows, targets_rows)])
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        raise ValueError(
            f"the criterion could not be evaluated on a single example ({first_line(error)}); "
            f"{advice}"
        ) from error
    together = inner(outputs, targets)
    values: dict[Reduction, Tensor] = {"mean": alone.mean(), "sum": alone.sum()}
    fits = [
        name for name, value in values.items() if torch.isclose(value, together, rtol=1e-3, atol=0)
    ]
    if not fits:
        raise ValueError(
            f"the criterion is {float(together):.4g}, but its examples have the mean "
            f"{float(alone.mean()):.4g} and the sum {float(alone.sum()):.4g}; {advice}"
        )
    if len(fits) == 1:
        return fits[0]
    return declared_reduction(inner)


def _apart(outputs: Rows, targets: Rows) -> Iterator[tuple[Any, Any]]:
    """Yield the outputs and targets of each single example.

    Arrays whose length differs from that of the outputs are shared by all examples, such as
    constants of the model or weights of classes.
    """
    moving = {len(x) for x in outputs[0] if isinstance(x, Tensor) and x.requires_grad}
    if len(moving) != 1:
        raise ValueError(f"outputs have first axes of different lengths {sorted(moving)}")
    (count,) = moving
    for i in range(count):
        one, target = (
            build([x[i : i + 1] if len(x) == count else x for x in arrays])
            for arrays, build in (outputs, targets)
        )
        yield one, target
