"""Output matrices of the empirical Fisher matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hessfunc.compat.curvlinops.empirical import empirical

OUTPUTS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.3], [0.2, 0.1, -0.4]]).double()


def test_ignored_targets_and_class_weights_count_as_in_the_mean() -> None:
    weight = torch.tensor([1.0, 2.0, 4.0]).double()
    loss = nn.CrossEntropyLoss(weight=weight)
    targets = torch.tensor([0, 2, -100])
    product = empirical(loss).output_hessian(OUTPUTS, targets)
    # The mean is (1 g_0 + 4 g_2) / 5 for the gradients g of the two predictions.
    slopes = torch.softmax(OUTPUTS, 1) - nn.functional.one_hot(targets.clamp(min=0), 3)
    tangent = torch.randn(3, 3).double()
    shares = torch.tensor([1.0, 4.0, 0.0]).double()[:, None] / 5
    expected = shares * slopes * (slopes * tangent).sum(1, keepdim=True)
    torch.testing.assert_close(product(tangent), expected)
    assert float(empirical(loss)(OUTPUTS, targets)) == float(loss(OUTPUTS, targets))


def test_outputs_without_an_axis_are_terms_of_their_own() -> None:
    outputs, targets = OUTPUTS[0], torch.tensor([0.0, 1.0, 1.0]).double()
    product = empirical(nn.BCEWithLogitsLoss()).output_hessian(outputs, targets)
    slopes = torch.sigmoid(outputs) - targets
    torch.testing.assert_close(product(torch.ones(3).double()), slopes.square() / 3)


def test_a_loss_with_unknown_terms_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="hf.efvp"):
        empirical(nn.L1Loss())
