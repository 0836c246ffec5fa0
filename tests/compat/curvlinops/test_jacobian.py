"""Jacobians against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hessfunc.compat.curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator
from tests.compat.curvlinops.problem import (
    batches,
    dense_jacobian,
    matrix,
    net,
    parameters,
    whole,
)

DATA = batches(nn.CrossEntropyLoss())


@pytest.mark.parametrize("kind", ["list", "subset", "dict"])
def test_jacobian_and_transpose_are_the_dense_ones(kind: str) -> None:
    model = net()
    given, values = parameters(model, kind)
    J = JacobianLinearOperator(model, given, DATA)
    expected = dense_jacobian(model, values, whole(DATA)[0])
    assert J.shape == tuple(expected.shape)
    torch.testing.assert_close(matrix(J), expected)
    torch.testing.assert_close(matrix(J.T), expected.mT)
    torch.testing.assert_close(matrix(J.T.T), expected)
    direct = TransposedJacobianLinearOperator(model, given, DATA)
    torch.testing.assert_close(matrix(direct), expected.mT)
    torch.testing.assert_close(matrix(J.T @ J), expected.mT @ expected)
    outputs = J @ [p[..., None].repeat_interleave(2, -1) for p in values.values()]
    assert [tuple(part.shape) for part in outputs] == [(7, 3, 2)]


def test_another_order_in_each_pass_is_refused() -> None:
    class Shuffled:
        turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            return iter(DATA[:: (-1) ** self.turn])

    model = net()
    with pytest.raises(RuntimeError, match="two passes"):
        JacobianLinearOperator(model, list(model.parameters()), Shuffled())
