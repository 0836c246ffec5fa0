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
from hessfunc.optim.newton import Newton, NewtonState, newton
from hessfunc.optim.solvers import conjugate_gradients, direct
from hessfunc.transforms.exact_blocks import exact_blocks
from tests.graphs import counted_graphs

CURVATURES = {
    "hvp": hf.hvp,
    "ggnvp": hf.ggnvp,
    "pchvp abs": partial(hf.pchvp, residual="abs"),
    "pchvp zero": partial(hf.pchvp, residual="zero"),
}
EXACT = conjugate_gradients(rtol=1e-12, atol=0)


class Dense:
    """A block that is a matrix, on a tensor of any shape."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def matvec(self, vectors: Tensor) -> Tensor:
        return (vectors.reshape(len(vectors), -1) @ self.matrix).view_as(vectors)

    def inverse_matvec(self, vectors: Tensor, damping: float) -> Tensor:
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        rows = vectors.reshape(len(vectors), -1)
        return torch.linalg.solve(damped, rows.mT).mT.reshape(vectors.shape)


def positive(n: int, seed: int = 0) -> Tensor:
    factor = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.mT + torch.eye(n)


def once(
    method: Newton,
    gradients: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    matvecs: Mapping[str, Any],
) -> tuple[dict[str, Tensor], NewtonState]:
    return method.update(gradients, method.init(params), params, matvecs)


@pytest.mark.parametrize("solve", [EXACT, direct()])
def test_one_step_by_hand(solve: Any) -> None:
    params = {"x": torch.zeros(2, dtype=torch.float64)}
    gradients = {"x": torch.tensor([-1.0, -2.0], dtype=torch.float64)}
    block = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64))
    moved, state = once(newton(lr=1.0, alpha=0.0, solve=solve), gradients, params, {"x": block})
    torch.testing.assert_close(moved["x"], torch.tensor([1 / 11, 7 / 11], dtype=torch.float64))
    assert state.step == 1
    assert state.unconverged == state.negative_curvature == ()


def test_blocks_of_a_literal_hessian() -> None:
    H = torch.tensor([[1.0, 4, 5], [4, 2, 6], [5, 6, 3]], dtype=torch.float64)

    def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        z = torch.cat([params["a"], params["b"]])
        return z @ H @ z / 2

    params = {"a": torch.ones(1).double(), "b": torch.tensor([2.0, -1.0]).double()}
    blocks = exact_blocks(hf.hvp, loss)(params, None)
    assert list(blocks) == ["a", "b"]
    assert len(blocks) == 2
    torch.testing.assert_close(blocks["a"](torch.ones(1, 1).double()), H[:1, :1])
    torch.testing.assert_close(blocks["b"](torch.eye(2).double()), H[1:, 1:])


def test_a_quadratic_of_one_block_is_solved_in_one_step() -> None:
    A = positive(6)

    def loss(params: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        x = params["x"].flatten() - batch
        return x @ A @ x / 2

    minimum = torch.arange(6.0).double()
    params = {"x": torch.zeros(2, 3).double()}
    gradients = torch.func.grad(loss)(params, minimum)
    method = newton(lr=1.0, alpha=0.0, solve=EXACT)
    moved, _ = once(method, gradients, params, exact_blocks(hf.hvp, loss)(params, minimum))
    torch.testing.assert_close(moved["x"].flatten(), minimum)


def problem() -> tuple[hf.Loss, dict[str, Tensor], Any]:
    model = mlp([4, 5, 1], nn.Sigmoid).double()
    model_fn, params = hf.functional(model)
    batch = torch.randn(7, 4).double(), torch.randn(7, 1).double()
    return hf.supervised(model_fn, F.mse_loss), params, batch


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
def test_exact_blocks_are_the_diagonal_blocks(curvature: Any) -> None:
    loss, params, batch = problem()
    blocks = exact_blocks(curvature, loss)
    whole = hf.matvecs.per_block(curvature(loss)(params, batch), params)
    vectors = hf.random_like(params, 3, seed=1)
    expected = whole(vectors)
    # The second time at other parameters, as in training.
    for shift in (0.0, 0.1):
        moved = {name: leaf + shift for name, leaf in params.items()}
        expected = hf.matvecs.per_block(curvature(loss)(moved, batch), moved)(vectors)
        found = blocks(moved, batch)
        for name in params:
            torch.testing.assert_close(found[name](vectors[name]), expected[name])


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


def test_known_criteria_stay_known() -> None:
    # The Fisher matrix takes no criterion that it does not know.
    loss, params, batch = problem()
    blocks = exact_blocks(hf.fvp, loss)(params, batch)
    same = exact_blocks(hf.ggnvp, loss)(params, batch)
    v = torch.randn(1, *params["1.weight"].shape).double()
    torch.testing.assert_close(blocks["1.weight"](v), same["1.weight"](v))


def test_a_block_is_made_at_each_lookup_and_not_kept() -> None:
    made: list[int] = []

    def counted(loss: Any) -> Any:
        def curvature(params: Any, batch: Any) -> Any:
            made.append(1)
            return lambda block: block

        return curvature

    params = {"a": torch.zeros(2), "b": torch.zeros(())}
    blocks = exact_blocks(counted, lambda params, batch: torch.zeros(()))(params, None)
    assert set(blocks) == {"a", "b"}
    assert "a" in blocks
    assert "c" not in blocks
    assert not made
    assert torch.equal(blocks["b"](torch.ones(3)), torch.ones(3))
    blocks["b"]
    assert len(made) == 2
    with pytest.raises(KeyError):
        blocks["c"]


def test_a_step_holds_one_graph_at_a_time() -> None:
    loss, params, batch = problem()
    gradients = torch.func.grad(loss)(params, batch)
    blocks = exact_blocks(hf.hvp, loss)(params, batch)
    with counted_graphs() as together:
        kept = [blocks[name] for name in blocks]
    del kept
    with counted_graphs() as alone:
        first = blocks["1.weight"]
    del first
    with counted_graphs() as stepping:
        once(newton(), gradients, params, blocks)
    assert stepping.most == alone.most < together.most / 2


@pytest.mark.parametrize("changed", ["1.weight", "3.bias"])
def test_a_block_refuses_parameters_that_have_changed(changed: str) -> None:
    loss, params, batch = problem()
    curvature = partial(hf.hvp, mode="difference")
    block = exact_blocks(curvature, loss)(params, batch)["3.bias"]
    vector = torch.ones(1, 1).double()
    block(vector)
    params[changed].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        block(vector)


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


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.9])
def test_direct_and_conjugate_gradients_agree(alpha: float) -> None:
    params = {"w": torch.randn(2, 3).double(), "c": torch.randn(()).double()}
    gradients = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    blocks = {"w": Dense(positive(6)), "c": Dense(positive(1))}
    found = [
        once(newton(lr=0.5, alpha=alpha, solve=solve), gradients, params, blocks)
        for solve in (EXACT, direct())
    ]
    for name in params:
        torch.testing.assert_close(found[0][0][name], found[1][0][name])
    assert found[0][1].matvecs > 0
    assert found[1][1].matvecs == 0
    assert found[0][0]["c"].shape == ()


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
