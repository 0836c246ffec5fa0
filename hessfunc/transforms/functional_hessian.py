"""Functional Hessian: the difference between the Hessian and the Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from hessfunc.autograd import differentiable_twice, plain_batch
from hessfunc.autograd.functorch import transforming
from hessfunc.containers import opened
from hessfunc.losses import Loss, composed
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import ChunkSize, Curvature
from hessfunc.transforms.differentiable import every_order
from hessfunc.transforms.evaluation import linearising
from hessfunc.transforms.hessian import Mode, hvp
from hessfunc.transforms.output_gradients import output_gradient, slopes_by_transforms
from hessfunc.transforms.output_matrices import refuse_without_halves
from hessfunc.trees import Matvec, Tree, leaves

# Indices of the output leaves that the criterion uses, and its derivative with respect to each.
_Fixed: TypeAlias = tuple[list[int], list[Tensor]]


@validated
def functional_hvp(
    loss: Loss,
    /,
    *,
    mode: Mode = "auto",
    chunk_size: ChunkSize = None,
    differentiable: bool = False,
) -> Curvature:
    """Return the functional Hessian as a curvature function ``(params, batch) -> matvec``.

        H - G = sum_i r_i d2 f_i / d params2

    It is the Hessian minus the generalised Gauss-Newton matrix. f_i are the outputs of the model,
    and r_i is the derivative of the criterion with respect to f_i. The functional Hessian is small
    where the model fits the data. In a net of linear and piecewise linear layers, the block of each
    layer is zero, and so is the trace.

    Examples:
        >>> loss = hf.supervised(lambda w, x: x * w**2, torch.nn.functional.mse_loss)
        >>> batch = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> w = torch.ones((), dtype=torch.float64)
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> hf.hvp(loss)(w, batch)(one), hf.ggnvp(loss)(w, batch)(one)
        (tensor([12.], dtype=torch.float64), tensor([8.], dtype=torch.float64))
        >>> hf.functional_hvp(loss)(w, batch)(one)
        tensor([4.], dtype=torch.float64)

    Args:
        loss: Loss with outputs and criterion, as returned by `supervised` or `composed`.
        mode: Method for the products, as in `hvp`.
        chunk_size: Number of vectors in one pass, as in `hvp`.
        differentiable: Whether products carry the graph of params and batch, as in `hvp`.

    Raises:
        TypeError: If ``loss`` is a plain function without outputs and criterion.
        ValueError: If the loss does not depend on params; raised by the curvature function.

    Cost: the same as `hvp`, and one more evaluation of the outputs per batch.

    Source: Schraudolph 2002; the name: Singh, Bachmann and Hofmann 2021, arXiv 2106.16225.
    """
    refuse_without_halves(loss)

    def along_gradient(outputs: Tree, fixed: _Fixed) -> Tensor:
        # The Hessian of sum_i r_i f_i with fixed r_i is sum_i r_i d2 f_i.
        used, slopes = fixed
        values = [outputs] if isinstance(outputs, Tensor) else opened(outputs, "outputs")[0]
        return torch.stack([(values[i] * r).sum() for i, r in zip(used, slopes, strict=True)]).sum()

    linear = composed(
        lambda params, pair: loss.outputs(params, pair[0]),
        along_gradient,
        targets=lambda pair: pair[1],
    )
    second = hvp(linear, mode=mode, chunk_size=chunk_size, differentiable=differentiable)

    def curvature(params: Tree, batch: Any) -> Matvec:
        if differentiable or transforming():
            with noted(loss, params, batch):
                with every_order(leaves(params)[0].device):
                    outputs = loss.outputs(params, batch)
                    used, slopes = slopes_by_transforms(loss.criterion, outputs, batch)
                return second(params, (batch, (used, slopes)))
        space = space_of(params)
        with linearising(loss, space, params, batch) as at:
            batch = plain_batch(batch)
            with differentiable_twice(space.device):
                outputs = loss.outputs(space.tree(at.inputs()), batch)
                used, _, slopes = output_gradient(
                    loss.criterion, outputs, batch, create_graph=False
                )
            return second(params, (batch, (used, slopes)))

    return curvature
