"""Parts of leaves with intervals of their own."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference.spectra import symmetric

LIKE = {"a": torch.zeros(10).double(), "b": torch.zeros(50).double()}
MATRIX = symmetric(torch.linspace(-1, 4, 60))


def cubes(params: Any, batch: object) -> Tensor:
    """A loss whose Hessian is diag(6 x)."""
    return sum(leaf.pow(3).sum() for leaf in torch.utils._pytree.tree_leaves(params))


@pytest.mark.parametrize(
    ("estimator", "matrix"),
    [
        (hf.hutchinson, MATRIX),
        (hf.hutchpp, MATRIX),
        (hf.xtrace, MATRIX),
        (hf.xnystrace, symmetric(torch.linspace(0, 4, 60))),
    ],
)
def test_parts_of_leaves_sum_to_the_value_are_unbiased_and_cover(
    estimator: Any, matrix: Tensor
) -> None:
    part = float(matrix.diagonal()[:10].sum())
    parts, covered = [], 0
    for seed in range(100):
        run = estimator(hf.dense(matrix), LIKE, max_matvecs=30, seed=seed)
        assert sum(run.by_leaf.values()) == pytest.approx(run.value, rel=1e-10)
        found = run.by_leaf["a"]
        low, high = found.interval(0.95)
        assert low < found.value == float(found) < high
        covered += low <= part <= high
        parts.append(found.value)
    assert covered >= 90
    assert mean(parts) == pytest.approx(part, abs=4 * stdev(parts) / 10)


def test_a_part_is_a_frozen_number_and_is_saved_with_its_error(tmp_path: Path) -> None:
    found = hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=0)
    part = found.by_leaf["a"]
    assert isinstance(part, float)
    assert part / 2 == float(part) / 2
    with pytest.raises(AttributeError, match="frozen"):
        part.stderr = 0.0
    found.save(tmp_path / "trace.npz")
    loaded = hf.load(tmp_path / "trace.npz")
    assert loaded.by_leaf["a"].interval() == part.interval()
    assert hf.pool([loaded, hf.hutchinson(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=1)]).n == 60


@pytest.mark.parametrize(
    "params",
    [
        {"a.b": torch.ones(3).double(), "a": {"b": torch.ones(2).double()}},
        {1: torch.ones(3).double(), "1": torch.ones(2).double()},
        {"a": {"b.c": torch.ones(3).double()}, "a.b": {"c": torch.ones(2).double()}},
    ],
    ids=["dots", "number and text", "nested"],
)
def test_leaves_whose_names_coincide_stay_apart(params: Any) -> None:
    matvec = hf.hvp(cubes)(params, None)
    for estimator in (hf.hutchinson, hf.xtrace):
        found = estimator(matvec, params, seed=0)
        assert sorted(found.by_leaf.values()) == pytest.approx([12, 18])
