"""Calibration of predicted probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results.result import Saved
from hessfunc.display import Displayed
from hessfunc.numerics import wide_dtype
from hessfunc.options import at_least


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Calibration(Displayed, Saved):
    """Agreement of predicted probabilities with the classes that occurred.

    Attributes:
        nll: Mean negative log-likelihood of the targets, in nats.
        nll_error: Standard error of ``nll`` over the examples.
        accuracy: Share of examples whose most probable class is the target.
        accuracy_error: Standard error of ``accuracy``.
        ece: Expected calibration error, ``sum_b (count_b / B) |accuracy_b - confidence_b|`` over
            bins of the confidence, the largest probability of an example. Its estimate is biased
            upwards if bins have few examples.
        counts: Number of examples of each bin, ``(bins,)``.
        confidences: Mean confidence of each bin, ``(bins,)``; NaN for an empty bin.
        accuracies: Accuracy of each bin, ``(bins,)``; NaN for an empty bin.
    """

    nll: float
    nll_error: float
    accuracy: float
    accuracy_error: float
    ece: float
    counts: Tensor
    confidences: Tensor
    accuracies: Tensor

    def _headline(self) -> dict[str, object]:
        return {
            "nll": f"{self.nll:.4g} +- {self.nll_error:.2g}",
            "accuracy": f"{self.accuracy:.4g} +- {self.accuracy_error:.2g}",
            "ece": f"{self.ece:.4g}",
            "examples": int(self.counts.sum()),
        }

    def _columns(self) -> Mapping[str, Sequence[Any]]:
        return {
            "bin": range(len(self.counts)),
            "count": self.counts.tolist(),
            "confidence": self.confidences.tolist(),
            "accuracy": self.accuracies.tolist(),
        }


@options.validated(probabilities=options.tensor, targets=options.tensor)
def calibration(probabilities: Tensor, targets: Tensor, /, *, bins: int = 15) -> Calibration:
    """Measure the calibration of predicted probabilities.

    Examples:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
        >>> made = hf.calibration(probabilities, torch.tensor([0, 1]))
        >>> made.accuracy
        0.5

    Args:
        probabilities: Probabilities of the classes, ``(B, C)``, or of class 1 of two, ``(B,)`` or
            ``(B, 1)``.
        targets: Classes that occurred, ``(B,)``; True is class 1 of two.
        bins: Number of bins of equal width for the expected calibration error.

    Raises:
        TypeError: If probabilities or targets are complex.
        ValueError: If the shapes do not fit, if probabilities are not in [0, 1] or do not sum to
            one, or if a target is not a class.

    Source: Guo, Pleiss, Sun and Weinberger 2017, arXiv 1706.04599.
    """
    at_least(1, bins=bins)
    for name, given in (("probabilities", probabilities), ("targets", targets)):
        if given.is_complex():
            raise TypeError(f"{name} has the dtype {given.dtype}: pass real numbers")
    targets = targets.long() if targets.dtype == torch.bool else targets
    p = probabilities.detach().to(wide_dtype(probabilities.device))
    if p.dim() == 1 or (p.dim() == 2 and p.shape[1] == 1):
        p = torch.stack([1 - p.flatten(), p.flatten()], dim=1)
    _refuse_unless_fitting(p, targets, probabilities.dtype)
    classes = targets.reshape(-1).long()
    # A probability that underflows to zero has an infinite negative log-likelihood.
    losses = -p.gather(1, classes[:, None])[:, 0].log()
    confidence, chosen = p.max(1)
    hits = (chosen == classes).to(p)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts, sums, right = (
        p.new_zeros(bins).index_add_(0, place, each)
        for each in (torch.ones_like(hits), confidence, hits)
    )
    return Calibration(
        nll=float(losses.mean()),
        nll_error=_standard_error(losses),
        accuracy=float(hits.mean()),
        accuracy_error=_standard_error(hits),
        ece=float((right - sums).abs().sum() / len(p)),
        counts=counts,
        confidences=sums / counts,
        accuracies=right / counts,
    )


def _standard_error(values: Tensor) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return float(values.std() / len(values) ** 0.5)


def _refuse_unless_fitting(p: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
    """Raise unless the shapes fit, rows sum to one up to rounding, and targets are classes."""
    if p.dim() != 2 or not len(p) or targets.numel() != len(p):
        raise ValueError(
            f"the probabilities have shape {tuple(p.shape)}, and the targets "
            f"{tuple(targets.shape)}: pass (B, C) probabilities and (B,) classes with B > 0"
        )
    # Probabilities that are rounded to a narrow dtype sum to one up to its eps.
    tolerance = max(1e-3, torch.finfo(dtype).eps if dtype.is_floating_point else 0)
    if not bool(((p >= 0) & (p <= 1)).all()) or float((p.sum(1) - 1).abs().max()) > tolerance:
        raise ValueError(
            "the probabilities are not in [0, 1] or do not sum to one: pass "
            "`predictive.probabilities()`, or the softmax of the outputs"
        )
    whole = bool((targets == targets.round()).all())
    if not whole or int(targets.min()) < 0 or int(targets.max()) >= p.shape[1]:
        raise ValueError(
            f"the targets are not classes from 0 to {p.shape[1] - 1}: pass the index of the class "
            "of each example"
        )
