"""Operators of plain tensors, and the gradient of a risk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hessfunc.compat.curvlinops.examples import (
    IdentityLinearOperator,
    OuterProductLinearOperator,
    TensorLinearOperator,
    gradient_and_loss,
)
from tests.compat.curvlinops.problem import batches, matrix, net, whole

DENSE = torch.arange(12.0).reshape(3, 4)


def test_products_are_those_of_the_tensors() -> None:
    A = TensorLinearOperator(DENSE)
    torch.testing.assert_close(matrix(A), DENSE)
    torch.testing.assert_close(matrix(A.adjoint()), DENSE.mT)
    assert TensorLinearOperator(DENSE @ DENSE.mT).SELF_ADJOINT
    assert not A.SELF_ADJOINT
    c = torch.tensor([1.0, -2.0, 0.5, 3.0])
    outer = OuterProductLinearOperator(c, DENSE)
    torch.testing.assert_close(matrix(outer), DENSE @ c.diag() @ DENSE.mT)
    assert outer.T is outer
    identity = IdentityLinearOperator([(2, 2), (3,)], DENSE.device, DENSE.dtype)
    assert torch.equal(matrix(identity), torch.eye(7))
    with pytest.raises(ValueError, match="not a matrix"):
        TensorLinearOperator(torch.ones(3))


def test_the_gradient_is_that_of_all_examples() -> None:
    model, loss = net(), nn.MSELoss()
    data = batches(loss)
    inputs, targets = whole(data)
    value = loss(model(inputs), targets)
    expected = torch.autograd.grad(value, list(model.parameters()))
    for params in (list(model.parameters()), dict(model.named_parameters())):
        gradient, found = gradient_and_loss(model, loss, params, data)
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(
            nn.utils.parameters_to_vector(gradient), nn.utils.parameters_to_vector(expected)
        )
