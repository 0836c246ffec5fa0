from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.optim.newton import NewtonState, newton
from hessfunc.optim.solvers import conjugate_gradients, direct
from hessfunc.transforms.exact_blocks import exact_blocks
from tests.optim.problem import CURVATURES, Dense, once, problem
from tests.reference.spectra import positive_definite

EXACT = conjugate_gradients(rtol=1e-12, atol=0)


@pytest.mark.parametrize("solve", [EXACT, direct()])
def test_one_step_by_hand(solve: Any) -> None:
    params = {"x": torch.zeros(2, dtype=torch.float64)}
    gradients = {"x": torch.tensor([-1.0, -2.0], dtype=torch.float64)}
    block = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64))
    moved, state = once(newton(lr=1.0, alpha=0.0, solve=solve), gradients, params, {"x": block})
    torch.testing.assert_close(moved["x"], torch.tensor([1 / 11, 7 / 11], dtype=torch.float64))
    assert state.step == 1
    assert state.unconverged == state.negative_curvature == ()


def test_a_quadratic_of_one_block_is_solved_in_one_step() -> None:
    A = positive_definite(6)

    def loss(params: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        x = params["x"].flatten() - batch
        return x @ A @ x / 2

    minimum = torch.arange(6.0).double()
    params = {"x": torch.zeros(2, 3).double()}
    gradients = torch.func.grad(loss)(params, minimum)
    method = newton(lr=1.0, alpha=0.0, solve=EXACT)
    moved, _ = once(method, gradients, params, exact_blocks(hf.hvp, loss)(params, minimum))
    torch.testing.assert_close(moved["x"].flatten(), minimum)


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
def test_a_step_solves_the_equation_of_each_tensor(curvature: Any) -> None:
    loss, params, batch = problem()
    gradients = torch.func.grad(loss)(params, batch)
    blocks = exact_blocks(curvature, loss)(params, batch)
    alpha, lr = 0.3, 0.5
    moved, state = once(newton(lr=lr, alpha=alpha, solve=EXACT), gradients, params, blocks)
    # A tensor of one entry is among them.
    assert params["3.bias"].shape == (1,)
    for name, leaf in params.items():
        d = (moved[name] - leaf) / lr
        image = (1 - alpha) * blocks[name](d[None])[0] + alpha * d
        if name not in state.negative_curvature:
            torch.testing.assert_close(image, -gradients[name], rtol=1e-6, atol=1e-8)
    assert state.matvecs > 0


@pytest.mark.parametrize("make", [hf.kronecker.kflr, partial(hf.kronecker.hbp, residual="abs")])
def test_blocks_with_factors_by_both_solvers(make: Any) -> None:
    model = mlp([4, 5, 3], nn.Sigmoid).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = torch.randn(7, 4).double(), torch.randint(3, (7,))
    gradients = torch.func.grad(loss)(params, batch)
    blocks = make(loss, model)(params, batch)
    alpha = 0.1
    for solve in (EXACT, direct()):
        moved, _ = once(newton(lr=1.0, alpha=alpha, solve=solve), gradients, params, blocks)
        for name, leaf in params.items():
            damped = (1 - alpha) * blocks[name].dense() + alpha * torch.eye(leaf.numel())
            expected = leaf.flatten() - torch.linalg.solve(damped, gradients[name].flatten())
            torch.testing.assert_close(moved[name].flatten(), expected)


@pytest.mark.parametrize("solve", [EXACT, direct()])
def test_alpha_one_is_gradient_descent_at_no_product(solve: Any) -> None:
    params, gradients = {"x": torch.ones(2)}, {"x": torch.tensor([1.0, 2.0])}
    moved, state = once(newton(lr=0.1, alpha=1.0, solve=solve), gradients, params, {"x": None})
    torch.testing.assert_close(moved["x"], torch.tensor([0.9, 0.8]))
    assert state.matvecs == 0


def test_a_matvec_alone_is_a_block() -> None:
    params, gradients = {"x": torch.ones(2)}, {"x": torch.tensor([1.0, 2.0])}
    moved, _ = once(
        newton(lr=1.0, alpha=0.5, solve=EXACT), gradients, params, {"x": lambda v: 3 * v}
    )
    torch.testing.assert_close(moved["x"], torch.tensor([0.5, 0.0]))


def test_a_zero_gradient_leaves_the_parameter() -> None:
    params = {"x": torch.ones(2)}
    moved, state = once(newton(), {"x": torch.zeros(2)}, params, {"x": lambda v: v})
    assert torch.equal(moved["x"], params["x"])
    assert state.matvecs == 0


def test_inputs_are_never_changed_and_the_state_adds_up() -> None:
    params = {"x": torch.ones(2), "y": torch.ones(())}
    gradients = {"x": torch.tensor([1.0, 2.0]), "y": torch.ones(())}
    before = [leaf.clone() for leaf in (*params.values(), *gradients.values())]
    method = newton(lr=0.1, alpha=0.5)
    matvecs = {"x": lambda v: 2 * v, "y": lambda v: v, "z": lambda v: v}
    state = method.init(params)
    moved, first = method.update(gradients, state, params, matvecs)
    _, second = method.update(gradients, first, moved, matvecs)
    assert state == NewtonState()
    assert (first.step, second.step) == (1, 2)
    assert second.matvecs == 2 * first.matvecs
    assert list(moved) == ["x", "y"]
    after = [*params.values(), *gradients.values()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1: the learning rate must be finite and not negative"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": math.nan}, "lr=nan"),
        ({"alpha": -0.1}, r"alpha=-0.1: alpha must be in \[0, 1\]"),
        ({"alpha": 1.1}, "alpha=1.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton(**options)


def test_missing_names_are_named() -> None:
    params = {"x": torch.ones(2), "y": torch.ones(2)}
    with pytest.raises(KeyError, match="no gradient for the parameters y"):
        once(newton(), {"x": torch.ones(2)}, params, {})
    with pytest.raises(KeyError, match="no matvec for the parameters x, y"):
        once(newton(), params, params, {"z": lambda v: v})


def test_bad_gradients_are_refused() -> None:
    params, matvecs = {"x": torch.ones(2)}, {"x": lambda v: v}
    with pytest.raises(ValueError, match="gradient of 'x' has entries that are NaN or infinite"):
        once(newton(), {"x": torch.tensor([1.0, math.nan])}, params, matvecs)
    with pytest.raises(ValueError, match=r"has shape \(1,\), but the parameter has shape \(2,\)"):
        once(newton(), {"x": torch.ones(1)}, params, matvecs)


def trained(max_blocks: int | None, steps: int) -> list[float]:
    """The losses of a perceptron in training on blocks of averaged Hessians."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp([6, 8, 5, 3], nn.Sigmoid).double()
        batch = torch.randn(30, 6).double(), torch.randint(3, (30,))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    curvature = hf.kronecker.hbp(loss, model, residual="abs", max_blocks=max_blocks)
    method = newton(lr=0.5, alpha=0.02, solve=conjugate_gradients(rtol=1e-10, atol=0))
    state, losses = method.init(params), []
    for _ in range(steps):
        losses.append(float(loss(params, batch)))
        gradients = torch.func.grad(loss)(params, batch)
        params, state = method.update(gradients, state, params, curvature(params, batch))
    return losses


def test_one_block_trains_as_the_whole_layer_over_50_steps() -> None:
    whole = trained(None, 50)
    assert trained(1, 50) == pytest.approx(whole, rel=1e-8)
    assert whole[-1] < 0.5 * whole[0]
    assert abs(trained(4, 50)[-1] - whole[-1]) > 1e-6
