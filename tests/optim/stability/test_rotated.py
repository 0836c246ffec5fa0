from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import hessfunc as hf
from hessfunc.optim import Preconditioner
from tests.optim.stability.others import SOAP, Shampoo
from tests.optim.stability.quadratics import Quadratic, assert_diverges_at_the_threshold, warmed

SHAPES = {"bias": (2,), "weight": (2, 3), "kernel": (2, 1, 2)}


@pytest.mark.parametrize(
    "make",
    [
        partial(SOAP, lr=0.1, betas=(0.9, 0.999)),
        partial(SOAP, lr=0.1, betas=(0.5, 0.999), correct_bias=False, eps=0.1),
        partial(SOAP, lr=0.1, betas=(0.9, 0.999), weight_decay=2.0),
        partial(SOAP, lr=0.1, betas=(0.9, 0.999), longest=2),
        partial(SOAP, lr=0.1, betas=(0.9, 0.999), merge=True),
        partial(Shampoo, lr=0.1),
        partial(Shampoo, lr=0.1, weight_decay=0.5, epsilon=1.0),
    ],
    ids=lambda make: f"{make.func.__name__} {make.keywords}",
)
def test_a_rotated_preconditioner_diverges_at_the_threshold(
    make: Callable[..., Optimizer],
) -> None:
    model = Quadratic(SHAPES)
    steps = 300 if make.func is SOAP else 20  # type: ignore[attr-defined]
    optimizer = warmed(model, lambda model: make(model.parameters()), steps=steps)
    assert_diverges_at_the_threshold(model, [optimizer])


def test_the_inverse_of_the_preconditioner_of_shampoo_is_the_product_of_its_factors() -> None:
    model = Quadratic(SHAPES)
    optimizer = warmed(model, lambda model: Shampoo(model.parameters(), lr=0.1), steps=20)
    factor = hf.stability(optimizer, model).preconditioner["weight"]
    assert isinstance(factor, Preconditioner)
    state = optimizer.state[model.weight]
    inverse = torch.kron(state["inv_precond_0"], state["inv_precond_1"])
    rows = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    torch.testing.assert_close(factor.power(rows, -1.0).flatten(1), inverse)
    twice = factor.power(factor.power(rows, -0.5), -0.5).flatten(1)
    torch.testing.assert_close(twice, inverse)


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (partial(SOAP, lr=0.1), 1, "call `optimizer.step\\(\\)` twice"),
        (partial(SOAP, lr=0.1, normalize_grads=True), 3, "normalize_grads=True has no stability"),
        (partial(SOAP, lr=0.1, merge=True, longest=3), 3, "pass merge_dims=False"),
        (partial(Shampoo, lr=0.1), 0, "Shampoo has no state of 'bias'"),
        (partial(Shampoo, lr=0.1, momentum=0.5), 3, "pass momentum=0"),
    ],
)
def test_steps_without_a_limit_are_refused(make: Any, steps: int, message: str) -> None:
    model = Quadratic(SHAPES)
    optimizer = warmed(model, lambda model: make(model.parameters()), steps=steps)
    with pytest.raises(ValueError, match=message):
        hf.stability(optimizer, model)
