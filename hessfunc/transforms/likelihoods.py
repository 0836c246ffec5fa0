"""Sampled Fisher matrices of criteria that are negative log-likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.logits import mean_outer_product
from hessfunc.losses import OfTargets
from hessfunc.randomness import uniforms
from hessfunc.transforms.criteria import (
    OutputProduct,
    closed_form,
    cross_entropy_scale,
    function_and_options,
    with_targets,
)

# Options with which a criterion is still the negative logarithm of a likelihood.
_OPTIONS: dict[Any, set[str]] = {
    F.cross_entropy: {"ignore_index", "reduction"},
    F.mse_loss: {"reduction"},
    F.binary_cross_entropy_with_logits: {"reduction"},
}


def has_likelihood(criterion: Callable[[Any, Any], Tensor], /) -> bool:
    """Return whether a criterion is the negative logarithm of a known likelihood."""
    inner = criterion.criterion if isinstance(criterion, OfTargets) else criterion
    function, options = function_and_options(inner)
    known = _OPTIONS.get(function) if isinstance(function, Hashable) else None
    return known is not None and all(
        name in known or (not isinstance(value, Tensor) and value in (None, 0.0))
        for name, value in options.items()
    )


def refuse_without_likelihood(criterion: Callable[[Any, Any], Tensor], /) -> None:
    """Raise ValueError unless a criterion is the negative logarithm of a known likelihood."""
    if not has_likelihood(criterion):
        raise ValueError(
            "a Fisher matrix needs a criterion that is the negative logarithm of a likelihood: "
            "pass cross_entropy (no class weights, no label smoothing), mse_loss or "
            "binary_cross_entropy_with_logits (no weights) to `supervised`, or use `ggnvp(loss)`, "
            "which takes any criterion"
        )


def sampled_fisher(
    criterion: Callable[[Any, Any], Tensor],
    outputs: Tensor,
    batch: Any,
    /,
    *,
    samples: int,
    key: tuple[int, ...],
) -> OutputProduct:
    """Return the Monte Carlo Fisher matrix of the outputs, an unbiased estimate of the exact one.

    Targets are drawn independently for each prediction: each position for cross-entropy, each
    entry for MSE and BCE. Each prediction contributes the outer product of its own gradient.
    """
    # For MSE and BCE, the exact matrix is diagonal with entries E_y[r^2], r the gradient of -log p.
    # `ratio` is mean_s r_s^2 / E[r^2]: r_s is normal for MSE, and p - y_s for BCE, where
    # E[r^2] = p (1 - p).
    inner, targets = with_targets(criterion, batch)
    function, options = function_and_options(inner)
    if function is F.cross_entropy:
        scale = cross_entropy_scale(outputs, targets, **options)
        axis = _class_axis(outputs)
        probabilities = torch.softmax(outputs, axis)
        drawn = _drawn_classes(probabilities, samples, key)
        product = mean_outer_product(probabilities, drawn, axis)
        return lambda tangent: product(tangent) * scale
    exact = closed_form(criterion)
    assert exact is not None
    draws = uniforms(samples * outputs.numel(), *key, device=outputs.device)
    draws = draws.view(samples, *outputs.shape)
    if function is F.mse_loss:
        # The square of a standard normal number has mean 1.
        ratio = torch.special.ndtri(draws).square().mean(0)
    else:
        probability = torch.sigmoid(outputs)
        residual = probability - (draws < probability).to(draws.dtype)
        ratio = residual.square().mean(0) / (probability * (1 - probability))
    ratio = ratio.to(outputs.dtype)
    product = exact(outputs, batch)
    return lambda tangent: ratio * product(tangent)


def _class_axis(outputs: Tensor) -> int:
    return min(1, outputs.dim() - 1)


def _drawn_classes(probabilities: Tensor, samples: int, key: tuple[int, ...]) -> Tensor:
    """Draw classes with these probabilities; the draws lie along the axis of the classes."""
    axis = _class_axis(probabilities)
    last = torch.movedim(probabilities, axis, -1)
    draws = uniforms(samples * last[..., 0].numel(), *key, device=probabilities.device)
    return torch.movedim(classes_at(last, draws.view(*last.shape[:-1], samples)), -1, axis)


def classes_at(probabilities: Tensor, draws: Tensor, /) -> Tensor:
    """Return the classes, along the last axis, that uniform numbers draw."""
    # Inverse transform sampling: the class is the first whose cumulated probability exceeds u.
    cumulated = probabilities.cumsum(-1)
    draws = draws.to(cumulated.dtype)
    if transforming():
        # `vmap` makes copies for a binary search, and a comparison with all entries does not.
        drawn = (cumulated[..., None, :] < draws[..., :, None]).sum(-1)
    else:
        drawn = torch.searchsorted(cumulated.contiguous(), draws)
    return drawn.clamp_max(probabilities.shape[-1] - 1)


def sampled_gradients(
    criterion: Callable[[Any, Any], Tensor],
    outputs: Tensor,
    batch: Any,
    /,
    *,
    samples: int,
    key: tuple[int, ...],
) -> Tensor:
    """Return columns ``(samples, *outputs)`` whose outer products sum to a sampled Fisher matrix.

    For each example, a column holds the gradient of -log p(y) for a draw of y. It is weighted so
    that the expectation of the sum is the output Hessian.
    """
    inner, targets = with_targets(criterion, batch)
    function, options = function_and_options(inner)
    if function is F.cross_entropy:
        axis = _class_axis(outputs)
        probabilities = torch.softmax(outputs, axis)
        drawn = torch.movedim(_drawn_classes(probabilities, samples, key), axis, 0).unsqueeze(
            axis + 1
        )
        hot = probabilities.new_zeros(samples, *probabilities.shape).scatter_(axis + 1, drawn, 1)
        scale = cross_entropy_scale(outputs, targets, **options)
        return (scale / samples).sqrt() * (probabilities - hot)
    draws = uniforms(samples * outputs.numel(), *key, device=outputs.device)
    draws = draws.view(samples, *outputs.shape)
    if function is F.mse_loss:
        exact = closed_form(criterion)
        assert exact is not None
        variance = exact(outputs, batch)(torch.ones_like(outputs))
        return (variance / samples).sqrt() * torch.special.ndtri(draws).to(outputs.dtype)
    count = 1 if options.get("reduction") == "sum" else outputs.numel()
    probability = torch.sigmoid(outputs)
    residual = probability - (draws < probability).to(outputs.dtype)
    return residual / (count * samples) ** 0.5
