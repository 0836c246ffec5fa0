"""What a Gauss-Newton matrix leaves out of the Hessian."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, explained, plain_batch, refuse_autocast
from hessfunc.containers import opened
from hessfunc.losses import Loss, composed
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import ChunkSize, Curvature
from hessfunc.transforms.criteria import output_gradient
from hessfunc.transforms.gauss_newton import refuse_without_halves
from hessfunc.transforms.hessian import Mode, hvp, kept
from hessfunc.trees import Matvec, Tree

# The indices of the output leaves that matter, and the derivative with respect to each.
_Fixed: TypeAlias = tuple[list[int], list[Tensor]]


@validated
def functional_hvp(
    loss: Loss, /, *, mode: Mode = "auto", chunk_size: ChunkSize = None
) -> Curvature:
    """The functional Hessian, as a curvature function ``(params, batch) -> matvec``.

        H - G = sum_i r_i d2 f_i / d params2

    with f_i the outputs of the model and r_i the derivative of the criterion with respect to each:
    the Hessian less the generalised Gauss-Newton matrix. It is small where the model fits, and
    has no trace in a net of linear and piecewise linear layers, in which each layer's block is 0.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        mode: as in `hvp`.
        chunk_size: as in `hvp`.

    Raises:
        TypeError: the loss does not show its halves.
        ValueError: (from the curvature function) the loss does not depend on params.

    Cost: as `hvp`, and the outputs once more for each batch.

    Source: Schraudolph 2002; the name: Singh, Bachmann and Hofmann 2021, arXiv 2106.16225.
    """
    refuse_without_halves(loss)

    def along_gradient(outputs: Tree, fixed: _Fixed) -> Tensor:
        used, slopes = fixed
        found, _ = opened(outputs, "outputs")
        return torch.stack([(found[i] * r).sum() for i, r in zip(used, slopes, strict=True)]).sum()

    linear = composed(
        lambda params, pair: loss.outputs(params, pair[0]),
        along_gradient,
        targets=lambda pair: pair[1],
    )
    second = hvp(linear, mode=mode, chunk_size=chunk_size)

    def curvature(params: Tree, batch: Any) -> Matvec:
        space = space_of(params)
        refuse_autocast(space.device)
        with torch.inference_mode(False), explained(space, batch), noted(loss, params, batch):
            batch = plain_batch(batch)
            inputs = [leaf.requires_grad_() for leaf in kept(space.tree_leaves(params))]
            with differentiable_twice(space.device):
                outputs = loss.outputs(space.tree(inputs), batch)
                used, _, slopes = output_gradient(
                    loss.criterion, outputs, batch, create_graph=False
                )
            return second(params, (batch, (used, slopes)))

    return curvature
