"""Seeds of runs, and start vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.starts import drawn_seed, lengths_of, unit_start
from hessfunc.spaces.of import space_of

LIKE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
SPACE = space_of(LIKE)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert drawn_seed(SPACE, 7) == 7
    seeds = {drawn_seed(SPACE, None) for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_start_is_scaled_to_unit_length() -> None:
    start = {"a": torch.ones(2, 3), "b": 2 * torch.ones(4)}
    row = unit_start(SPACE, start, seed=0)
    torch.testing.assert_close(row, hf.ravel(start)[None] / 22**0.5)


def test_a_random_start_is_a_function_of_the_seed_and_no_probe() -> None:
    row = unit_start(SPACE, None, seed=3)
    assert float(row.norm()) == pytest.approx(1)
    assert torch.equal(row, unit_start(SPACE, None, seed=3))
    assert not torch.allclose(row, unit_start(SPACE, None, seed=4))
    probe = SPACE.probes([0], kind="normal", seed=3)
    assert abs(float(row @ probe.T) / float(probe.norm())) < 0.999


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, "a vector of zeros"),
        ({"a": torch.zeros(2, 3), "b": torch.full((4,), torch.nan)}, "NaN or infinite"),
        ({"a": torch.zeros(2, 3), "b": torch.full((4,), 3e38)}, "above the range of torch.float32"),
        ({"a": torch.zeros(2, 2, 3), "b": torch.zeros(2, 4)}, "start is a block of 2 vectors"),
    ],
)
def test_what_has_no_direction_is_refused(start: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_start(SPACE, start, seed=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "start has entries that are NaN or infinite"),
        (0.0, "start has a vector of zeros"),
    ],
)
def test_given_vectors_without_a_direction_are_refused(value: float, message: str) -> None:
    rows = torch.ones(2, 10)
    torch.testing.assert_close(lengths_of(SPACE, rows).double(), torch.full((2,), 10**0.5).double())
    rows[1] = value
    with pytest.raises(ValueError, match=message):
        lengths_of(SPACE, rows)


@pytest.mark.parametrize("solve", [hf.lanczos, hf.power_iteration])
def test_a_start_that_requires_a_gradient_gives_values_without_one(solve: Any) -> None:
    spectrum = torch.arange(1.0, 9.0, dtype=torch.float64)
    start = torch.ones(8, dtype=torch.float64, requires_grad=True)
    found = solve(lambda v: v * spectrum, spectrum, k=1, start=start, seed=0)
    assert not found.values.requires_grad
    assert not found.vectors.requires_grad
    assert float(found.values[0]) == pytest.approx(8.0, rel=1e-2)
