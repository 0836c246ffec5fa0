from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

import hessfunc as hf
from tests.cases import Case, case
from tests.optim.stability.quadratics import (
    Quadratic,
    assert_diverges_at_the_threshold,
    warmed,
)
from tests.reference import hessian, matrix, relative_error

TORCH = torch.optim


def of(cls: Any, **options: Any) -> Any:
    return pytest.param(partial(cls, **options), id=f"{cls.__name__} {options}")


@pytest.mark.parametrize(
    "make",
    [
        of(TORCH.SGD, lr=0.1),
        of(TORCH.SGD, lr=0.1, dampening=0.3),
        of(TORCH.SGD, lr=0.1, weight_decay=3.0),
        of(TORCH.SGD, lr=0.1, momentum=0.9),
        of(TORCH.SGD, lr=0.1, momentum=0.5, dampening=0.3),
        of(TORCH.SGD, lr=0.1, momentum=0.9, nesterov=True),
        of(TORCH.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=2.0),
    ],
)
def test_gradient_descent_diverges_at_the_threshold(make: Callable[..., Optimizer]) -> None:
    model = Quadratic()
    optimizer = make(model.parameters())
    assert_diverges_at_the_threshold(model, [optimizer])
    assert hf.stability(optimizer, model).preconditioner is None


@pytest.mark.parametrize(
    "make",
    [
        of(TORCH.Adam, lr=0.1),
        of(TORCH.Adam, lr=0.1, betas=(0.0, 0.999), eps=0.3),
        of(TORCH.Adam, lr=0.1, amsgrad=True),
        of(TORCH.Adam, lr=0.1, weight_decay=2.0),
        of(TORCH.AdamW, lr=0.1, weight_decay=3.0, eps=0.1),
        of(TORCH.NAdam, lr=0.1),
        of(TORCH.NAdam, lr=0.1, betas=(0.5, 0.999), momentum_decay=0.1, weight_decay=1.0),
        of(TORCH.NAdam, lr=0.1, weight_decay=3.0, decoupled_weight_decay=True),
        of(TORCH.RMSprop, lr=0.1, alpha=0.999),
        of(TORCH.RMSprop, lr=0.1, alpha=0.999, momentum=0.9, eps=0.2),
        of(TORCH.RMSprop, lr=0.1, alpha=0.999, centered=True, weight_decay=1.0),
        of(TORCH.Adagrad, lr=0.1, lr_decay=0.01),
        of(TORCH.Adagrad, lr=0.1, weight_decay=0.5, eps=1.0),
        of(TORCH.Adafactor, lr=0.01),
        of(TORCH.Adafactor, lr=0.1, weight_decay=2.0),
        of(Adafactor, lr=None),
        of(Adafactor, lr=None, beta1=0.9, warmup_init=True),
        of(Adafactor, lr=0.1, relative_step=False, scale_parameter=False, weight_decay=2.0),
    ],
)
def test_a_frozen_preconditioner_diverges_at_the_threshold(make: Callable[..., Optimizer]) -> None:
    model = Quadratic()
    optimizer = warmed(model, lambda model: make(model.parameters()), steps=300)
    assert_diverges_at_the_threshold(model, [optimizer])


@pytest.mark.parametrize("make", [of(TORCH.Adafactor, lr=0.01), of(Adafactor, lr=None)])
def test_the_step_of_adafactor_scales_with_the_parameters(make: Callable[..., Optimizer]) -> None:
    model = Quadratic(offset=3.0)
    optimizer = warmed(model, lambda model: make(model.parameters()), steps=300)
    assert_diverges_at_the_threshold(model, [optimizer])


# The diagonal of Adam


def diagonal_of(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    diagonal = hf.stability(optimizer, model).preconditioner
    assert diagonal is not None
    return diagonal  # type: ignore[return-value]


def trained(steps: int, optimizer: Any, **options: Any) -> tuple[Case, torch.optim.Optimizer]:
    """A net after some steps."""
    found = case("mlp")
    parameters = found.model.parameters()
    made = optimizer(parameters, lr=0.01, **options)
    for _ in range(steps):
        made.zero_grad()
        found.loss(dict(found.model.named_parameters()), found.batch).backward()
        made.step()
    return found, made


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8), (0.0, 0.9)])
def test_the_diagonal_is_that_of_a_state_by_hand(steps: int, betas: tuple[float, float]) -> None:
    found = case("mlp")
    made = torch.optim.Adam(found.model.parameters(), lr=0.01, betas=betas, eps=1e-3)
    second = {name: torch.zeros_like(p) for name, p in found.model.named_parameters()}
    for _ in range(steps):
        made.zero_grad()
        found.loss(dict(found.model.named_parameters()), found.batch).backward()
        for name, p in found.model.named_parameters():
            second[name] = betas[1] * second[name] + (1 - betas[1]) * p.grad.square()  # type: ignore[union-attr]
        made.step()
    diagonal = diagonal_of(made, found.model)
    assert list(diagonal) == list(found.params)
    for name, v in second.items():
        root = (v / (1 - betas[1] ** steps)).sqrt() + 1e-3
        torch.testing.assert_close(diagonal[name], (1 - betas[0] ** steps) * root)
        assert not diagonal[name].requires_grad


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-2}),
    ],
    ids=["Adam", "amsgrad", "AdamW"],
)
def test_a_step_is_the_first_moment_over_the_diagonal(optimizer: Any, options: Any) -> None:
    found, made = trained(5, optimizer, **options)
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    made.zero_grad()
    # Another batch: with the gradients falling, the maximum of amsgrad is no longer the average.
    loss = 0.1 * found.loss(dict(found.model.named_parameters()), found.batch)
    loss.backward()
    made.step()
    diagonal = diagonal_of(made, found.model)
    for name, p in found.model.named_parameters():
        step = 0.01 * made.state[p]["exp_avg"] / diagonal[name]
        torch.testing.assert_close(before[name] - p.detach(), step, rtol=1e-9, atol=1e-14)


def test_each_group_has_its_own_options() -> None:
    found = case("mlp")
    first, last = found.model[0], found.model[2]  # type: ignore[index]
    made = torch.optim.Adam(
        [{"params": last.parameters(), "eps": 10.0}, {"params": first.parameters(), "eps": 1.0}]
    )
    found.loss(dict(found.model.named_parameters()), found.batch).backward()
    made.step()
    diagonal = diagonal_of(made, found.model)
    for name, eps in (("0.weight", 1.0), ("2.weight", 10.0)):
        g = found.model.get_parameter(name).grad
        assert g is not None
        torch.testing.assert_close(diagonal[name], 0.1 * (g.abs() + eps))


def test_frozen_parameters_need_no_state() -> None:
    found = case("frozen")
    made = torch.optim.Adam(p for p in found.model.parameters() if p.requires_grad)
    found.loss(dict(found.model.named_parameters()), found.batch).backward()
    made.step()
    assert list(diagonal_of(made, found.model)) == list(found.params)


def test_an_optimiser_without_a_step_is_refused() -> None:
    found, made = trained(0, torch.optim.Adam)
    with pytest.raises(ValueError, match="Adam has no state of '0.weight', which it has before"):
        diagonal_of(made, found.model)


def test_an_optimiser_of_another_model_is_refused() -> None:
    _, made = trained(1, torch.optim.Adam)
    with pytest.raises(ValueError, match="does not train 'weight'"):
        diagonal_of(made, nn.Linear(3, 2))


def test_preconditioned_eigenvalues_are_those_of_the_curvature_over_the_diagonal() -> None:
    found, made = trained(3, torch.optim.Adam)
    diagonal = diagonal_of(made, found.model)
    matvec = hf.matvecs.precondition(hf.hvp(found.loss)(found.params, found.batch), diagonal)
    P = hf.ravel(diagonal)
    A = hessian(found.loss, found.params, found.batch)
    dense = matrix(matvec, found.params)
    assert relative_error(dense, A / P.sqrt().outer(P.sqrt())) < 1e-10
    expected = torch.linalg.eigvals(A / P[:, None]).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh((dense + dense.mT) / 2), expected)
    top = hf.lanczos(matvec, found.params, k=1, which="LA", seed=0)
    assert float(top.values[0]) == pytest.approx(float(expected[-1]), rel=1e-3)
