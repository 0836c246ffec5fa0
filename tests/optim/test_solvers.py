"""Solvers of the Newton equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.optim.newton import newton
from hessfunc.optim.solvers import conjugate_gradients, direct
from tests.optim.problem import Dense, once
from tests.reference.spectra import positive_definite

EXACT = conjugate_gradients(rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.9])
def test_direct_and_conjugate_gradients_agree(alpha: float) -> None:
    params = {"w": torch.randn(2, 3).double(), "c": torch.randn(()).double()}
    gradients = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    blocks = {"w": Dense(positive_definite(6)), "c": Dense(positive_definite(1))}
    found = [
        once(newton(lr=0.5, alpha=alpha, solve=solve), gradients, params, blocks)
        for solve in (EXACT, direct())
    ]
    for name in params:
        torch.testing.assert_close(found[0][0][name], found[1][0][name])
    assert found[0][1].matvecs > 0
    assert found[1][1].matvecs == 0
    assert found[0][0]["c"].shape == ()


def test_negative_curvature_at_once_is_a_gradient_step() -> None:
    params, gradients = {"x": torch.ones(2)}, {"x": torch.tensor([1.0, 2.0])}
    moved, state = once(newton(lr=0.1, alpha=0.1), gradients, params, {"x": lambda v: -v})
    torch.testing.assert_close(moved["x"], torch.tensor([0.9, 0.8]))
    assert state.negative_curvature == ("x",)
    assert state.unconverged == ("x",)


def test_later_negative_curvature_leaves_the_last_iterate() -> None:
    # The gradient has positive curvature, and the second direction has not.
    diagonal = torch.tensor([10.0, -0.1]).double()
    g = torch.tensor([1.0, 0.5]).double()
    params = {"x": torch.zeros(2).double()}
    moved, state = once(newton(lr=1.0, alpha=0.0), {"x": g}, params, {"x": lambda v: diagonal * v})
    step = float(g @ g / (g @ (diagonal * g)))
    torch.testing.assert_close(moved["x"], -step * g)
    assert state.negative_curvature == ("x",)


def test_a_budget_without_a_step_is_a_gradient_step() -> None:
    params, gradients = {"x": torch.ones(2)}, {"x": torch.tensor([1.0, 2.0])}
    method = newton(lr=0.1, alpha=0.1, solve=conjugate_gradients(max_matvecs=1))
    moved, state = once(method, gradients, params, {"x": lambda v: 2 * v})
    torch.testing.assert_close(moved["x"], torch.tensor([0.9, 0.8]))
    assert state.unconverged == ("x",)
    assert state.negative_curvature == ()


def test_direct_needs_an_inverse_that_exists() -> None:
    params = {"x": torch.ones(2)}
    with pytest.raises(TypeError, match="a function has no inverse_matvec: use blocks with"):
        once(newton(solve=direct()), params, params, {"x": lambda v: v})

    class Singular:
        def inverse_matvec(self, vectors: Tensor, damping: float) -> Tensor:
            return vectors / damping

    with pytest.raises(ValueError, match="singular, increase alpha from 0.0"):
        once(newton(alpha=0.0, solve=direct()), params, params, {"x": Singular()})


@pytest.mark.parametrize("options", [{"rtol": -1.0}, {"atol": -1.0}, {"max_matvecs": 0}])
def test_tolerances_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        conjugate_gradients(**options)
