"""Hessians of the loss with respect to the outputs of single examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessfunc.memory import AT_ONCE, refuse_unless_fits
from hessfunc.numerics import cosines
from hessfunc.transforms.criteria import Criterion, closed_form, with_targets
from hessfunc.transforms.output_gradients import by_autodiff, warn_of_linear

# Largest difference that rounding explains, in units of the measured rounding of an entry.
_ROUNDINGS = 20.0


def mean_hessian(criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any, /) -> Tensor:
    """Return the sum over examples of the Hessian with respect to the m outputs, ``(m, m)``.

    If the loss is a mean over examples, the sum is the mean of the Hessians of the examples.
    """
    # A criterion without interaction has a block-diagonal Hessian. Its product with e_i in every
    # example has the i-th column of each block, and these are summed.
    apart = _apart(criterion, outputs, batch)
    if apart is None:
        return _finite(_blocks(criterion, outputs, batch)[0].sum(0))
    count = len(outputs)
    rows = [apart(unit).reshape(count, -1).sum(0) for unit in _units(outputs)]
    return _finite(torch.stack(rows))


def each_hessian(criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any, /) -> Tensor:
    """Return the diagonal blocks of the criterion's Hessian, one per example, ``(B, m, m)``.

    Raises:
        MemoryError: If the blocks do not fit in memory.
        ValueError: If the criterion couples examples, so that its Hessian has other blocks too.

    Warns:
        LinearCriterionWarning: The Hessian is zero.
    """
    apart = _apart(criterion, outputs, batch)
    if apart is None:
        blocks, products = _blocks(criterion, outputs, batch)
        _refuse_if_coupled(products, outputs, blocks)
        warn_if_zero(criterion, blocks)
        return _finite(blocks)
    _refuse_unless_blocks_fit(outputs)
    columns = [apart(unit).reshape(len(outputs), -1) for unit in _units(outputs)]
    return _finite(torch.stack(columns, dim=1))


def _refuse_unless_blocks_fit(outputs: Tensor) -> None:
    count, width = len(outputs), outputs[0].numel()
    refuse_unless_fits(
        count * width**2,
        outputs,
        f"the Hessians of {count} examples with respect to {width} outputs each",
        "use a smaller batch, for instance `microbatches(batch, 16)`",
    )


def _blocks(
    criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the diagonal blocks of any criterion's Hessian, and its products with tangents."""
    _refuse_unless_blocks_fit(outputs)
    count, width = len(outputs), outputs[0].numel()
    products = _products(criterion, outputs, batch)
    rows = []
    entries = torch.arange(count * width, device=outputs.device)
    for chosen in entries.split(max(1, AT_ONCE // (count * width))):
        tangents = outputs.new_zeros(len(chosen), count * width)
        tangents[range(len(chosen)), chosen] = 1
        columns = products(tangents.view(-1, *outputs.shape)).reshape(len(chosen), count, width)
        # Keep the diagonal block of the example to which each unit vector belongs.
        rows.append(columns[range(len(chosen)), chosen // width])
    return torch.cat(rows).view(count, width, width), products


def _refuse_if_coupled(
    products: Callable[[Tensor], Tensor], outputs: Tensor, blocks: Tensor
) -> None:
    """Raise unless the criterion's Hessian is block-diagonal with these blocks."""
    tangent = cosines(outputs)
    product = products(tangent[None])[0]
    apart = torch.einsum("bij,bj->bi", blocks, tangent.reshape(len(outputs), -1))
    difference = (product.reshape_as(apart) - apart).abs().amax()
    if difference <= torch.finfo(blocks.dtype).eps ** 0.5 * blocks.abs().sum(2).amax():
        return
    # A criterion may compute in a coarser dtype than the outputs. A product with 3 t is rounded
    # differently, so it measures this rounding.
    rounding = (products(3 * tangent[None])[0] / 3 - product).abs().amax()
    if difference > _ROUNDINGS * rounding:
        raise ValueError(
            "the criterion's second derivatives couple examples, but blocks of outputs need a "
            "criterion that is a sum or a mean over examples: use exact products, for instance "
            "`hutchinson_diagonal(ggnvp(loss)(params, batch), params)`"
        )


def _products(
    criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any
) -> Callable[[Tensor], Tensor]:
    """Return the products of any criterion's Hessian with tangents ``(k, *outputs)``."""
    known = closed_form(criterion)
    if known is not None:
        product = known(outputs, batch)
        return lambda tangents: torch.stack([product(tangent) for tangent in tangents])
    with torch.enable_grad():
        moving = outputs.detach().requires_grad_()
        _, by_autograd = by_autodiff(criterion, moving, batch, try_convexity=False)
    return torch.vmap(lambda tangent: by_autograd([tangent])[0])


def warn_if_zero(criterion: Callable[[Any, Any], Tensor], hessian: Tensor, /) -> None:
    """Warn if the Hessian is zero because the criterion is linear in the outputs.

    A known criterion is exempt, because ignored targets make its Hessian zero too.
    """
    if closed_form(criterion) is None and not bool(hessian.any()):
        warn_of_linear(criterion)


def _finite(hessian: Tensor) -> Tensor:
    """Return a Hessian of the criterion, or raise if it is not finite."""
    if not bool(hessian.isfinite().all()):
        raise ValueError(
            "the Hessian of the criterion has entries that are NaN or infinite: check that the "
            "outputs are finite, and that not all targets are ignored"
        )
    return hessian


def _apart(
    criterion: Callable[[Any, Any], Tensor], outputs: Tensor, batch: Any
) -> Callable[[Tensor], Tensor] | None:
    """Return the product with a criterion's Hessian, or None if examples might interact."""
    known = closed_form(criterion)
    own = isinstance(with_targets(criterion, batch)[0], Criterion)
    return None if known is None or own else known(outputs, batch)


def _units(outputs: Tensor) -> Tensor:
    """Return tangents ``(m, B, ...)``: the i-th moves output i of every example by 1."""
    width = outputs[0].numel()
    units = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    return units.view(width, 1, *outputs.shape[1:]).expand(width, *outputs.shape)
