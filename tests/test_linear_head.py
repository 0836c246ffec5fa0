"""Losses of models that end in a linear layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.linear_head import LinearHeadLoss
from tests.cases import waves
from tests.reference import hessian, matrix, relative_error

TRUNK_FN, _ = hf.functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double())
TRUNK_PARAMS = {"0.weight": waves(4, 3), "0.bias": waves(4)}
PARAMS = {**TRUNK_PARAMS, "weight": waves(7, 4), "bias": waves(7)}
BATCH = waves(2, 5, 3), torch.arange(10).view(2, 5) * 3 % 7


def states(p: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    inner = {name: p[name] for name in TRUNK_PARAMS}
    return TRUNK_FN(inner, batch[0]), p["weight"], p["bias"]


def made(**options: Any) -> LinearHeadLoss:
    return hf.linear_head_loss(states, lambda batch: batch[1], rows_per_chunk=3, **options)


def test_outputs_and_criterion_are_its_halves() -> None:
    loss = made(softcap=1.5, label_smoothing=0.1)
    hidden, weight, bias = states(PARAMS, BATCH)
    z = 1.5 * torch.tanh(F.linear(hidden, weight, bias) / 1.5)
    due = F.cross_entropy(z.movedim(-1, 1), BATCH[1], label_smoothing=0.1)
    assert torch.isclose(loss(PARAMS, BATCH), due, rtol=1e-12)
    assert torch.isclose(loss.criterion(loss.outputs(PARAMS, BATCH), BATCH), due, rtol=1e-12)


def test_one_prediction_for_each_example() -> None:
    loss = hf.linear_head_loss(states, lambda batch: batch[1], rows_per_chunk=2)
    flat = BATCH[0].flatten(0, 1), BATCH[1].flatten()
    assert loss.outputs(PARAMS, flat).shape == (10, 7)
    assert torch.isclose(loss(PARAMS, flat), loss(PARAMS, BATCH), rtol=1e-12)


@pytest.mark.parametrize("held", [["weight"], ["bias", "0.bias"]])
def test_parameters_can_be_held(held: list[str]) -> None:
    loss = made()
    fixed, moving = hf.split(PARAMS, held)
    part = hf.hold(loss, fixed)
    assert isinstance(part, LinearHeadLoss)
    exact = hessian(lambda p, b: loss({**fixed, **p}, b), moving, BATCH)
    assert relative_error(matrix(hf.hvp(part)(moving, BATCH), moving), exact) < 1e-10


def test_batches_are_weighted_by_the_tokens_that_count() -> None:
    x, y = BATCH
    y = torch.where(torch.arange(5) > torch.tensor([[1], [3]]), -100, y)
    apart = hf.over_batches(hf.hvp(made()))(PARAMS, [(x[:1], y[:1]), (x[1:], y[1:])])
    exact = hessian(made(), PARAMS, (x, y))
    assert relative_error(matrix(apart, PARAMS), exact) < 1e-10


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="softcap=-1"):
        made(softcap=-1)
    with pytest.raises(TypeError, match="targets"):
        hf.linear_head_loss(states, BATCH[1])  # type: ignore[arg-type]
