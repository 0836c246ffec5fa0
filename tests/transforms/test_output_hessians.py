"""Hessians of criteria with respect to the outputs of single examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.losses import OfTargets
from hessfunc.transforms.output_gradients import LinearCriterionWarning
from hessfunc.transforms.output_hessians import each_hessian, mean_hessian

CLASSES = torch.tensor([0, 2, 1, 2])
VALUES = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
CRITERIA: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "cross-entropy": (F.cross_entropy, CLASSES),
    "mse": (F.mse_loss, VALUES),
    "of the user": (lambda out, target: (out - target).pow(4).mean(), VALUES),
    "an ignored example": (F.cross_entropy, torch.tensor([0, -100, 1, 2])),
}


def dense(criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, batch: object) -> Tensor:
    """The Hessian ``(B, m, B, m)`` of a criterion, by torch."""
    return torch.func.hessian(lambda z: criterion(z, batch))(outputs)


@pytest.mark.parametrize("name", CRITERIA)
def test_blocks_and_their_sum_are_those_of_the_dense_hessian(name: str) -> None:
    given, targets = CRITERIA[name]
    criterion, batch = OfTargets(given), (torch.zeros(4), targets)
    outputs = torch.randn(4, 3, dtype=torch.float64)
    whole = dense(criterion, outputs, batch)
    blocks = torch.stack([whole[b, :, b] for b in range(4)])
    torch.testing.assert_close(each_hessian(criterion, outputs, batch), blocks)
    torch.testing.assert_close(mean_hessian(criterion, outputs, batch), blocks.sum(0))


def test_a_criterion_that_couples_examples_has_no_blocks() -> None:
    def coupled(outputs: Tensor, batch: object) -> Tensor:
        return outputs.mean(0).square().sum()

    with pytest.raises(ValueError, match="second derivatives couple examples"):
        each_hessian(coupled, torch.randn(4, 3, dtype=torch.float64), None)


def test_a_criterion_that_is_linear_gives_a_warning() -> None:
    outputs = torch.randn(4, 3, dtype=torch.float64)
    with pytest.warns(LinearCriterionWarning):
        found = each_hessian(lambda z, _: z.sum(), outputs, None)
    assert not found.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        each_hessian(lambda z, _: z.square().sum(), outputs, None)


def test_blocks_that_do_not_fit_are_refused() -> None:
    outputs = torch.zeros(1, 1).expand(1000, 1_000_000)
    with pytest.raises(MemoryError, match="1000 examples with respect to 1000000 outputs each"):
        each_hessian(lambda z, _: z.square().sum(), outputs, None)


def test_the_rounding_of_a_criterion_in_float32_is_no_coupling() -> None:
    outputs = torch.linspace(-1, 2, 18, dtype=torch.float64).view(6, 3)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])

    def criterion(outputs: Tensor, batch: object) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.float(), targets)

    blocks = each_hessian(criterion, outputs, None)
    p = outputs.softmax(1)
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-7)
