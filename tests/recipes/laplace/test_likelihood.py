"""Sums of the likelihood over batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.recipes.laplace.likelihood import Likelihood, likelihood_of
from tests.recipes.laplace.problem import (
    CRITERIA,
    NOISE,
    PARAMS,
    D,
    batches,
    log_likelihood,
    loss_of,
)

ONE = torch.tensor(1.0, dtype=D)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_sum_over_batches_is_the_log_likelihood(criterion: object) -> None:
    found = likelihood_of(loss_of(criterion), PARAMS, batches(criterion))
    value = found.log_likelihood(torch.tensor(NOISE, dtype=D))
    torch.testing.assert_close(value, log_likelihood(criterion), rtol=1e-10, atol=0)


def test_ignored_targets_do_not_count() -> None:
    logits = torch.randn(4, 3, dtype=D)
    targets = torch.tensor([0, -100, 2, -100])
    loss = hf.supervised(lambda p, x: x * p["w"], F.cross_entropy)
    found = likelihood_of(
        loss,
        {"w": ONE},
        [(logits[:2], targets[:2]), (logits[1:2], targets[1:2]), (logits[2:], targets[2:])],
    )
    assert found.terms == 2.0
    total = F.cross_entropy(logits, targets, reduction="sum")
    assert math.isclose(found.total, float(total), rel_tol=1e-12)


def test_probabilities_as_targets_count_once_for_each_example() -> None:
    logits = torch.randn(4, 3, dtype=D)
    loss = hf.supervised(lambda p, x: x * p["w"], F.cross_entropy)
    found = likelihood_of(loss, {"w": ONE}, [(logits, logits.softmax(1))])
    assert found.terms == 4.0


def test_the_scale_undoes_the_mean_and_the_factor_of_the_squared_error() -> None:
    noise = torch.tensor(0.5, dtype=D)
    assert float(Likelihood("normal", 6.0, 1.0, 6.0).curvature_scale(noise)) == 12.0
    assert float(Likelihood("categorical", 6.0, 1.0, 6.0).curvature_scale(ONE)) == 6.0
    assert float(Likelihood("categorical", 6.0, 1.0, 1.0).curvature_scale(ONE)) == 1.0


def test_batches_without_targets_are_refused() -> None:
    loss = hf.supervised(lambda p, x: x * p["w"], F.cross_entropy)

    def of(targets: Tensor) -> object:
        return likelihood_of(loss, {"w": ONE}, [(torch.zeros(2, 3, dtype=D), targets)])

    with pytest.raises(ValueError, match="no target"):
        of(torch.tensor([-100, -100]))
