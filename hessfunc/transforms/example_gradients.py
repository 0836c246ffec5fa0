"""Gradients of the loss of each example of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, explained, plain_batch, refuse_autocast
from hessfunc.autograd.errors import unmapped
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import rows_dtype
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.examples import microbatches, rows_of
from hessfunc.transforms.evaluation import gradient_of, scalar
from hessfunc.trees import Tree

# Limit on the gradients of one pass; a larger pass no longer fits in the cache.
_BYTES_AT_ONCE = 64 * 2**20


def example_gradients(
    loss: LossFunction, params: Tree, batch: Any, /, *, examples_per_chunk: int | None = None
) -> Iterator[Tree]:
    """Yield the gradients of the loss of each example alone, as vector blocks.

        g_i = grad loss(params, batch[i : i + 1])

    Args:
        loss: Function ``(params, batch) -> scalar``.
        params: Parameters at which the gradients are taken.
        batch: Batch whose arrays have an entry for each example along their first axes.
        examples_per_chunk: Number of examples of a block, which vmap differentiates at once; 1 is
            a loop by plain autograd. By default, the gradients of a block take 64 MiB.

    Raises:
        NotImplementedError: If the parameters are DTensors.
        ValueError: If the batch cannot be divided into examples, if the loss of an example is no
            scalar or does not depend on the parameters, or if a gradient is not finite.
        RuntimeError: If vmap does not support the model, or if a layer is random.

    The gradient of an example whose targets are all ignored is zero.

    Cost: one gradient for each example. Memory: the gradients and the graph of one block.
    """
    space = space_of(params)
    if space.distributed:
        raise NotImplementedError(
            "gradients of single examples do not support DTensor parameters: gather them with "
            "`unsharded(model)`"
        )
    refuse_autocast(space.device)
    dtype = rows_dtype(space)
    point = [leaf.detach() for leaf in plain_batch(space.tree_leaves(params))]
    at_once = examples_per_chunk or max(1, _BYTES_AT_ONCE // (space.n * dtype.itemsize))
    for piece in microbatches(plain_batch(batch), at_once):
        with (
            torch.inference_mode(False),
            explained(space, batch),
            several_batches(),
            differentiable_twice(space.device),
        ):
            gradients: Sequence[Tensor]
            if at_once == 1:
                gradients = _of_one(loss, space.tree, point, piece)
            else:
                gradients = _of_each(loss, space.tree, point, piece)
        block = [leaf.detach().to(dtype) for leaf in gradients]
        if not all(bool(leaf.isfinite().all()) for leaf in block):
            raise ValueError(
                "the gradient of an example is not finite: check its inputs and the parameters"
            )
        yield space.tree(block)


def _of_each(
    loss: LossFunction, tree: Any, point: Sequence[Tensor], batch: Any
) -> Sequence[Tensor]:
    rows, build = rows_of(batch)
    columns, _ = rows_of(batch, columns_of=len(rows[0]))
    if any(isinstance(column, list) and not isinstance(column[0], str) for column in columns):
        raise ValueError(
            "the batch has a list with an entry for each example, which vmap does not map: pass "
            "`torch.stack(list)` or `torch.tensor(list)`, or `examples_per_chunk=1` for a loop"
        )

    def of_example(*row: Tensor) -> list[Tensor]:
        def value(inputs: Sequence[Tensor]) -> Tensor:
            return scalar(loss(tree(inputs), build([part[None] for part in row])))

        return torch.func.grad(value)(list(point))

    try:
        return torch.func.vmap(of_example)(*rows)
    except (RuntimeError, IndexError, TypeError, AssertionError) as error:
        # An error outside of vmap is the cause.
        loss(tree(list(point)), batch)
        raise unmapped(error, "the loss") from error


def _of_one(loss: LossFunction, tree: Any, point: Sequence[Tensor], batch: Any) -> list[Tensor]:
    inputs = [leaf.clone().requires_grad_() for leaf in point]
    value = scalar(loss(tree(inputs), batch))
    return [g[None] for g in gradient_of(value, inputs, create_graph=False)]
