from __future__ import annotations

import torch

import hessfunc as hf
from hessfunc.algorithms.results import MatrixFunction


def test_the_headline_counts_the_vectors_within_their_tolerances() -> None:
    found = MatrixFunction(
        value=torch.zeros(2, 3),
        bounds=torch.tensor([[0.0, 0.25], [0.1, 0.5]]).double(),
        solved=torch.tensor([True, False]),
        steps=(2, 3),
        reasons=("converged", "budget exhausted"),
        matvecs=5,
        passes=3,
        reason="1 of 2",
        seed=None,
    )
    assert found.error == 0.5
    assert found.errors.tolist() == [0.25, 0.5]
    assert not found.converged
    assert "errors=[0.25, 0.5], converged=1 of 2" in repr(found)


def test_one_vector_shows_its_error() -> None:
    found = hf.function(lambda block: 2 * block, torch.exp, torch.ones(4).double())
    assert found.converged
    assert repr(found).startswith("MatrixFunction(error=")
