"""Factors with other columns, and their exactness for whole nets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import between, dense, gauss_newton_blocks, largest_error, net


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_deep_linear_nets_with_square_errors_are_exact(sharing: str) -> None:
    """The Jacobians are the same for all examples (Bernacchia, Lengyel and Hennequin 2018)."""
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 3)),
        4,
        examples=6,
        criterion=F.mse_loss,
    )
    made = hf.kronecker.kflr(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    assert largest_error(dense(made), gauss_newton_blocks(case)) < 1e-8


def test_the_empirical_factors_of_one_example_are_its_squared_gradient() -> None:
    case = net(between(lambda: nn.LayerNorm(4)), 4, examples=1)
    gradient = torch.func.grad(case.loss)(case.params, case.batch)
    for family in (hf.kronecker.kfac, hf.kronecker.ekfac):
        made = family(case.loss, case.model, fisher="empirical")(case.params, case.batch)
        for name, block in made.items():
            expected = torch.outer(gradient[name].flatten(), gradient[name].flatten())
            torch.testing.assert_close(block.dense(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_traces_of_the_empirical_factors(reduction: str) -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        4,
        examples=5,
        criterion=nn.CrossEntropyLoss(reduction=reduction),
    )
    inputs, targets = case.batch
    targets = targets.argmax(1)
    targets[2] = -100
    batch = inputs, targets
    made = hf.kronecker.ekfac(case.loss, case.model, fisher="empirical")(case.params, batch)
    exact = hf.matrix(hf.efvp(case.loss)(case.params, batch), case.params)
    sizes = [leaf.numel() for leaf in case.params.values()]
    for name, part in zip(made, exact.diagonal().split(sizes), strict=True):
        assert made[name].trace() == pytest.approx(float(part.sum()), rel=1e-8)


def test_factors_of_the_inputs_alone() -> None:
    case = net(between(lambda: nn.Linear(3, 4)), 2, 3, examples=4)
    made = hf.kronecker.kfac(case.loss, case.model, fisher="forward-only")(case.params, case.batch)
    x = case.batch[0].flatten(0, 1)
    expected = torch.kron(torch.eye(4, dtype=x.dtype), x.mT @ x / len(x))
    torch.testing.assert_close(made["0.weight"].dense(), expected)
    torch.testing.assert_close(made["0.bias"].dense(), torch.eye(4, dtype=x.dtype))
