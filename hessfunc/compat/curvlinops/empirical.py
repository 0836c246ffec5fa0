"""Output matrices of the empirical Fisher matrix with one gradient for each loss term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.transforms.criteria import (
    Criterion,
    OutputProduct,
    cross_entropy_scale,
    function_and_options,
    is_known,
    with_output_hessian,
)


def empirical(criterion: Callable[[Any, Any], Tensor], /) -> Criterion:
    """Return the criterion with the output matrix of its empirical Fisher matrix.

        B = sum_t c_t r_t r_t',   r = gradient of the criterion with respect to the outputs

    r_t is the part of the loss term t: the classes of one prediction of cross-entropy, or the last
    axis of the outputs of MSE and BCE-with-logits. With its share s_t of the mean, r_t = s_t g_t,
    and B is the mean of g_t g_t' for c_t = 1 / s_t. For a sum, c_t = 1.

    Raises:
        NotImplementedError: If the criterion is none of them.
    """
    function, options = function_and_options(criterion)
    if not is_known(function):
        raise NotImplementedError(
            f"the loss terms of {criterion} are not known: pass CrossEntropyLoss, MSELoss or "
            "BCEWithLogitsLoss, or use `hf.efvp`, with one gradient for each example"
        )
    is_sum = options.get("reduction", "mean") == "sum"

    def output_matrix(outputs: Tensor, targets: Tensor) -> OutputProduct:
        slopes = torch.func.grad(lambda moving: criterion(moving, targets))(outputs.detach())
        axis = _axis(function, outputs)
        weights = 1.0 if is_sum else _inverse_shares(function, options, outputs, targets)

        def product(tangent: Tensor) -> Tensor:
            # B u = c_t r_t <r_t, u_t> for each term t.
            along = slopes * tangent
            inner = along if axis is None else along.sum(axis, keepdim=True)
            return weights * inner * slopes

        return product

    return with_output_hessian(criterion, output_matrix)


def _axis(function: Any, outputs: Tensor) -> int | None:
    """Return the axis of the outputs of one loss term; None if each output is a term."""
    if function is F.cross_entropy:
        return min(1, outputs.dim() - 1)
    return -1 if outputs.dim() > 1 else None


def _inverse_shares(
    function: Any, options: Any, outputs: Tensor, targets: Tensor
) -> Tensor | float:
    """Return the inverse share of each loss term in the mean."""
    if function is not F.cross_entropy:
        return float(outputs.numel())
    alone = {"reduction": "mean", "label_smoothing": 0.0}
    shares = cross_entropy_scale(outputs, targets, **{**options, **alone})
    return torch.where(shares > 0, 1 / shares, 0.0)
