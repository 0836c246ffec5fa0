"""Gradient of the mean loss of several batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hessfunc.autograd import differentiable_twice, explained, rereading
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.evaluation import gradient_of, scalar
from hessfunc.trees import Tree


def mean_gradient(
    loss: LossFunction,
    average: Average,
    params: Tree,
    batches: Iterable[Any],
    /,
    *,
    name: str = "params",
) -> tuple[float, Tree]:
    """Return the mean loss and its gradient, with one graph in memory at a time.

    Args:
        loss: Function ``(params, batch) -> scalar``.
        average: Combination of the batches.
        params: Parameters at which the gradient is taken.
        batches: Batches of the mean.
        name: Name of the parameters in the message of an error.

    Raises:
        ValueError: If there is no batch, or if the loss of a batch is no scalar or does not depend
            on the parameters.
    """
    space = space_of(params)
    point = [leaf.detach().requires_grad_() for leaf in space.tree_leaves(params)]
    total, mean, weights = [torch.zeros_like(leaf) for leaf in point], 0.0, 0.0
    for batch in batches:
        average.look(loss, params, batch)
        # The loss of a batch of weight 0 may be 0 / 0.
        counted = average.of(batch)
        if not counted:
            continue
        with rereading(batch), explained(space, batch), differentiable_twice(space.device):
            value = scalar(loss(space.tree(point), batch))
            gradient = gradient_of(value, point, create_graph=False, name=name)
        for target, part in zip(total, gradient, strict=True):
            target.add_(part, alpha=counted)
        mean += counted * float(value.detach())
        weights += counted
    if not weights:
        raise ValueError("there is no batch with a positive weight: pass at least one batch")
    divisor = average.divisor(weights)
    return mean / divisor, space.tree(target / divisor for target in total)
