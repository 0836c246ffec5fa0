from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hessfunc.optim.stability.recurrence import Recurrence, heavy_ball
from hessfunc.optim.stability.steps import Source, Step, decayed, decoupled


def source(group: dict[str, Any], state: dict[str, Any] | None = None, **of_all: Any) -> Source:
    optimizer = SimpleNamespace(**of_all)
    return Source("w", torch.ones(2), {"lr": 0.1} | group, state or {}, optimizer)


def test_decay_is_a_factor_of_the_parameter_or_a_part_of_the_gradient() -> None:
    step = Step(lr=0.1, recurrence=heavy_ball(0.9))
    assert decoupled(step, 2.0).recurrence.rho == pytest.approx(0.8)
    group = source({"weight_decay": torch.tensor(0.5)})
    assert decayed(group, step, is_decoupled=True).recurrence.rho == pytest.approx(0.95)
    coupled = decayed(group, step, is_decoupled=False)
    assert coupled.weight_decay == 0.5
    assert coupled.recurrence == step.recurrence


def test_options_may_be_tensors() -> None:
    options = {"lr": torch.tensor(0.5), "betas": (torch.tensor(0.25), 0.75)}
    found = source(options)
    assert found.lr == 0.5
    assert found.betas == (0.25, 0.75)


def test_a_moment_has_no_gradient_and_exists_from_the_first_step_on() -> None:
    moment = torch.ones(2, requires_grad=True)
    found = source({}, {"m": moment}).moment("m")
    assert not found.requires_grad
    with pytest.raises(ValueError, match="has no state of 'w'"):
        source({}).moment("m")


def test_an_option_without_a_limit_is_refused_in_the_group_and_in_the_optimiser() -> None:
    source({"cautious": False}, other=True).refuse("cautious")
    for found in (source({"cautious": True}), source({}, cautious=True)):
        with pytest.raises(ValueError, match="with cautious=True has no stability limit"):
            found.refuse("cautious")


def test_a_step_is_plain_by_default() -> None:
    step = Step(lr=0.1, recurrence=Recurrence())
    assert step.preconditioner is step.norm is step.momentum is None
