"""Stability limits of optimisers, and the preconditioner of Adam."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from bench.edge_of_stability import descend
from hessfunc.tracking import stability
from hessfunc.tracking.stability import adam_stability, edges
from tests.cases import Case, case
from tests.reference import hessian, matrix, relative_error


def test_momentum_raises_the_line() -> None:
    assert stability(0.1) == pytest.approx(20)
    assert stability(0.1, momentum=0.9) == pytest.approx(38)
    assert adam_stability(1e-3) == pytest.approx(38e3)
    for rate in (stability, adam_stability):
        with pytest.raises(ValueError, match="must be positive"):
            rate(0.0)
    with pytest.raises(ValueError, match="beta_1=1"):
        adam_stability(0.1, beta_1=1)


def grows(curvature: float, make: Callable[..., torch.optim.Optimizer]) -> bool:
    """Whether steps on ``curvature x^2 / 2`` grow, in the long run."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([x])
    for _ in range(600):
        x.grad = curvature * x.detach()
        optimizer.step()
    return float(x.detach().abs()) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
        {"momentum": 0.9, "weight_decay": 3.0},
        {"dampening": 0.3},
    ],
    ids=str,
)
def test_the_edge_of_sgd_is_where_its_steps_begin_to_grow(options: dict[str, Any]) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, **options)

    edge, of_adam = edges(make([torch.nn.Parameter(torch.ones(1))]))
    assert edge is not None
    assert of_adam is None
    assert grows(1.02 * edge, make)
    assert not grows(0.98 * edge, make)


def test_the_edge_is_not_known_of_other_optimisers_and_of_groups_that_differ() -> None:
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    assert edges(None) == (None, None)
    assert edges(torch.optim.RMSprop([x], lr=0.1)) == (None, None)
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}]
    assert edges(torch.optim.SGD(groups)) == (None, None)
    assert edges(torch.optim.SGD([x], lr=0.1), lr=0.0) == (None, None)
    assert edges(torch.optim.SGD([x], lr=0.1), lr=0.5) == (pytest.approx(4), None)
    assert edges(torch.optim.AdamW([x], lr=1e-3)) == (None, pytest.approx(38e3))
    assert edges(torch.optim.Adam([x], lr=1e-3, weight_decay=0.1)) == (None, None)
    assert edges(torch.optim.Adam([x], lr=0.1, betas=(0.0, 0.9))) == (None, pytest.approx(20))


LR = 0.1


@pytest.mark.slow
def test_sharpness_rises_to_the_edge_of_stability_and_hovers_there() -> None:
    points = descend(LR, steps=1500, every=10)
    sharpness = [point.top[0] / stability(LR) for point in points]
    assert sharpness[0] < 0.7
    reached = next((i for i, value in enumerate(sharpness) if value >= 0.9), None)
    assert reached is not None
    assert all(0.7 < value < 1.3 for value in sharpness[reached:])
    assert mean(sharpness[-50:]) == pytest.approx(1, abs=0.1)
    # Training goes on all the same.
    assert points[-1].loss < 0.6 * points[reached].loss
    # Cold starts take 11.
    assert mean(point.matvecs for point in points[1:]) < 4


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
    diagonal = hf.tracking.adam_diagonal(made, found.model)
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
    diagonal = hf.tracking.adam_diagonal(made, found.model)
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
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    for name, eps in (("0.weight", 1.0), ("2.weight", 10.0)):
        g = found.model.get_parameter(name).grad
        assert g is not None
        torch.testing.assert_close(diagonal[name], 0.1 * (g.abs() + eps))


def test_frozen_parameters_need_no_state() -> None:
    found = case("frozen")
    made = torch.optim.Adam(p for p in found.model.parameters() if p.requires_grad)
    found.loss(dict(found.model.named_parameters()), found.batch).backward()
    made.step()
    assert list(hf.tracking.adam_diagonal(made, found.model)) == list(found.params)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam]
)
def test_another_optimiser_is_refused(optimizer: Any) -> None:
    found, made = trained(2, optimizer)
    with pytest.raises(TypeError, match="pass an Adam or AdamW"):
        hf.tracking.adam_diagonal(made, found.model)


def test_an_optimiser_without_a_step_is_refused() -> None:
    found, made = trained(0, torch.optim.Adam)
    with pytest.raises(ValueError, match="has no second moment of '0.weight': pass an Adam"):
        hf.tracking.adam_diagonal(made, found.model)


def test_an_optimiser_of_another_model_is_refused() -> None:
    _, made = trained(1, torch.optim.Adam)
    with pytest.raises(ValueError, match="no second moment"):
        hf.tracking.adam_diagonal(made, nn.Linear(3, 2))


def test_preconditioned_eigenvalues_are_those_of_the_curvature_over_the_diagonal() -> None:
    found, made = trained(3, torch.optim.Adam)
    diagonal = hf.tracking.adam_diagonal(made, found.model)
    matvec = hf.matvecs.precondition(hf.hvp(found.loss)(found.params, found.batch), diagonal)
    P = hf.ravel(diagonal)
    A = hessian(found.loss, found.params, found.batch)
    dense = matrix(matvec, found.params)
    assert relative_error(dense, A / P.sqrt().outer(P.sqrt())) < 1e-10
    expected = torch.linalg.eigvals(A / P[:, None]).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh((dense + dense.mT) / 2), expected)
    top = hf.lanczos(matvec, found.params, k=1, which="LA", seed=0)
    assert float(top.values[0]) == pytest.approx(float(expected[-1]), rel=1e-3)
