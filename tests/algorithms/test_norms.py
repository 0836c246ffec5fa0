"""Norms of a matrix, from products with random probes."""

from __future__ import annotations

import torch

import hessfunc as hf
from tests.reference.spectra import symmetric

N = 80
MATRIX = symmetric(torch.linspace(-1, 4, N))
LIKE = {"a": torch.zeros(3, 10).double(), "b": torch.zeros(N - 30).double()}


def test_intervals_cover_entries_and_row_norms() -> None:
    rows = MATRIX.square().sum(0)
    covered, covered_rows = [], []
    for seed in range(100):
        found = hf.hutchinson_diagonal(hf.dense(MATRIX), LIKE, max_matvecs=20, seed=seed)
        low, high = map(hf.ravel, found.interval())
        covered.append((low <= MATRIX.diagonal()) & (MATRIX.diagonal() <= high))
        assert found.squared_row_norms is not None
        low, high = map(hf.ravel, found.squared_row_norms.interval())
        covered_rows.append((low <= rows) & (rows <= high))
    assert 0.93 < float(torch.stack(covered).double().mean()) < 0.97
    assert float(torch.stack(covered_rows).double().mean()) > 0.93
