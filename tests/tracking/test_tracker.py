from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.tracking import Point, tracked
from tests.reference import hessian
from tests.tracking.problem import Noisy, batches, problem, wide


def test_curvature_is_that_of_eval_mode_by_default() -> None:
    model = Noisy().double()
    data = wide(batches(1))
    model(data[0][0])
    with tracked(model, F.cross_entropy, data, rtol=1e-8) as tracker:
        found = tracker.measure()
    model.eval()
    model_fn, params = hf.functional(model)
    H = hessian(hf.supervised(model_fn, F.cross_entropy), params, data[0])
    assert found.top[0] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-8)


def test_steps_are_counted_or_told() -> None:
    _, _, model = problem()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    seen: list[Point] = []
    with tracked(
        model,
        F.cross_entropy,
        wide(batches(1)),
        every=3,
        optimizer=optimizer,
        callback=seen.append,
        steps=4,
    ) as tracker:
        assert tracker.step() is None
        assert tracker.step(epoch=0.5) is seen[0]
        assert tracker.step(9, lr=0.1) is seen[1]
        tracker.measure(epoch=1)
    assert [(p.step, p.epoch, p.lr) for p in seen] == [(6, 0.5, 0.5), (9, None, 0.1), (9, 1, 0.5)]
    assert tracker.points == seen


def test_any_batch_by_a_composed_loss() -> None:
    _, _, model = problem()
    ((inputs, targets),) = wide(batches(1))
    with tracked(
        model,
        lambda outputs, batch: F.cross_entropy(outputs, targets),
        [(inputs,)],
        compose=lambda model_fn, criterion: hf.composed(
            lambda params, batch: model_fn(params, batch[0]), criterion
        ),
        curvature=hf.hvp,
    ) as tracker:
        assert len(tracker.measure().top) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"top": -1}, "top=-1"),
        ({"top": 10**6, "max_matvecs": 10**7}, "eigenvalues"),
        ({"trace_probes": 1}, "trace_probes=1"),
        ({"max_matvecs": 2}, "max_matvecs=2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ValueError, match=message),
        tracked(Noisy(), F.cross_entropy, batches(1), **options),
    ):
        pass


@pytest.mark.parametrize(
    "make", [lambda model: None, lambda model: torch.optim.SGD(model.parameters(), 0.1)]
)
def test_only_an_adam_preconditions(make: Callable[[nn.Module], Any]) -> None:
    model = Noisy()
    with (
        pytest.raises(TypeError, match="needs an Adam or AdamW optimiser"),
        tracked(model, F.cross_entropy, [], optimizer=make(model), preconditioned=True),
    ):
        pass


def test_steps_that_are_told_in_jumps_or_twice() -> None:
    _, _, model = problem()
    with tracked(model, F.cross_entropy, wide(batches(1)), every=10) as tracker:
        for step in (3, 10, 10, 17, 24, 31, 38, 38, 45):
            tracker.step(step)
    assert [point.step for point in tracker.points] == [10, 24, 31, 45]
