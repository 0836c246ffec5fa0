"""Overlaps as a result."""

from __future__ import annotations

from pathlib import Path

import torch

import hessfunc as hf
from hessfunc.algorithms.results import Overlap

MADE = hf.overlap([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])], torch.tensor([0.0, 3.0]))


def test_the_summary_has_the_angles() -> None:
    assert "shape=(2, 1)" in repr(MADE)
    assert "angles=[" in repr(MADE)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    MADE.save(tmp_path / "overlap.npz")
    loaded = hf.load(tmp_path / "overlap.npz")
    assert isinstance(loaded, Overlap)
    torch.testing.assert_close(loaded.cosines, MADE.cosines)
