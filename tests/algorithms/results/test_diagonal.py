"""Bounds of a whole diagonal, and parts of it."""

from __future__ import annotations

import torch

import hessfunc as hf
from tests.reference.spectra import symmetric


def test_a_saved_diagonal_is_the_same(tmp_path: object) -> None:
    matvec, like = hf.dense(symmetric(torch.linspace(1, 3, 40))), torch.zeros(40).double()
    found = hf.xdiag(matvec, like, max_matvecs=20, seed=0)
    found.save(tmp_path / "diagonal.npz")
    loaded = hf.load(tmp_path / "diagonal.npz")
    torch.testing.assert_close(hf.ravel(loaded.value), hf.ravel(found.value), rtol=0, atol=0)
    assert loaded.squared_row_norms.degrees == found.squared_row_norms.degrees


N = 80
MATRIX = symmetric(torch.linspace(-1, 4, N))
LIKE = {"a": torch.zeros(3, 10).double(), "b": torch.zeros(N - 30).double()}


def test_the_bound_of_the_whole_diagonals_error_holds_and_is_tight() -> None:
    ratios = []
    for seed in range(200):
        found = hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, max_matvecs=30, seed=seed)
        error = (hf.ravel(found.value) - MATRIX.diagonal()).norm() / hf.ravel(found.value).norm()
        ratios.append(found.relative_error() / float(error))
    assert sum(ratio >= 1 for ratio in ratios) / len(ratios) > 0.92
    assert sorted(ratios)[100] < 1.25
