"""Verification of uses, once for each structure of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.kronecker.observation import observed
from hessfunc.kronecker.verification import Verification
from tests.kronecker.cases import dense, largest_error, net


class Hidden(nn.Module):
    """A weight with a use that no function of torch shows, and one that changes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.layer(x))
        if x.shape[0] > 3:
            z = self.layer(z)
        return self.head(z)


def test_uses_that_are_missing_are_found() -> None:
    case = net(Hidden, 3, examples=4)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    (seen,) = observed(case.model, case.loss, leaves, case.batch)
    weight = seen.uses["layer.weight"]
    assert len(weight.calls) == 2
    verified = Verification()([seen], leaves)
    assert not verified.others
    # Without one of its calls, the weight's gradient is not the sum over its uses.
    part = {**seen.uses, "layer.weight": replace(weight, calls=weight.calls[:1])}
    verified = Verification()([replace(seen, uses=part)], leaves)
    assert "layer.weight" not in verified.uses
    assert "not observed" in verified.others["layer.weight"]


def test_each_structure_is_verified_once() -> None:
    case = net(Hidden, 3, examples=4)
    curvature = hf.kronecker.kflr(case.loss, case.model)
    for count, structures in ((4, 1), (5, 1), (3, 2), (2, 2), (1, 2)):
        inputs = torch.randn(count, 3, dtype=torch.float64)
        batch = inputs, torch.arange(count) % 3
        made = curvature(case.params, batch)
        assert len(curvature.verification.known) == structures
        fresh = hf.kronecker.kflr(case.loss, case.model)(case.params, batch)
        assert largest_error(dense(made), dense(fresh)) == 0


def test_a_single_example_verifies_nothing_for_others() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.layer(x), 0) + self.layer(x)

    case = net(Mixed, 3, examples=1)
    curvature = hf.kronecker.kflr(case.loss, case.model)
    curvature(case.params, case.batch)
    batch = torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 3
    with pytest.raises(ValueError, match="or the model mixes examples"):
        curvature(case.params, batch)
