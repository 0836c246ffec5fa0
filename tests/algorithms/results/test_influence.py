"""Results of influence: order of examples, bounds and displays."""

from __future__ import annotations

import pytest
import torch

from hessfunc.algorithms.results import Influence, SelfInfluence

COST = {"matvecs": 3, "passes": 1, "reason": "converged", "seed": None}
D = torch.float64
PAIRS = Influence(
    scores=torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -1.0]], dtype=D),
    damping=0.5,
    residuals=torch.tensor([0.1, 0.0], dtype=D),
    solved=torch.tensor([True, False]),
    query_norms=torch.tensor([2.0, 0.0], dtype=D),
    train_norms=torch.tensor([1.0, 2.0, 3.0], dtype=D),
    by_leaf=None,
    **COST,
)
OWN = SelfInfluence(
    scores=torch.tensor([1.0, 3.0, 2.0], dtype=D),
    damping=0.5,
    residuals=torch.tensor([0.1, 0.0, 0.2], dtype=D),
    solved=torch.tensor([True, True, True]),
    norms=torch.tensor([1.0, 2.0, 3.0], dtype=D),
    **COST,
)


def test_top_and_bottom_are_ordered() -> None:
    indices, values = PAIRS.top(2)
    assert indices.tolist() == [[2, 0], [1, 0]]
    assert values.tolist() == [[3.0, 1.0], [5.0, 0.0]]
    assert PAIRS.bottom(1)[0].tolist() == [[1], [2]]
    assert OWN.top(2)[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="from 1 to 3"):
        PAIRS.top(4)


def test_bounds_follow_from_residuals() -> None:
    expected = torch.tensor([[0.2, 0.4, 0.6], [0.0, 0.0, 0.0]], dtype=D)
    torch.testing.assert_close(PAIRS.error_bounds, expected)
    torch.testing.assert_close(OWN.error_bounds, torch.tensor([0.2, 0.0, 1.2], dtype=D))
    assert PAIRS.relative_residuals.tolist() == [0.05, 0.0]
    assert not PAIRS.converged
    assert OWN.converged


def test_displays_have_the_numbers() -> None:
    assert "shape=(2, 3)" in repr(PAIRS)
    assert "converged=1 of 2" in repr(PAIRS)
    assert "largest=3" in repr(OWN)
    table = PAIRS._columns()
    assert list(table["query"]) == [0, 0, 0, 1, 1, 1]
    assert list(table["example"]) == [0, 1, 2, 0, 1, 2]
    assert list(OWN._columns()["score"]) == [1.0, 3.0, 2.0]
