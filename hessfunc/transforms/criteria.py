"""The Hessian of a criterion with respect to the outputs, in closed form for the usual losses."""

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
    "the loss does not depend on params, through no output of the model: are the outputs computed "
    "from the module itself, or under `torch.no_grad()` or `.detach()`? Use the given params"
)

OutputProduct: TypeAlias = Callable[[Tensor], Tensor]
OutputHessian: TypeAlias = Callable[[Tensor, Any], OutputProduct]


@dataclass(frozen=True)
class Criterion:
    """A criterion with a closed form of its output Hessian.

    Attributes:
        criterion: ``(outputs, targets) -> scalar``.
        output_hessian: ``(outputs, targets) -> product``, where ``product(u)`` is the Hessian of
            the criterion with respect to the outputs, times u, shaped like the outputs.
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
        criterion: ``(outputs, targets) -> scalar``; ``(outputs, batch)`` for `composed`.
        output_hessian: of the same arguments; returns the product with one vector shaped like the
            outputs. It is called once a batch, so what is shared by all products is computed once.
    """
    return Criterion(criterion, output_hessian)


def closed_form(criterion: Callable[[Any, Any], Tensor], /) -> OutputHessian | None:
    """The closed form of a criterion's output Hessian, ``(outputs, batch) -> product``, or None.

    Known are cross-entropy, MSE and BCE-with-logits, as functions, partials or modules, with all
    of their options, and criteria made by `with_output_hessian`.
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
    """Return the c_b with which ``sum_b c_b r_b r_b'`` is the empirical Fisher matrix.

    r_b is the part of example b in the gradient of the loss, g_b the gradient of its own loss. In
    a sum r_b = g_b, and the matrix is ``sum_b g_b g_b'``. In a mean r_b = s_b g_b, with s_b the
    share of the example, one over their number or, where targets are ignored, one over the number
    of those that are not; the matrix is ``sum_b s_b g_b g_b'``.
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
    """Return how a criterion puts the examples of a batch together; None for a single example.

    A criterion with a closed form is known; any other is evaluated on each example.

    Raises:
        ValueError: It is neither the mean nor the sum of its examples, or cannot be evaluated on
            one alone.
    """
    inner, targets = with_targets(criterion, batch)
    if _is_known(function_and_options(inner)[0]):
        return declared_reduction(inner)
    advice = (
        "an empirical Fisher matrix needs the gradient of each example: take a criterion that is "
        "a mean or a sum over the first axis of the outputs, or a known one, as in "
        "`composed(outputs, cross_entropy, targets=lambda batch: batch['labels'])`"
    )
    rows, targets_rows = rows_of(outputs, what="outputs"), rows_of(targets, what="targets")
    try:
        alone = torch.stack([inner(*one) for one in _apart(rows, targets_rows)])
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the criterion could not be evaluated on one example alone ({reason}); {advice}"
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
    """Yield the outputs and targets of each example alone.

    Arrays of another length than the outputs are the same for all examples, such as constants of
    the model or weights of classes.
    """
    moving = {len(x) for x in outputs[0] if isinstance(x, Tensor) and x.requires_grad}
    if len(moving) != 1:
        raise ValueError(f"outputs have first axes of {sorted(moving)}")
    (count,) = moving
    for i in range(count):
        one, target = (
            build([x[i : i + 1] if len(x) == count else x for x in arrays])
            for arrays, build in (outputs, targets)
        )
        yield one, target


def with_targets(criterion: Callable[[Any, Any], Tensor], batch: Any, /) -> tuple[Any, Any]:
    """A criterion of (outputs, targets), and the targets: those of the batch, or the batch."""
    if isinstance(criterion, OfTargets):
        return criterion.criterion, criterion.targets(batch)
    return criterion, batch


def function_and_options(criterion: Any) -> tuple[Any, Mapping[str, Any]]:
    """The function that a module or a partial stands for, and its options."""
    if isinstance(criterion, functools.partial) and not criterion.args:
        return criterion.func, criterion.keywords
    for module, (function, names) in _MODULES.items():
        # A subclass may compute anything: only the classes themselves are known.
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
    """What the softmax Hessian of each prediction counts in a cross-entropy."""
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
    """``s (diag(p) - pp')``, with p the softmax and s the weight of each prediction."""
    axis = min(1, outputs.dim() - 1)
    share = torch.softmax(outputs, axis)
    scale = cross_entropy_scale(outputs, targets, **options)

    def product(tangent: Tensor) -> Tensor:
        # No more than three tensors of the size of the outputs live at once: this is the peak of
        # memory where there are many classes.
        inner = (tangent * share).sum(axis, keepdim=True)
        return (tangent - inner).mul_(share).mul_(scale)

    return product


def _mse(outputs: Tensor, targets: Tensor, *, reduction: str = "mean") -> OutputProduct:
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
    """Diagonal: ``weight (1 + (pos_weight - 1) y) p (1 - p)``."""
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
    """A criterion is not convex in the outputs: its Gauss-Newton matrix may be indefinite."""


class LinearCriterionWarning(UserWarning):
    """A criterion is linear in outputs, which add nothing to its Gauss-Newton matrix."""


def warn_of_linear(criterion: Callable[[Any, Any], Tensor], /) -> None:
    """Warn that the Gauss-Newton matrix is zero, and say how the loss is split otherwise."""
    inner = criterion.criterion if isinstance(criterion, OfTargets) else criterion
    function = getattr(inner, "func", inner)
    if function is F.nll_loss or isinstance(function, nn.NLLLoss):
        message = (
            "nll_loss is linear in the log-probabilities that it takes, so the Gauss-Newton "
            "matrix is zero: let the model return logits, without LogSoftmax at its end, and take "
            "`supervised(model_fn, torch.nn.functional.cross_entropy)`"
        )
    else:
        message = (
            "the criterion is linear in the model's outputs, at least near these, so the "
            "Gauss-Newton matrix is zero: put the last nonlinear function of the model into the "
            "criterion, `composed(outputs, criterion)`, or take `hvp(loss)`"
        )
    warnings.warn(message, LinearCriterionWarning, stacklevel=2)


def _warn_of_linear_leaves(names: Sequence[str]) -> None:
    """Warn that some of the output leaves add nothing to the Gauss-Newton matrix."""
    which = ", ".join(names)
    warnings.warn(
        f"the criterion is linear in {which}, at least near these outputs, so the Gauss-Newton "
        f"matrix leaves out the curvature of {which}: put the last nonlinear function of the model "
        "there into the criterion, `composed(outputs, criterion)`, or take `hvp(loss)`",
        LinearCriterionWarning,
        stacklevel=2,
    )


def output_gradient(
    criterion: Callable[[Any, Any], Tensor], outputs: Tree, batch: Any, /, *, create_graph: bool
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """The gradient of a criterion with respect to the outputs.

    Returns:
        The indices of the output leaves that depend on the parameters and on which the criterion
        depends, these leaves, and the gradient at each.

    Raises:
        ValueError: there is no such leaf.
    """
    found, rebuilt = opened(outputs, "outputs")
    places = [i for i, leaf in enumerate(found) if isinstance(leaf, Tensor) and leaf.requires_grad]
    inner = list(found)
    for i in places:
        inner[i] = found[i].detach().requires_grad_()
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
    """The output Hessian of any criterion, through a kept graph of its gradient.

    Returns:
        The indices of the output leaves that depend on the parameters and on which the criterion
        depends, and the product with one vector of such leaves.
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
            found, _ = opened(outputs, "outputs")
            places = [used[i] for i in linear if _is_curved(found[used[i]])]
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
    """Refuse a criterion whose gradient autograd cannot differentiate."""
    found, rebuilt = opened(outputs, "outputs")

    def again(at: Sequence[Tensor]) -> list[Tensor]:
        inner = list(found)
        for i, leaf in zip(used, at, strict=True):
            inner[i] = leaf
        return [criterion(rebuilt(inner), batch)]

    refuse_if_cut(again(leaves), leaves, again, verified=set())


def _without_image(
    product: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor]
) -> list[int]:
    """Return the places of leaves where the product of a vector without zeros is zero."""
    tangents = [
        torch.arange(1.0, leaf.numel() + 1, device=leaf.device).cos().to(leaf).view_as(leaf)
        for leaf in leaves
    ]
    return [i for i, image in enumerate(product(tangents)) if not bool(image.any())]


def _is_curved(output: Tensor) -> bool:
    """Whether an output of the model is not linear in the parameters, nor piecewise linear."""
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
    # Directions that move one example alone see a negative curvature that a sum would hide.
    examples = max(1, min(len(leaf) if leaf.dim() else 1 for leaf in leaves))
    generator = torch.Generator().manual_seed(0)
    for trial in range(_DIRECTIONS_TRIED):
        tangents = []
        for leaf in leaves:
            tangent = torch.zeros_like(leaf).detach()
            target = tangent[trial % examples] if leaf.dim() and len(leaf) else tangent
            target.copy_(torch.randn(target.shape, generator=generator, device="cpu"))
            tangents.append(tangent)
        found = product(tangents)
        curvature = sum(float((u * h).sum()) for u, h in zip(tangents, found, strict=True))
        size = sum(float((u * h).abs().sum()) for u, h in zip(tangents, found, strict=True))
        if curvature < -1e-5 * size:
            warnings.warn(
                "the criterion is not convex in the model's outputs (found in a random "
                "direction): its Gauss-Newton matrix may have negative eigenvalues",
                NotConvexWarning,
                stacklevel=2,
            )
            return
