"""Solutions of linear systems."""

from __future__ import annotations

from typing import Any

import torch

import hessfunc as hf
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve.cg import cg
from tests.reference.spectra import symmetric

SPECTRUM = torch.logspace(-2, 1, 80).double()
MATRIX = symmetric(SPECTRUM)
B = torch.randn(80, generator=torch.Generator().manual_seed(1)).double()


def test_is_saved_and_loaded(tmp_path: Any) -> None:
    found = cg(hf.dense(-MATRIX), {"w": B})
    found.save(tmp_path / "solution.npz")
    loaded = hf.load(tmp_path / "solution.npz")
    assert isinstance(loaded, Solution)
    assert loaded.reason == found.reason
    assert torch.equal(loaded.negative_curvature["w"], found.negative_curvature["w"])
