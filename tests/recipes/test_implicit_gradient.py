"""Implicit gradients, against closed forms, unrolled differentiation and finite differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.algorithms.results import ImplicitGradient
from hessfunc.recipes.implicit_gradient import NotStationaryWarning

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(30, 6, generator=GENERATOR).double(), torch.randn(30, generator=GENERATOR)
XV, YV = torch.randn(20, 6, generator=GENERATOR).double(), torch.randn(20, generator=GENERATOR)
Y, YV = Y.double(), YV.double()
TRAIN, VALID = [(X, Y)], [(XV, YV)]
# A penalty for each weight, in logarithms.
DECAY = {"log": torch.linspace(-2, 1, 6).double()}


def penalised(params: Any, hyperparams: Any, batch: Any) -> Tensor:
    x, y = batch
    penalty = (hyperparams["log"].exp() * params["w"].square()).sum() / 2
    return (x @ params["w"] - y).square().mean() / 2 + penalty


def validation(params: Any, hyperparams: Any, batch: Any) -> Tensor:
    x, y = batch
    return (x @ params["w"] - y).square().mean() / 2


def ridge(decay: Tensor) -> Tensor:
    """The minimum of the penalised loss: (X'X / n + diag(decay)) w = X'y / n."""
    return torch.linalg.solve(X.mT @ X / len(X) + decay.diag(), X.mT @ Y / len(X))


def of_ridge(log: Tensor) -> Tensor:
    """The validation loss at the minimum, by the closed form."""
    return (XV @ ridge(log.exp()) - YV).square().mean() / 2


RIDGE = {"w": ridge(DECAY["log"].exp())}
EXACT = torch.func.grad(of_ridge)(DECAY["log"])
of_penalties = partial(
    hf.implicit_gradient,
    validation,
    penalised,
    RIDGE,
    DECAY,
    outer_batches=VALID,
    inner_batches=TRAIN,
)


@pytest.mark.parametrize("solve", [hf.cg, hf.minres])
def test_ridge_regression_has_its_closed_form(solve: Callable[..., Any]) -> None:
    found = of_penalties(
        solve=solve,
        rtol=1e-10,
    )
    torch.testing.assert_close(found.gradient["log"], EXACT, rtol=1e-8, atol=0)
    assert found.converged
    assert found.reason.startswith("converged")
    assert found.value == pytest.approx(float(of_ridge(DECAY["log"])), rel=1e-12)
    assert found.inner_gradient < 1e-14
    # The outer loss does not see the penalties.
    assert not found.direct["log"].any()


@pytest.mark.parametrize("rtol", [0.3, 1e-1, 1e-2, 1e-3])
def test_the_error_is_that_of_a_loose_solve(rtol: float) -> None:
    found = of_penalties(rtol=rtol)
    error = float((found.gradient["log"] - EXACT).norm())
    # The gradient is corrected by what the error was estimated from.
    assert error <= 0.5 * found.error
    assert found.error < 3 * rtol * float(EXACT.norm())
    hessian = X.mT @ X / len(X) + DECAY["log"].exp().diag()
    wanted = XV.mT @ (XV @ RIDGE["w"] - YV) / len(XV)
    residual = float((wanted - hessian @ found.adjoint["w"]).norm())
    assert found.residual == pytest.approx(residual, rel=1e-6)
    assert found.residual <= 0.1 * rtol * float(wanted.norm())


def test_every_product_is_counted() -> None:
    found = of_penalties(rtol=1e-3)
    seen: list[int] = []

    def counting(matvec: Any, b: Any, **options: Any) -> Any:
        def counted(block: Any) -> Any:
            seen.append(len(block["w"]))
            return matvec(block)

        return hf.cg(counted, b, **options)

    again = of_penalties(
        rtol=1e-3,
        solve=counting,
    )
    # One product more measures the residual as a vector.
    assert again.matvecs == found.matvecs == sum(seen) + 1
    assert found.passes == found.matvecs


@pytest.mark.parametrize("sizes", [[30], [10, 20], [1, 4, 25]])
def test_batches_of_any_size_give_the_gradient_of_their_union(sizes: list[int]) -> None:
    train = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    valid = list(zip(XV.split([3, 17]), YV.split([3, 17]), strict=True))
    found = hf.implicit_gradient(
        validation, penalised, RIDGE, DECAY, outer_batches=valid, inner_batches=train, rtol=1e-10
    )
    torch.testing.assert_close(found.gradient["log"], EXACT, rtol=1e-8, atol=0)


# A net with a softmax output, a learned weight of each class and a decay


def net(params: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["a"]) @ params["b"]


def training(params: Any, hyperparams: Any, batch: Any) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(net(params, x), y, reduction="none")
    weights = torch.softmax(hyperparams[1], 0)[y]
    squares = sum(leaf.square().sum() for leaf in params.values())
    return (weights * losses).mean() + hyperparams[0].exp() * squares


def held_out(params: Any, hyperparams: Any, batch: Any) -> Tensor:
    x, y = batch
    # A direct dependence on the hyperparameters, too.
    return F.cross_entropy(net(params, x), y) + 0.01 * hyperparams[0].square()


CLASSES = (X[:, :4], torch.arange(30) % 3)
HELD_OUT = (XV[:, :4], torch.arange(20) % 3)
HYPER = [torch.tensor(-3.0).double(), torch.tensor([0.3, -0.2, 0.1]).double()]
START = {
    "a": 0.3 * torch.randn(4, 3, generator=GENERATOR).double(),
    "b": 0.3 * torch.randn(3, 3, generator=GENERATOR).double(),
}


def trained(hyperparams: Any, steps: int = 1500) -> Any:
    """Gradient descent, which can be differentiated with respect to the hyperparameters."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in START.items()}
    for _ in range(steps):
        slopes = torch.autograd.grad(
            training(params, hyperparams, CLASSES), list(params.values()), create_graph=True
        )
        params = {
            name: leaf - 1.5 * slope
            for (name, leaf), slope in zip(params.items(), slopes, strict=True)
        }
    return params


def test_a_net_agrees_with_unrolled_differentiation() -> None:
    leaves = [leaf.clone().requires_grad_() for leaf in HYPER]
    params = trained(leaves)
    unrolled = torch.autograd.grad(held_out(params, leaves, HELD_OUT), leaves)
    found = hf.implicit_gradient(
        held_out,
        training,
        {name: leaf.detach() for name, leaf in params.items()},
        HYPER,
        outer_batches=[HELD_OUT],
        inner_batches=[CLASSES],
        rtol=1e-10,
        solve=hf.minres,
    )
    assert found.converged
    assert found.inner_gradient < 1e-8
    for exact, ours in zip(unrolled, found.gradient, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9)
    # d (0.01 h^2) / dh
    assert float(found.direct[0]) == pytest.approx(0.02 * -3.0)
    assert not found.direct[1].any()


def test_a_point_off_the_minimum_is_named_with_its_gradient() -> None:
    moved = {"w": RIDGE["w"] + 0.05}
    # (X'X / n + D) 0.05
    slope = (X.mT @ X / len(X) + DECAY["log"].exp().diag()) @ torch.full(
        (6,), 0.05, dtype=torch.float64
    )
    with pytest.warns(NotStationaryWarning, match=f"gradient has norm {float(slope.norm()):.1e}"):
        found = hf.implicit_gradient(
            validation, penalised, moved, DECAY, outer_batches=VALID, inner_batches=TRAIN
        )
    assert found.inner_gradient == pytest.approx(float(slope.norm()), rel=1e-9)
    # The inner loss is quadratic: the step to its minimum is -0.05, and the outer loss changes by
    # its gradient along the step, to first order.
    wanted = XV.mT @ (XV @ moved["w"] - YV) / len(XV)
    assert found.outer_change == pytest.approx(-0.05 * float(wanted.sum()), rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.implicit_gradient(
            validation,
            penalised,
            moved,
            DECAY,
            outer_batches=VALID,
            inner_batches=TRAIN,
            stationarity=10.0,
        )


def test_a_saddle_is_named_and_minres_solves_at_it() -> None:
    def saddle(params: Any, hyperparams: Any, batch: Any) -> Tensor:
        # The stationary point is p = -h / (1, -2).
        p = params["p"]
        return (p[0].square() - 2 * p[1].square()) / 2 + (p * hyperparams).sum()

    def outer(params: Any, hyperparams: Any, batch: Any) -> Tensor:
        return (params["p"] * batch).sum()

    h, batch = torch.tensor([0.5, 0.25]).double(), torch.tensor([1.0, 3.0]).double()
    params = {"p": -h / torch.tensor([1.0, -2.0]).double()}
    run = partial(
        hf.implicit_gradient,
        outer,
        saddle,
        params,
        h,
        outer_batches=[batch],
        inner_batches=[batch],
        rtol=1e-10,
    )
    met = run()
    assert not met.converged
    assert met.error == math.inf
    assert met.reason.startswith("negative curvature")
    found = run(solve=hf.minres)
    # d p / dh = -diag(1, -2)^-1
    torch.testing.assert_close(found.gradient, torch.tensor([-1.0, 1.5]).double())
    # With a damping of 3: -diag(4, 1)^-1.
    damped = run(damping=3.0)
    torch.testing.assert_close(damped.gradient, torch.tensor([-0.25, -3.0]).double())


def test_a_budget_that_does_not_suffice() -> None:
    for budget in (2, 3, 4, 5):
        found = of_penalties(
            rtol=1e-12,
            max_matvecs=budget,
        )
        assert found.matvecs <= budget
        assert not found.converged
        assert found.error == math.inf


def test_warm_start_from_the_last_adjoint() -> None:
    run = partial(of_penalties, rtol=1e-9)
    first = run()
    again = run(start=first.adjoint)
    assert again.matvecs < first.matvecs - 3
    torch.testing.assert_close(again.gradient["log"], EXACT, rtol=1e-8, atol=0)


def test_options_reach_the_solve(tmp_path: Path) -> None:
    seen: list[float] = []
    inverse = 1 / (X.square().mean(0) + DECAY["log"].exp())
    found = of_penalties(
        keep=True,
        preconditioner=lambda block: {"w": block["w"] * inverse},
        callback=lambda running: seen.append(running.residual),
        checkpoint=tmp_path / "run",
        rtol=1e-10,
    )
    assert seen
    torch.testing.assert_close(found.gradient["log"], EXACT, rtol=1e-8, atol=0)


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    found = of_penalties()
    found.save(tmp_path / "gradient.npz")
    loaded = hf.load(tmp_path / "gradient.npz")
    assert isinstance(loaded, ImplicitGradient)
    assert torch.equal(loaded.gradient["log"], found.gradient["log"])
    assert (loaded.error, loaded.reason) == (found.error, found.reason)
    assert "converged=True" in repr(loaded)


def test_losses_that_do_not_depend_on_their_arguments() -> None:
    run = partial(hf.implicit_gradient, outer_batches=VALID, inner_batches=TRAIN, stationarity=1e9)
    with pytest.raises(ValueError, match="the loss does not depend on hyperparams"):
        run(validation, validation, RIDGE, DECAY)
    with pytest.raises(ValueError, match="the loss does not depend on params"):
        run(lambda p, h, batch: batch[0].mean(), penalised, RIDGE, DECAY)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outer_batches": VALID[0]}, TypeError, "single batch"),
        ({"inner_batches": iter(TRAIN)}, TypeError, "read only once"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs=1: it must be at least 2"),
        ({"stationarity": -1.0}, ValueError, "stationarity=-1.0"),
        ({"rtol": -1.0}, ValueError, "rtol=-1.0"),
        ({"budget": 3}, TypeError, "has no option 'budget'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"outer_batches": VALID, "inner_batches": TRAIN} | options
    with pytest.raises(error, match=message):
        hf.implicit_gradient(validation, penalised, RIDGE, DECAY, **given)
