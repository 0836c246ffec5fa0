"""Hessian of a criterion with respect to the outputs, in closed form for standard losses."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.autograd.custom_functions import Verified, refuse_if_cut
from hessfunc.containers import leaf_paths, opened
from hessfunc.losses import OfTargets
from hessfunc.options import validated
from hessfunc.transforms.batches.examples import Rows, rows_of
from hessfunc.transforms.batches.reductions import Reduction, declared_reduction
from hessfunc.trees import Tree

INDEPENDENT = (
    "the loss does not depend on params through any output of the model: compute the outputs from "
    "the given params, not from the module itself, and not under `torch.no_grad()` or after "
    "`.detach()`"
)

OutputProduct: TypeAlias = Callable[[Tensor], Tensor]
OutputHessian: TypeAlias = Callable[[Tensor, Any], OutputProduct]


@dataclass(frozen=True)
class Criterion:
    """Criterion with a closed form of its output Hessian.

    Attributes:
        criterion: Criterion ``(outputs, targets) -> scalar``.
        output_hessian: Function ``(outputs, targets) -> product``. ``product(u)`` is the Hessian
            of the criterion with respect to the outputs times u, shaped like the outputs.
    """

    criterion: Callable[[Any, Any], Tensor]
    output_hessian: OutputHessian

    def __call__(self, outputs: Any, targets: Any, /) -> Tensor:
        return self.criterion(outputs, targets)


@validated
def with_output_hessian(
    criterion: Callable[[Any, Any], Tensor], output_hessian: OutputHessian, /
) -> Criterion:
    """Attach a closed form of the output Hessian to a criterion.

    Args:
        criterion: Criterion ``(outputs, targets) -> scalar``, or ``(outputs, batch) -> scalar``
            for `composed`.
        output_hessian: Function of the same arguments that returns the product with one vector
            shaped like the outputs. It is called once per batch, so work that all products share
            can be done there.
    """
    return Criterion(criterion, output_hessian)


def closed_form(criterion: Callable[[Any, Any], Tensor], /) -> OutputHessian | None:
    """Return the closed form ``(outputs, batch) -> product`` of a criterion's output Hessian.

    The result is None for an unknown criterion. Known criteria are cross-entropy, MSE and
    BCE-with-logits, as functions, partials or modules, with all of their options, and criteria made
    by `with_output_hessian`.
    """
    if isinstance(criterion, OfTargets):
        of_targets = closed_form(criterion.criterion)
        if of_targets is None:
            return None
        targets = criterion.targets
        return lambda outputs, batch: of_targets(outputs, targets(batch))
    if isinstance(criterion, Criterion):
        return criterion.output_hessian
    function, options = function_and_options(criterion)
    if not _is_known(function):
        return None
    if not options.keys() <= _CLOSED_FORMS[function][1]:
        return None
    if options.get("reduction", "mean") not in ("mean", "sum"):
        return None
    return functools.partial(_CLOSED_FORMS[function][0], **options)


def _is_known(function: Any) -> bool:
    return isinstance(function, Hashable) and function in _CLOSED_FORMS


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
    """
    inner, targets = with_targets(criterion, batch)
    if _is_known(function_and_options(inner)[0]):
        return declared_reduction(inner)
    advice = (
        "an empirical Fisher matrix needs the gradient of each example: use a criterion that is "
        "a mean or a sum over the first axis of the outputs, or a known one, for instance "
        "`composed(outputs, cross_entropy, targets=lambda batch: batch['labels'])`"
    )
    rows, targets_rows = rows_of(outputs, what="outputs"), rows_of(targets, what="targets")
    try:
        alone = torch.stack([inner(*pair) for pair in _apart(rows, targets_rows)])
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the criterion could not be evaluated on a single example ({reason}); {advice}"
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


def with_targets(criterion: Callable[[Any, Any], Tensor], batch: Any, /) -> tuple[Any, Any]:
    """Return the inner criterion (outputs, targets), and the targets of the batch.

    A criterion of (outputs, batch) is returned unchanged, with the batch itself as targets.
    """
    if isinstance(criterion, OfTargets):
        return criterion.criterion, criterion.targets(batch)
    return criterion, batch


def function_and_options(criterion: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return the function that a module or a partial computes, and its options."""
    if isinstance(criterion, functools.partial) and not criterion.args:
        return criterion.func, criterion.keywords
    for module, (function, names) in _MODULES.items():
        # A subclass may compute anything, so only the classes themselves are known.
        if type(criterion) is module:
            return function, {name: getattr(criterion, name) for name in names}
    return criterion, {}


def cross_entropy_scale(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the weight of each prediction's softmax Hessian in a cross-entropy.

    The loss of a prediction is -sum_c q_c log p_c, with the weighted target distribution q. Its
    Hessian is (sum_c q_c) (diag(p) - pp'). The weight is sum_c q_c, for a mean divided by the same
    number as the loss: the number of predictions, or the total class weight of the targets.
    """
    axis = min(1, outputs.dim() - 1)
    classes = outputs.shape[axis]
    if targets.is_floating_point():
        spread = targets * (1 - label_smoothing) + label_smoothing / classes
        counted = torch.movedim(spread, axis, -1)
        coefficient = (counted if weight is None else counted * weight).sum(-1)
        total = torch.tensor(coefficient.numel(), device=outputs.device)
    else:
        kept = targets != ignore_index
        ones = outputs.new_ones(classes) if weight is None else weight
        own = ones[torch.where(kept, targets, 0)] * kept
        coefficient = (1 - label_smoothing) * own + label_smoothing * ones.mean() * kept
        total = own.sum()
    return (coefficient / total if reduction == "mean" else coefficient).unsqueeze(axis)


def _cross_entropy(outputs: Tensor, targets: Tensor, **options: Any) -> OutputProduct:
    """Return the product with ``s (diag(p) - pp')``, softmax p and weight s of each prediction."""
    axis = min(1, outputs.dim() - 1)
    share = torch.softmax(outputs, axis)
    scale = cross_entropy_scale(outputs, targets, **options)

    def product(tangent: Tensor) -> Tensor:
        # (diag(p) - pp') u = p (u - <p, u>). At most three tensors of the size of the outputs are
        # alive at once, which is the peak of memory if there are many classes.
        inner = (tangent * share).sum(axis, keepdim=True)
        return (tangent - inner).mul_(share).mul_(scale)

    return product


def _mse(outputs: Tensor, targets: Tensor, *, reduction: str = "mean") -> OutputProduct:
    # The Hessian of sum (f - y)^2 / N is 2/N I; broadcasting repeats each output `copies` times.
    shape = torch.broadcast_shapes(outputs.shape, targets.shape)
    copies = shape.numel() / outputs.numel()
    factor = 2 * copies / (shape.numel() if reduction == "mean" else 1)
    return lambda tangent: factor * tangent


def _bce_with_logits(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> OutputProduct:
    """Return the product with the diagonal ``weight (1 + (pos_weight - 1) y) p (1 - p)``."""
    probability = torch.sigmoid(outputs)
    diagonal = probability * (1 - probability)
    if pos_weight is not None:
        diagonal = diagonal * (1 + (pos_weight - 1) * targets)
    if weight is not None:
        diagonal = diagonal * weight
    if reduction == "mean":
        diagonal = diagonal / outputs.numel()
    return lambda tangent: diagonal * tangent


_CLOSED_FORMS: dict[Any, tuple[Callable[..., OutputProduct], set[str]]] = {
    F.cross_entropy: (_cross_entropy, {"weight", "ignore_index", "reduction", "label_smoothing"}),
    F.mse_loss: (_mse, {"reduction"}),
    F.binary_cross_entropy_with_logits: (
        _bce_with_logits,
        {"weight", "pos_weight", "reduction"},
    ),
}
_MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (
        F.cross_entropy,
        ("weight", "ignore_index", "reduction", "label_smoothing"),
    ),
    nn.MSELoss: (F.mse_loss, ("reduction",)),
    nn.BCEWithLogitsLoss: (
        F.binary_cross_entropy_with_logits,
        ("weight", "pos_weight", "reduction"),
    ),
}


class NotConvexWarning(UserWarning):
    """Warning that a criterion is not convex, so its Gauss-Newton matrix may be indefinite."""


class LinearCriterionWarning(UserWarning):
    """Warning that a criterion is linear in outputs, which then have no Gauss-Newton curvature."""


def warn_of_linear(criterion: Callable[[Any, Any], Tensor], /) -> None:
    """Warn that the Gauss-Newton matrix is zero, and recommend another split of the loss."""
    inner = criterion.criterion if isinstance(criterion, OfTargets) else criterion
    function = getattr(inner, "func", inner)
    if function is F.nll_loss or isinstance(function, nn.NLLLoss):
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
    tangents = [
        torch.arange(1.0, leaf.numel() + 1, device=leaf.device).cos().to(leaf).view_as(leaf)
        for leaf in leaves
    ]
    return [i for i, part in enumerate(product(tangents)) if not bool(part.any())]


def _is_curved(output: Tensor) -> bool:
    """Return whether an output is neither linear nor piecewise linear in the parameters."""
    waiting, seen, leaves = [output.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
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
            target.copy_(torch.randn(target.shape, generator=generator, device="cpu"))
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
