"""Wrong arguments of operators and functions, named at the door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hessfunc.compat.curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    hutchinson_trace,
    lanczos_approximate_spectrum,
)
from tests.compat.curvlinops.problem import batches, net

MODEL, LOSS = net(), nn.CrossEntropyLoss()
RISK: dict[str, Any] = {
    "model_func": MODEL,
    "loss_func": LOSS,
    "params": list(MODEL.parameters()),
    "data": batches(LOSS),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_func", 3, "model_func"),
        ("loss_func", nn.CrossEntropyLoss, "pass an instance"),
        ("params", [1.0], "each of params must be a tensor"),
        ("params", {"a": {"b": torch.ones(1)}}, "params"),
        ("data", 3, r"pass \[batch\]"),
        ("num_data", 2.5, "num_data"),
        ("batch_size_fn", 3, "batch_size_fn"),
        ("check_deterministic", "no", "True or False"),
    ],
)
def test_arguments_of_matrices(name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GGNLinearOperator(**RISK | {name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CGInverseLinearOperator(torch.eye(2)), r"pass TensorLinearOperator\(A\)"),
        (lambda: CGInverseLinearOperator("A"), "must be an operator"),
        (lambda: hutchinson_trace(torch.ones(3), 4), r"pass a matrix \(m, n\)"),
        (lambda: hutchinson_trace(torch.eye(3, dtype=torch.int64), 4), "in float32 or float64"),
        (lambda: hutchinson_trace(torch.eye(3), 2.5), "num_matvecs"),
        (lambda: lanczos_approximate_spectrum(torch.eye(3), 2, boundaries=3.0), "must be a pair"),
        (lambda: KFACLinearOperator(**RISK).inverse(damping="a"), "damping"),
        (lambda: KFACLinearOperator(**RISK).inverse(damping=(0.1, "a")), "damping"),
    ],
)
def test_operators_tensors_and_pairs(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_tensors_lose_their_graph() -> None:
    A = torch.eye(3, dtype=torch.float64, requires_grad=True)
    found = hutchinson_trace(A, 3)
    assert (float(found), found.requires_grad) == (pytest.approx(3.0), False)
