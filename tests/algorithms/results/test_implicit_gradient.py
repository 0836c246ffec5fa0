"""Implicit gradients as results."""

from dataclasses import replace
from pathlib import Path

import torch

import hessfunc as hf
from hessfunc.algorithms.results import ImplicitGradient

FOUND = ImplicitGradient(
    gradient={"log": torch.tensor([1.0, -2.0])},
    direct={"log": torch.zeros(2)},
    value=0.25,
    adjoint={"w": torch.ones(3)},
    residual=1e-6,
    converged=True,
    error=3e-5,
    inner_gradient=2e-7,
    outer_change=-1e-8,
    matvecs=12,
    passes=12,
    reason="converged",
    seed=None,
)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "gradient.npz")
    loaded = hf.load(tmp_path / "gradient.npz")
    assert isinstance(loaded, ImplicitGradient)
    assert torch.equal(loaded.gradient["log"], FOUND.gradient["log"])
    assert torch.equal(loaded.adjoint["w"], FOUND.adjoint["w"])
    assert (loaded.value, loaded.error, loaded.converged) == (0.25, 3e-5, True)


def test_the_headline_has_the_errors_beside_the_value() -> None:
    shown = repr(FOUND)
    for number in ("0.25", "3e-05", "1e-06", "2e-07"):
        assert number in shown
    assert "inf" in repr(replace(FOUND, error=float("inf"), converged=False))
