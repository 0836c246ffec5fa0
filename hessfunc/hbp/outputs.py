"""The Hessian of the loss with respect to each example's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfunc.hbp.blocks import AT_ONCE, refuse_unless_fits
from hessfunc.transforms.criteria import Criterion, by_autodiff, closed_form, with_targets

__all__ = ["each_hessian", "mean_hessian"]


def mean_hessian(criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any, /) -> Tensor:
    """The sum over examples of the Hessian with respect to the outputs of one, ``(m, m)``.

    For a loss that is a mean over examples, it is the mean of these Hessians.
    """
    apart = _apart(criterion, outputs, batch)
    if apart is None:
        return each_hessian(criterion, outputs, batch).sum(0)
    count = len(outputs)
    return _finite(torch.stack([apart(u).reshape(count, -1).sum(0) for u in _units(outputs)]))


def each_hessian(criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any, /) -> Tensor:
    """The diagonal blocks of the criterion's Hessian, one an example: ``(B, m, m)``.

    Raises:
        MemoryError: they do not fit.
    """
    count, width = len(outputs), outputs[0].numel()
    refuse_unless_fits(
        count * width**2,
        outputs,
        f"the Hessians of {count} examples with respect to {width} outputs each",
        "take a smaller batch",
    )
    apart = _apart(criterion, outputs, batch)
    if apart is not None:
        found = [apart(unit).reshape(count, -1) for unit in _units(outputs)]
        return _finite(torch.stack(found, dim=1))
    products = _products(criterion, outputs, batch)
    rows = []
    for chosen in torch.arange(count * width).split(max(1, AT_ONCE // (count * width))):
        tangents = outputs.new_zeros(len(chosen), count * width)
        tangents[range(len(chosen)), chosen] = 1
        images = products(tangents.view(-1, *outputs.shape)).reshape(len(chosen), count, width)
        rows.append(images[range(len(chosen)), chosen // width])
    return _finite(torch.cat(rows).view(count, width, width))


def _products(
    criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any
) -> Callable[[Tensor], Tensor]:
    """The products of any criterion's Hessian with tangents ``(k, *outputs)``."""
    known = closed_form(criterion)
    if known is not None:
        product = known(outputs, batch)
        return lambda tangents: torch.stack([product(tangent) for tangent in tangents])
    with torch.enable_grad():
        moving = outputs.detach().requires_grad_()
        _, found = by_autodiff(criterion, moving, batch, try_convexity=False)
    return torch.vmap(lambda tangent: found([tangent])[0])


def _finite(hessian: Tensor) -> Tensor:
    if not bool(hessian.isfinite().all()):
        raise ValueError(
            "the Hessian of the criterion has entries that are NaN or infinite: are all targets "
            "ignored, or the outputs not finite?"
        )
    return hessian


def _apart(
    criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any
) -> Callable[[Tensor], Tensor] | None:
    """The product with a criterion's Hessian, if it is known to keep examples apart."""
    known = closed_form(criterion)
    own = isinstance(with_targets(criterion, batch)[0], Criterion)
    return None if known is None or own else known(outputs, batch)


def _units(outputs: Tensor) -> Tensor:
    """For each output of an example, the tangent that moves it in all examples alike."""
    width = outputs[0].numel()
    units = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    return units.view(width, 1, *outputs.shape[1:]).expand(width, *outputs.shape)
