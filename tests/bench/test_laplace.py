"""Parts of the measurement of Laplace approximations."""

from __future__ import annotations

import torch
from torch import nn

from bench.laplace import PRIOR, TRAIN, interval, trained


def test_an_interval_is_that_of_student() -> None:
    # The standard deviation of 1, 2, 3 is 1, and t(0.975; 2) = 4.303.
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"


def test_training_ends_at_a_minimum_of_the_penalised_loss() -> None:
    inputs = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 10
    model = trained(inputs, targets, 0)
    parameters = list(model.parameters())
    penalty = torch.stack([leaf.square().sum() for leaf in parameters]).sum()
    value = nn.functional.cross_entropy(model(inputs), targets) + PRIOR / 2 / TRAIN * penalty
    slopes = torch.autograd.grad(value, parameters)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-4
