"""Criteria: their function, options and reduction, and closed forms of their output Hessians."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string

from hessfunc.losses import OfTargets
from hessfunc.options import validated

Reduction: TypeAlias = Literal["mean", "sum"]
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
    if not is_known(function):
        return None
    if not options.keys() <= _CLOSED_FORMS[function][1]:
        return None
    if options.get("reduction", "mean") not in ("mean", "sum"):
        return None
    return functools.partial(_CLOSED_FORMS[function][0], **options)


def with_targets(criterion: Callable[[Any, Any], Tensor], batch: Any, /) -> tuple[Any, Any]:
    """Return the inner criterion (outputs, targets), and the targets of the batch.

    A criterion of (outputs, batch) is returned unchanged, with the batch itself as targets.
    """
    if isinstance(criterion, OfTargets):
        return criterion.criterion, criterion.targets(batch)
    return criterion, batch


def function_and_options(criterion: Any, /) -> tuple[Any, Mapping[str, Any]]:
    """Return the function that a module or a partial computes, and its options.

    The function of any module but those of `_FUNCTIONS` is its class, and the options are its
    attributes.
    """
    if isinstance(criterion, functools.partial) and not criterion.args:
        return criterion.func, criterion.keywords
    if not isinstance(criterion, nn.Module):
        return criterion, {}
    # A subclass may compute anything, so only the classes themselves are known.
    function = _FUNCTIONS.get(type(criterion))
    attributes = vars(criterion) | criterion._buffers
    if function is None:
        return type(criterion), attributes
    return function, {name: attributes[name] for name in _OPTIONS[function] if name in attributes}


def without_wrappers(criterion: Any, /) -> Any:
    """Return the criterion of torch or of the user inside of the wrappers of this library."""
    while isinstance(criterion, OfTargets | Criterion):
        criterion = criterion.criterion
    return criterion


def declared_reduction(criterion: Any, /) -> Reduction | None:
    """Return the reduction of a loss module or function of torch, or None if it is unknown.

    Partials and wrappers of this library are unwrapped. A subclass of a loss module may compute
    anything, so its reduction is unknown.
    """
    function, options = function_and_options(without_wrappers(criterion))
    reduction: Any = None
    if isinstance(function, type):
        if function.__module__ == nn.modules.loss.__name__:
            reduction = options.get("reduction")
    elif getattr(function, "__module__", None) == F.__name__:
        parameter = inspect.signature(function).parameters.get("reduction")
        reduction = options.get("reduction", None if parameter is None else parameter.default)
        legacy = options.get("size_average"), options.get("reduce")
        if legacy != (None, None):
            reduction = legacy_get_string(*legacy, emit_warning=False)
    if reduction == "batchmean":
        return "mean"
    return reduction if reduction in ("mean", "sum") else None


def is_known(function: Any, /) -> bool:
    """Return whether the output Hessian of a function has a closed form."""
    return isinstance(function, Hashable) and function in _CLOSED_FORMS


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
        total = torch.tensor(coefficient.numel(), dtype=torch.long, device=outputs.device)
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
    probabilities = torch.softmax(outputs, axis)
    scale = cross_entropy_scale(outputs, targets, **options)

    def product(tangent: Tensor) -> Tensor:
        # (diag(p) - pp') u = p (u - <p, u>). At most three tensors of the size of the outputs are
        # alive at once, which is the peak of memory if there are many classes.
        inner = (tangent * probabilities).sum(axis, keepdim=True)
        if torch.is_grad_enabled():
            # Autograd and transforms need the factors unchanged.
            return (tangent - inner) * probabilities * scale
        return (tangent - inner).mul_(probabilities).mul_(scale)

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
_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.NLLLoss: F.nll_loss,
}
# The attributes of torch's losses have the names of the function's options.
_OPTIONS = {
    function: tuple(inspect.signature(function).parameters) for function in _FUNCTIONS.values()
}
