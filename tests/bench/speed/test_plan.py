from __future__ import annotations

import pytest

from bench.speed.models import MODELS
from bench.speed.plan import FAST, PLAN, within
from bench.speed.targets import TARGETS


def test_every_target_is_planned() -> None:
    missing = {f"{t.question}/{net}" for t in TARGETS for net in t.nets} - set(PLAN)
    assert not missing


def test_every_net_that_is_planned_is_there() -> None:
    nets = {name.split("/")[1] for name in PLAN if not name.startswith("scaling/")}
    assert nets <= set(MODELS)
    assert set(FAST) <= set(PLAN)


@pytest.mark.parametrize(
    ("took", "chosen"),
    [
        ({}, ["product/mlp-small", "block/mlp-small"]),
        ({"product/mlp-small": 80.0}, ["block/mlp-small"]),
    ],
)
def test_a_cell_that_would_take_too_long_is_left_out(
    took: dict[str, float], chosen: list[str]
) -> None:
    names = ["product/mlp-small", "eigenpairs/resnet20-trained", "block/mlp-small"]
    assert list(within(1.0, names, took.get, lambda: 0.0)) == chosen


def test_time_that_is_spent_is_gone() -> None:
    clock = iter([0.0, 0.0, 59.0])
    names = ["product/mlp-small", "block/mlp-small"]
    assert list(within(1.0, names, {}.get, lambda: next(clock))) == ["product/mlp-small"]
