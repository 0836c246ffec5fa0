"""Gradient of the mean loss of batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.losses import LossFunction
from hessfunc.transforms.batches.gradient import mean_gradient
from hessfunc.transforms.batches.reductions import Average
from tests.cases import case
from tests.reference import flat, gradient, relative_error

FOUND = case("mlp")


@pytest.mark.parametrize("size", [1, 2, 100])
def test_it_is_the_gradient_of_all_examples_however_they_are_cut(size: int) -> None:
    batches = hf.microbatches(FOUND.batch, size)
    value, mean = mean_gradient(FOUND.loss, Average(None), FOUND.params, batches)
    assert value == pytest.approx(float(FOUND.loss(FOUND.params, FOUND.batch)), rel=1e-10)
    expected = gradient(FOUND.loss, FOUND.params, FOUND.batch)
    assert relative_error(flat(mean), expected) < 1e-10


def test_weights_of_the_user_are_those_of_the_mean() -> None:
    def loss(params: Tensor, batch: float) -> Tensor:
        return (params * batch).sum()

    value, mean = mean_gradient(loss, Average(lambda batch: batch), torch.ones(2), [1.0, 3.0])
    # (1 * 1 + 3 * 3) / (1 + 3) for each entry.
    assert value == pytest.approx(5.0)
    assert mean.tolist() == [2.5, 2.5]


def test_a_batch_of_weight_zero_is_left_out() -> None:
    loss = lambda params, batch: (params * batch).sum() / batch  # noqa: E731
    value, mean = mean_gradient(loss, Average(lambda batch: batch), torch.ones(1), [0.0, 2.0])
    assert (value, mean.tolist()) == (1.0, [1.0])


def test_a_loss_that_ignores_the_parameters_is_refused_by_their_name() -> None:
    with pytest.raises(ValueError, match="the loss does not depend on hyperparams"):
        mean_gradient(
            lambda _, batch: torch.tensor(batch),
            Average(lambda _: 1.0),
            torch.ones(2),
            [1.0],
            name="hyperparams",
        )


def test_no_batch() -> None:
    loss = lambda params, batch: (params * batch).sum()  # noqa: E731
    with pytest.raises(ValueError, match="no batch with a positive weight"):
        mean_gradient(loss, Average(None), torch.ones(2), [])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, batch: params.sum().item(), "must be a scalar tensor, not a float"),
        (lambda params, batch: params, "must be a scalar tensor, not of shape"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor_is_refused(loss: LossFunction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_gradient(loss, Average(None, several=False), torch.ones(2), [1.0])
