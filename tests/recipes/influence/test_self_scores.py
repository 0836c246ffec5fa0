"""Scores of training examples for themselves, against pairwise scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hessfunc as hf
from tests.recipes.influence.problem import (
    DAMPING,
    LOSS,
    MODEL,
    PARAMS,
    TRAIN,
    X,
    Y,
    gauss_newton,
    gradients,
    scores,
)


@pytest.mark.parametrize("examples_per_chunk", [None, 1, 5])
def test_scores_are_the_diagonal_of_the_dense_formula(examples_per_chunk: int | None) -> None:
    found = hf.self_influence(
        LOSS, PARAMS, TRAIN, damping=DAMPING, rtol=1e-11, examples_per_chunk=examples_per_chunk
    )
    rows = gradients(X, Y)
    torch.testing.assert_close(
        found.scores, scores(gauss_newton(), rows, rows).diagonal(), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    assert found.converged
    assert len(found.residuals) == len(X)


def test_kronecker_factors_take_no_iterations(tmp_path: Path) -> None:
    curvature = hf.kronecker.ekfac(LOSS, MODEL)
    found = hf.self_influence(LOSS, PARAMS, TRAIN, damping=DAMPING, curvature=curvature)
    pairs = hf.influence(LOSS, PARAMS, TRAIN, TRAIN, damping=DAMPING, curvature=curvature)
    torch.testing.assert_close(found.scores, pairs.scores.diagonal(), rtol=1e-10, atol=0.0)
    assert found.matvecs == len(X)
    found.save(tmp_path / "own.npz")
    assert torch.equal(hf.load(tmp_path / "own.npz").scores, found.scores)


def test_a_set_without_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training example"):
        hf.self_influence(LOSS, PARAMS, [], damping=DAMPING, curvature=lambda block: block)
