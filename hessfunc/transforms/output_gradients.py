"""Derivatives of any criterion with respect to the outputs, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.constant_matrix import leaves_of_graph
from hessfunc.autograd.custom_functions import Verified, refuse_if_cut
from hessfunc.containers import leaf_paths, opened
from hessfunc.numerics import cosines
from hessfunc.transforms.criteria import function_and_options, without_wrappers
from hessfunc.transforms.outputs import floating_part
from hessfunc.trees import Tree

INDEPENDENT = (
    "the loss does not depend on params through any output of the model: compute the outputs from "
    "the given params, not from the module itself, and not under `torch.no_grad()` or after "
    "`.detach()`"
)


class NotConvexWarning(UserWarning):
    """Warning that a criterion is not convex, so its Gauss-Newton matrix may be indefinite."""


class LinearCriterionWarning(UserWarning):
    """Warning that a criterion is linear in outputs, which then have no Gauss-Newton curvature."""


def warn_of_linear(criterion: Callable[[Any, Any], Tensor], /) -> None:
    """Warn that the Gauss-Newton matrix is zero, and recommend another split of the loss."""
    if function_and_options(without_wrappers(criterion))[0] is F.nll_loss:
        message = (
            "nll_loss is linear in log-probabilities, so the Gauss-Newton matrix is zero: let the "
            "model return logits, without a final LogSoftmax, and use "
            "`supervised(model_fn, torch.nn.functional.cross_entropy)`"
        )
    else:
        message = (
            "the criterion is linear in the model's outputs, at least near these outputs, so the "
            "Gauss-Newton matrix is zero: move the last nonlinear function of the model into the "
            "criterion, `composed(outputs, criterion)`, or use `hvp(loss)`"
        )
    warnings.warn(message, LinearCriterionWarning, stacklevel=2)


def _warn_of_linear_leaves(names: Sequence[str]) -> None:
    """Warn that some of the output leaves contribute nothing to the Gauss-Newton matrix."""
    outputs = ", ".join(names)
    warnings.warn(
        f"the criterion is linear in {outputs}, at least near these outputs, so the Gauss-Newton "
        f"matrix leaves out the curvature of {outputs}: move the last nonlinear function of that "
        "output into the criterion, `composed(outputs, criterion)`, or use `hvp(loss)`",
        LinearCriterionWarning,
        stacklevel=2,
    )


def output_gradient(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any, /, *, create_graph: bool
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Compute the gradient of a criterion with respect to the outputs.

    Returns:
        Indices of the output leaves that depend on the parameters and that the criterion uses,
        these leaves, and the gradient with respect to each.

    Raises:
        ValueError: If the outputs have no such leaf.
    """
    values, rebuilt = opened(outputs, "outputs")
    places = [i for i, leaf in enumerate(values) if isinstance(leaf, Tensor) and leaf.requires_grad]
    inner = list(values)
    for i in places:
        inner[i] = values[i].detach().requires_grad_()
    value = criterion(rebuilt(inner), batch)
    gradient: tuple[Tensor | None, ...] = ()
    if places and value.requires_grad:
        gradient = torch.autograd.grad(
            value, [inner[i] for i in places], create_graph=create_graph, allow_unused=True
        )
    used = [i for i, g in zip(places, gradient, strict=False) if g is not None]
    if not used:
        raise ValueError(INDEPENDENT)
    return used, [inner[i] for i in used], [g for g in gradient if g is not None]


def by_autodiff(
    criterion: Callable[[Any, Any], Tensor],
    outputs: Tree,
    batch: Any,
    /,
    *,
    try_convexity: bool,
    verified: Verified | None = None,
) -> tuple[list[int], Callable[[list[Tensor]], list[Tensor]]]:
    """Return the output Hessian of any criterion, through a kept graph of its gradient.

    Args:
        criterion: Criterion ``(outputs, batch) -> scalar``.
        outputs: Outputs of the model, with their graph.
        batch: Batch.
        try_convexity: Whether to warn if the criterion is linear or not convex.
        verified: Set of keys that have passed the check for lost derivatives; updated in place.

    Returns:
        Indices of the output leaves that depend on the parameters and that the criterion uses,
        and the product with one vector of such leaves.
    """
    used, leaves, slopes = output_gradient(criterion, outputs, batch, create_graph=True)
    if verified is None or "criterion" not in verified:
        _refuse_if_cut(criterion, outputs, batch, used, leaves)
    if verified is not None:
        verified.add("criterion")
    curved = [i for i, slope in enumerate(slopes) if slope.requires_grad]

    def product(tangents: list[Tensor]) -> list[Tensor]:
        if not curved:
            return [torch.zeros_like(t) for t in tangents]
        return list(
            torch.autograd.grad(
                [slopes[i] for i in curved],
                leaves,
                [tangents[i] for i in curved],
                retain_graph=True,
                materialize_grads=True,
            )
        )

    if try_convexity:
        linear = _without_image(product, leaves)
        if len(linear) == len(leaves):
            warn_of_linear(criterion)
        else:
            output_leaves, _ = opened(outputs, "outputs")
            places = [used[i] for i in linear if _is_curved(output_leaves[used[i]])]
            if places:
                names = leaf_paths(outputs, "outputs")
                _warn_of_linear_leaves([names[place] for place in places])
            _warn_unless_convex(product, leaves)
    return used, product


def by_transforms(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any, /
) -> tuple[list[int], Callable[[list[Tensor]], list[Tensor]]]:
    """Return the output Hessian of any criterion, with the graph of the outputs and the batch.

    Returns:
        Indices of the floating-point output leaves, and the product with one vector of them.
    """
    places, leaves, gradient = _gradient_of(criterion, outputs, batch)
    pulled = torch.func.vjp(gradient, *leaves)[1]
    return places, lambda tangents: list(pulled(tuple(tangents)))


def slopes_by_transforms(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any, /
) -> tuple[list[int], list[Tensor]]:
    """Return the gradient of a criterion with the graph of the outputs and the batch.

    Returns:
        Indices of the floating-point output leaves, and the gradient with respect to each.
    """
    places, leaves, gradient = _gradient_of(criterion, outputs, batch)
    return places, list(gradient(*leaves))


def _gradient_of(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any
) -> tuple[list[int], list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Return indices and values of the floating-point output leaves, and the gradient in them."""
    found, rest = floating_part(outputs)

    def of_leaves(*leaves: Tensor) -> Tensor:
        return criterion(rest.outputs(leaves), batch)

    gradient = torch.func.grad(of_leaves, argnums=tuple(range(len(found))))
    return rest.places, found, gradient


def _refuse_if_cut(
    criterion: Callable[[Any, Any], Tensor],
    outputs: Tree,
    batch: Any,
    used: Sequence[int],
    leaves: Sequence[Tensor],
) -> None:
    """Raise if autograd cannot differentiate the gradient of a criterion."""
    values, rebuilt = opened(outputs, "outputs")

    def again(at: Sequence[Tensor]) -> list[Tensor]:
        inner = list(values)
        for i, leaf in zip(used, at, strict=True):
            inner[i] = leaf
        return [criterion(rebuilt(inner), batch)]

    refuse_if_cut(again(leaves), leaves, again, verified=set())


def _without_image(
    product: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor]
) -> list[int]:
    """Return the indices of leaves in which the product with a vector without zeros is zero."""
    moved = product([cosines(leaf) for leaf in leaves])
    return [i for i, part in enumerate(moved) if not bool(part.any())]


def _is_curved(output: Tensor) -> bool:
    """Return whether an output is neither linear nor piecewise linear in the parameters."""
    leaves = leaves_of_graph([output], [])
    slopes = torch.autograd.grad(output.sum(), leaves, create_graph=True, allow_unused=True)
    return any(slope is not None and slope.requires_grad for slope in slopes)


_DIRECTIONS_TRIED = 16


def _warn_unless_convex(
    product: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor]
) -> None:
    # Convex means u'Hu >= 0. Each direction moves only one example, because the sum over examples
    # could hide a negative curvature.
    examples = max(1, min(len(leaf) if leaf.dim() else 1 for leaf in leaves))
    generator = torch.Generator().manual_seed(0)
    for trial in range(_DIRECTIONS_TRIED):
        tangents = []
        for leaf in leaves:
            tangent = torch.zeros_like(leaf).detach()
            target = tangent[trial % examples] if leaf.dim() and len(leaf) else tangent
            drawn = torch.randn(
                target.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            target.copy_(drawn)
            tangents.append(tangent)
        moved = product(tangents)
        curvature = sum(float((u * h).sum()) for u, h in zip(tangents, moved, strict=True))
        size = sum(float((u * h).abs().sum()) for u, h in zip(tangents, moved, strict=True))
        if curvature < -1e-5 * size:
            warnings.warn(
                "the criterion is not convex in the model's outputs (tested in a random "
                "direction), so its Gauss-Newton matrix may have negative eigenvalues: use a "
                "convex criterion if the matrix must be positive semi-definite",
                NotConvexWarning,
                stacklevel=2,
            )
            return
