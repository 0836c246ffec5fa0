"""Negative log-likelihood of a data set, from the criterion of a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.algorithms.results.result import Saved
from hessfunc.autograd import explained
from hessfunc.losses import Loss
from hessfunc.spaces.of import space_of
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.mean import refuse_one_batch
from hessfunc.transforms.criteria import (
    declared_reduction,
    function_and_options,
    with_targets,
    without_wrappers,
)
from hessfunc.transforms.likelihoods import has_likelihood
from hessfunc.trees import Tree

Family: TypeAlias = Literal["normal", "categorical", "bernoulli"]

_FAMILIES: dict[Any, Family] = {
    F.mse_loss: "normal",
    F.cross_entropy: "categorical",
    F.binary_cross_entropy_with_logits: "bernoulli",
}


@dataclass(frozen=True)
class Likelihood(Saved):
    """Likelihood of a data set at the parameters, up to the noise of normal targets.

    Attributes:
        family: Distribution of a target given the outputs: ``"normal"``, ``"categorical"`` or
            ``"bernoulli"``.
        terms: Number of targets: entries of normal and Bernoulli targets, classes that are not
            ignored.
        total: Sum over the targets: of squared errors for normal targets, of negative
            log-likelihoods otherwise.
        curvature_count: Number of terms over which the criterion takes its mean, 1 for a sum.
    """

    family: Family
    terms: float
    total: float
    curvature_count: float

    def log_likelihood(self, noise: Tensor, /) -> Tensor:
        """Return the log-likelihood of the data set.

            log p(D) = -|y - f|^2 / (2 noise^2) - terms log(noise sqrt(2 pi))

        This is the formula of normal targets. Others have no noise.
        """
        if self.family != "normal":
            return noise.new_tensor(-self.total)
        normaliser = self.terms * (noise.log() + math.log(2 * math.pi) / 2)
        return -self.total / (2 * noise.square()) - normaliser

    def curvature_scale(self, noise: Tensor, /) -> Tensor:
        """Return the factor between the criterion's curvature and that of the log-likelihood.

        The squared error of `mse_loss` is 2 noise^2 times the negative log-likelihood of normal
        targets.
        """
        count = noise.new_tensor(self.curvature_count)
        return count / (2 * noise.square()) if self.family == "normal" else count


def family_of(loss: Loss, /) -> Family:
    """Return the distribution of targets whose negative log-likelihood is the criterion.

    Raises:
        TypeError: If the loss does not expose its criterion.
        ValueError: If the criterion is not the negative logarithm of a known likelihood.
    """
    if not isinstance(loss, Loss):
        raise TypeError(
            "a Laplace approximation needs a loss with outputs and a criterion: make the loss "
            "with `supervised(model_fn, criterion)` or `composed(outputs, criterion, targets=...)`"
        )
    if not has_likelihood(loss.criterion):
        raise ValueError(
            "a Laplace approximation needs a criterion that is the negative logarithm of a "
            "likelihood: pass cross_entropy (no class weights, no label smoothing), mse_loss or "
            "binary_cross_entropy_with_logits (no weights) to `supervised`"
        )
    return _FAMILIES[function_and_options(without_wrappers(loss.criterion))[0]]


def likelihood_of(
    loss: Loss, params: Tree, batches: Iterable[Any], /, *, checks_repetition: bool = False
) -> Likelihood:
    """Sum the likelihood of the batches, in one pass without gradients.

    Args:
        loss: Loss whose criterion is the negative logarithm of a likelihood.
        params: Parameters of the model.
        batches: Batches of the data.
        checks_repetition: Whether to evaluate the first batch twice, and to refuse a random model.

    Raises:
        TypeError: If ``batches`` is a single batch, or can be read only once.
        ValueError: If there is no target, or if two evaluations of the first batch differ.
    """
    family = family_of(loss)
    refuse_one_batch(batches)
    is_mean = declared_reduction(loss.criterion) == "mean"
    terms, total = 0.0, 0.0
    with torch.no_grad(), several_batches():
        for place, batch in enumerate(batches):
            with explained(space_of(params), batch):
                outputs = loss.outputs(params, batch)
                if checks_repetition and not place and outputs.numel():
                    _refuse_unless_equal(outputs, loss.outputs(params, batch))
                if count := _terms(loss, outputs, batch):
                    terms += count
                    total += float(loss.criterion(outputs, batch)) * (count if is_mean else 1)
    if not terms:
        raise ValueError("the batches have no target: pass at least one batch with a target")
    return Likelihood(family, terms, total, terms if is_mean else 1.0)


def _refuse_unless_equal(outputs: Tensor, again: Tensor) -> None:
    """Raise unless two evaluations of a batch have the same outputs, up to rounding."""
    tolerance = torch.finfo(outputs.dtype).eps ** 0.5 * outputs.abs().amax()
    if bool(((again - outputs).abs() > tolerance).any()):
        raise ValueError(
            "two evaluations of a batch have different outputs, because a layer of the model is "
            "random, such as dropout in train mode: call `model.eval()` before `functional(model)`"
        )


def _terms(loss: Loss, outputs: Tensor, batch: Any) -> float:
    """Return the number of terms of the criterion, over which a mean criterion divides."""
    inner, targets = with_targets(loss.criterion, batch)
    function, options = function_and_options(inner)
    if function is not F.cross_entropy:
        return float(torch.broadcast_shapes(outputs.shape, targets.shape).numel())
    if targets.is_floating_point():
        return outputs.numel() / outputs.shape[min(1, outputs.dim() - 1)]
    return float((targets != options.get("ignore_index", -100)).sum())
