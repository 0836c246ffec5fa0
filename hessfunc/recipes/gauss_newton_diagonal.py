"""Exact diagonal of a Gauss-Newton matrix, from the Jacobian of each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vjp, vmap

from hessfunc.autograd import (
    differentiable_twice,
    explained,
    plain_batch,
    refuse_autocast,
    rereading,
)
from hessfunc.autograd.errors import first_line, unmapped
from hessfunc.containers import number_of
from hessfunc.display import Report, Reported, reporting
from hessfunc.losses import Loss
from hessfunc.numerics import NARROW, wide_dtype
from hessfunc.options import at_least, validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.examples import examples, microbatches, rows_of
from hessfunc.transforms.batches.mean import mean_over
from hessfunc.transforms.batches.reading import Passes
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.batches.sums import Data
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.output_hessians import each_hessian
from hessfunc.transforms.output_matrices import checked_outputs, refuse_without_halves
from hessfunc.trees import Matvec, Tree, tree_map

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Build: TypeAlias = Callable[[Sequence[Tensor]], Any]

# Limit on the gradients that are squared in one pass; a larger pass no longer fits in the cache.
_BYTES_AT_ONCE = 64 * 2**20


@validated
def ggn_diagonal(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    /,
    *,
    weight: Callable[[Any], float] | None = None,
    mesh: DeviceMesh | None = None,
    data: Data = "replicated",
    examples_per_chunk: int | None = None,
    progress: Reported = None,
) -> Tree:
    """Compute the diagonal of the generalised Gauss-Newton matrix exactly, without sampling.

        diag G = sum_b sum_c s_bc (J_b' u_bc)^2,  H_b = sum_c s_bc u_bc u_bc'

    Here J_b is the Jacobian of the outputs of example b, H_b is its diagonal block of the Hessian
    of the criterion, and (s_bc, u_bc) are the eigenpairs of H_b. The sum of the diagonal is the
    trace of G. If the criterion is a negative log-likelihood (cross-entropy, BCE-with-logits), the
    result is also the diagonal of the Fisher matrix.

    Examples:
        >>> loss = hf.supervised(lambda w, x: x @ w, torch.nn.functional.mse_loss)
        >>> batch = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
        >>> hf.ggn_diagonal(loss, torch.zeros(2), [batch])
        tensor([2., 4.])

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised` or
            `composed`. Examples lie along the first axis of inputs and outputs and are
            independent of each other.
        params: Parameters at which the diagonal is taken.
        batches: Batches whose weighted mean is taken, as in `over_batches`.
        weight: Weight of a batch in the mean, as in `over_batches`.
        mesh: Device mesh of the ranks that share the batches, as in `over_batches`.
        data: Layout of the batches on the ranks, as in `over_batches`.
        examples_per_chunk: Number of examples in one pass by vmap; 1 is a loop without vmap. By
            default, the gradients of one pass take 64 MiB.
        progress: Function of a `Progress`, called after each batch; True for a bar or lines, as in
            `RunOptions`.

    Returns:
        A tree with the shapes of ``params``, in float32 or wider.

    Raises:
        TypeError: If the loss does not expose its outputs and criterion, if the outputs are not
            one tensor, or if the batches can be read only once.
        ValueError: If the model mixes examples (batch norm in train mode), if the criterion
            couples examples, if the examples cannot be separated, or if there are no batches.
        MemoryError: If the blocks H_b do not fit into memory.
        RuntimeError: If the model does not support vmap, for example an LSTM. Pass
            ``examples_per_chunk=1`` for a loop by plain autograd.

    Cost: C backward passes an example for C outputs, or C - 1 for cross-entropy; about 9 gradients
    for a convolutional net with 10 classes. The blocks take C^3 operations and C^2 numbers an
    example. For more than a few hundred outputs, use
    ``hutchinson_diagonal(ggnvp(loss)(params, batch), params)``.

    Source: Schraudolph 2002; as in Dangel, Kunstner and Hennig 2020, BackPACK, arXiv 1912.10985.
    """
    return diagonal_of(
        loss,
        params,
        batches,
        passes=Passes(),
        weight=weight,
        mesh=mesh,
        data=data,
        examples_per_chunk=examples_per_chunk,
        progress=progress,
    )


def diagonal_of(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    /,
    *,
    passes: Passes,
    weight: Callable[[Any], float] | None,
    mesh: DeviceMesh | None,
    data: Data,
    examples_per_chunk: int | None,
    progress: Reported,
) -> Tree:
    """Compute `ggn_diagonal` in one pass whose batch checksum can be compared with another pass."""
    refuse_without_halves(loss)
    at_least(1, examples_per_chunk=examples_per_chunk)
    ones = tree_map(lambda leaf: torch.ones_like(leaf)[None], params)
    # A diagonal matrix is a curvature matrix: diag(mean_b G_b) is the product of mean_b diag(G_b)
    # with the vector of ones.
    total = number_of(batches)
    with reporting(progress, "ggn_diagonal", total=total, unit="batches") as report:
        mean = mean_over(
            _of_batch(loss, examples_per_chunk, report),
            passes=passes,
            weight=weight,
            keep=False,
            mesh=mesh,
            data=data,
        )
        return tree_map(lambda leaf: leaf[0], mean(params, batches)(ones))


def _of_batch(loss: Loss, examples_per_chunk: int | None, report: Report | None) -> Curvature:
    """Return the curvature function whose matrix is ``diag(G)`` of one batch."""
    done = count(1)

    def curvature(params: Tree, batch: Any) -> Matvec:
        space = space_of(params)
        if space.distributed:
            raise NotImplementedError(
                "the exact diagonal does not support DTensor parameters: gather them with "
                "`unsharded(model)`, or use "
                "`hutchinson_diagonal(ggnvp(loss)(params, batch), params)`"
            )
        refuse_autocast(space.device)
        with (
            torch.inference_mode(False),
            noted(loss, params, batch),
            explained(space, batch),
            several_batches(),
        ):
            batch = plain_batch(batch)
            point = tuple(leaf.detach() for leaf in plain_batch(space.tree_leaves(params)))
            with noted(loss, params, batch), differentiable_twice(space.device):
                diagonal = space.tree(_diagonal(loss, space, point, batch, examples_per_chunk))
        if report is not None:
            report(next(done))
        return lambda block: tree_map(torch.mul, block, diagonal)

    return curvature


def _diagonal(
    loss: Loss, space: Space, point: tuple[Tensor, ...], batch: Any, examples_per_chunk: int | None
) -> list[Tensor]:
    with rereading(batch):
        outputs = _outputs(loss, space, point, batch)
    values, vectors = _eigenpairs(loss, outputs.to(rows_dtype(space)), batch)
    gradient = sum(leaf.numel() for leaf in point) * values.element_size()
    at_once = max(1, _BYTES_AT_ONCE // gradient)
    pieces = microbatches(batch, examples_per_chunk or max(1, at_once // values.shape[1]))
    sizes = [examples(piece) for piece in pieces]
    if sum(sizes) != len(outputs):
        raise ValueError(
            f"the outputs have {len(outputs)} rows along their first axis, but the batch has "
            f"{sum(sizes)} examples: return one row for each example, for instance with `composed`"
        )
    total = [torch.zeros_like(leaf, dtype=values.dtype) for leaf in point]
    for piece, together, value, vector in zip(
        pieces, outputs.split(sizes), values.split(sizes), vectors.split(sizes), strict=True
    ):
        if examples_per_chunk == 1:
            alone, squares = _of_one(loss, space, point, piece, value[0], vector[0])
        else:
            rows, build = rows_of(piece)
            each = partial(_of_example, loss, space, point, build, at_once)
            alone, every = over_examples(each, value, vector, *rows)
            squares = [leaf.sum(0) for leaf in every]
        refuse_unless_apart(alone, together)
        for sums, leaf in zip(total, squares, strict=True):
            # The batch itself may require a gradient.
            sums += leaf.detach()
    return total


def _of_example(
    loss: Loss,
    space: Space,
    point: Sequence[Tensor],
    build: _Build,
    at_once: int,
    values: Tensor,
    vectors: Tensor,
    *rows: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of one example, and ``sum_c s_c (J'u_c)^2`` for each leaf."""

    def model(*leaves: Tensor) -> Tensor:
        return loss.outputs(space.tree(leaves), build([row[None] for row in rows]))[0]

    outputs, pull, *_ = vjp(model, *point)
    if outputs.numel() != vectors.shape[1]:
        return outputs, []
    total = [torch.zeros_like(leaf, dtype=values.dtype) for leaf in point]
    for value, vector in zip(values.split(at_once), vectors.split(at_once), strict=True):
        # J' u_c for several columns c at once, leaf by leaf.
        gradients = vmap(pull)(vector.reshape(-1, *outputs.shape).to(outputs.dtype))
        total = [
            sums + torch.einsum("c,c...->...", value, gradient.to(value).square())
            for sums, gradient in zip(total, gradients, strict=True)
        ]
    return outputs, total


def over_examples(each: Callable[..., Any], *rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    try:
        return vmap(each, randomness="different")(*rows)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise unmapped(error, "the model") from error


def _of_one(
    loss: Loss,
    space: Space,
    point: Sequence[Tensor],
    batch: Any,
    values: Tensor,
    vectors: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `_of_example` for a batch of one example, without `torch.func`."""
    inputs = [leaf.detach().requires_grad_() for leaf in point]
    try:
        outputs = loss.outputs(space.tree(inputs), batch)
    except NotImplementedError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model cannot be evaluated on one example alone ({first_line(error)}); the "
            "first axis may not be an axis of examples (the nodes of a graph, for instance): use "
            "`hutchinson_diagonal(ggnvp(loss)(params, batch), params)`"
        ) from error
    total = [torch.zeros_like(leaf, dtype=values.dtype) for leaf in point]
    if outputs.numel() == vectors.shape[1]:
        for value, vector in zip(values, vectors, strict=True):
            gradients = torch.autograd.grad(
                outputs,
                inputs,
                vector.view_as(outputs).to(outputs.dtype),
                retain_graph=True,
                materialize_grads=True,
            )
            for sums, gradient in zip(total, gradients, strict=True):
                sums += value * gradient.to(value).square()
    return outputs.detach(), total


def _outputs(loss: Loss, space: Space, point: Sequence[Tensor], batch: Any) -> Tensor:
    inputs = [leaf.detach().requires_grad_() for leaf in point]
    outputs = checked_outputs(loss, space, inputs, batch)
    if not isinstance(outputs, Tensor) or not outputs.dim():
        raise TypeError(
            "the exact diagonal needs outputs that are one tensor with a row for each example, "
            f"but got {type(outputs).__name__}: combine them into one tensor with `composed`"
        )
    return outputs.detach()


def _eigenpairs(loss: Loss, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of each H_b: values ``(B, r)``, vectors ``(B, r, C)``, no kernel."""
    blocks = each_hessian(loss.criterion, outputs, batch)
    values, vectors = torch.linalg.eigh(blocks.to(wide_dtype(blocks.device)))
    size, order = values.abs().amax(0).sort()
    counts = torch.ones_like(order, dtype=torch.bool)
    # Drop the smallest eigenvalues while their sum is below rounding; keep at least one column.
    left_out = size.cumsum(0) <= 10 * torch.finfo(blocks.dtype).eps * size.sum()
    counts[order[:-1][left_out[:-1]]] = False
    return values[:, counts].to(blocks.dtype), vectors.mT[:, counts].to(blocks.dtype)


def refuse_unless_apart(alone: Tensor, together: Tensor) -> None:
    """Raise unless each example has the same outputs alone as in its batch, up to rounding."""
    if alone.shape == together.shape:
        # If the outputs are exact in a narrower dtype, the model computes in it: use its eps.
        exact = [d for d in NARROW if torch.equal(together.to(d).to(together.dtype), together)]
        eps = torch.finfo(exact[0] if exact else together.dtype).eps
        if bool((alone - together).abs().amax() <= eps**0.5 * together.abs().amax()):
            return
    raise ValueError(
        "the outputs of an example alone differ from its outputs in the batch: the first axis is "
        "not the axis of examples, or a layer mixes examples (batch norm in train mode) or is "
        "random (dropout); in the latter cases call `model.eval()`"
    )
