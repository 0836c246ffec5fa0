"""Landscapes as results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import hessfunc as hf


def test_a_landscape_is_loaded_by_a_program_that_made_none(tmp_path: Path) -> None:
    def loss(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return params["x"].square().sum() * batch.mean()

    params = {"x": torch.ones(3)}
    made = hf.landscape(loss, params, [torch.ones(2)], {"x": torch.eye(3)[0]}, points=3)
    made.save(tmp_path / "line.npz")
    code = f"import hessfunc; print(hessfunc.load({str(tmp_path / 'line.npz')!r}).values.tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == made.values.tolist()


def test_losses_that_are_not_finite_are_left_out_of_the_headline() -> None:
    values = torch.tensor([2.0, torch.nan, torch.inf, 3.5], dtype=torch.float64)
    found = hf.results.Landscape(
        values=values,
        x=torch.linspace(-1, 1, 4, dtype=torch.float64),
        y=None,
        lengths=torch.ones(1, dtype=torch.float64),
        normalise=None,
        evaluations=4,
        matvecs=0,
        passes=0,
        reason="complete",
        seed=None,
    )
    assert "[2, 3.5]" in repr(found)
    assert "[]" in repr(replace(found, values=torch.full((4,), torch.nan).double()))
