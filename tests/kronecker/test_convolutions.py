"""Inputs of convolutions; `test_factor_rules.py` checks the dependence on each weight."""

import torch
from torch.nn import functional as F

from hessfunc.kronecker.convolutions import unfolded


def test_unfolded_inputs_are_those_of_torch() -> None:
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))
    made = unfolded(x, (3, 2), (2, 1), (1, 2), 2)
    expected = F.unfold(x, (3, 2), dilation=(1, 2), stride=(2, 1))
    torch.testing.assert_close(made.flatten(1, 2), expected)
    assert made.shape[:2] == (2, 2)
