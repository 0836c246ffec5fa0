from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.trees import tree_map
from tests.cases import randn
from tests.graphs import allocated
from tests.reference import (
    fixed_surroundings,
    gauss_newton,
    gradient,
    hessian,
    matrix,
    relative_error,
    rows,
)

Mode = Literal["reverse", "forward", "difference"]
TOLERANCE: dict[Mode, float] = {"reverse": 1e-8, "forward": 1e-8, "difference": 1e-6}
MODES = tuple(TOLERANCE)


def hidden(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.layer_norm(torch.tanh(x @ w["in"]) @ w["out"], (4,))


def attention(w: dict[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = ((x @ w["in"]) * (i + 1) for i in range(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) @ w["out"]


def dropped(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.dropout(torch.tanh(F.dropout(x @ w["in"])), 0.3) @ w["out"]


PARTS = {"hidden": hidden, "attention": attention, "dropped": dropped}


def params() -> dict[str, dict[str, Tensor]]:
    return {name: {"in": randn(4, 4) / 2, "out": randn(4, 4) / 2} for name in ("first", "second")}


def loss_of(part: Any) -> hf.Loss:
    """Two parts, one after another, beside a skip connection."""

    def outputs(p: Any, x: Tensor) -> Tensor:
        h = x + part(p["first"], x)
        return torch.sin(part(p["second"], h))

    return hf.composed(outputs, lambda out, x: (out - x.flip(1)).square().mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARTS)
def test_products_are_those_of_the_function(name: str, mode: Mode) -> None:
    p, x = params(), randn(3, 5, 4)
    loss = loss_of(hf.recomputed(PARTS[name]))
    found = matrix(hf.hvp(loss, mode=mode)(p, x), p)
    assert relative_error(found, hessian(loss_of(PARTS[name]), p, x)) < TOLERANCE[mode]


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARTS)
def test_blocks_and_single_vectors_see_the_same_matrix(
    name: str, mode: Mode, chunk_size: int, k: int
) -> None:
    p, x = params(), randn(3, 5, 4)
    v = hf.random_like(p, k, seed=0)
    matvec = hf.hvp(loss_of(hf.recomputed(PARTS[name])), mode=mode, chunk_size=chunk_size)(p, x)
    expected = rows(v) @ hessian(loss_of(PARTS[name]), p, x)
    assert relative_error(rows(matvec(v)), expected) < TOLERANCE[mode]


@pytest.mark.parametrize("name", PARTS)
def test_gauss_newton_products_are_those_of_the_function(name: str) -> None:
    p, x = params(), randn(3, 5, 4)
    loss, plain = loss_of(hf.recomputed(PARTS[name])), loss_of(PARTS[name])
    assert relative_error(matrix(hf.ggnvp(loss)(p, x), p), gauss_newton(plain, p, x)) < 1e-8
    found, expected = (matrix(hf.efvp(of)(p, x), p) for of in (loss, plain))
    assert relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("name", PARTS)
def test_values_and_gradients_are_those_of_the_function(name: str) -> None:
    p, x = params(), randn(3, 5, 4)
    loss, plain = loss_of(hf.recomputed(PARTS[name])), loss_of(PARTS[name])
    with fixed_surroundings():
        value = loss(p, x)
    with fixed_surroundings():
        assert torch.equal(value, plain(p, x))
    assert relative_error(gradient(loss, p, x), gradient(plain, p, x)) < 1e-12


def test_dropout_is_drawn_again_the_same_outside_of_products_too() -> None:
    w, x = params()["first"], randn(50, 4).requires_grad_()
    out = hf.recomputed(lambda x: F.dropout(x, 0.5))(x)
    torch.rand(3)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, slope * x)
    assert set(slope.unique().tolist()) == {0.0, 2.0}
    first, second = (hf.recomputed(dropped)(w, x) for _ in range(2))
    assert not torch.equal(first, second)


def test_recomputation_moves_torchs_random_stream_no_further_than_the_function() -> None:
    w, x = params()["first"], randn(5, 4).requires_grad_()
    states = []
    for part in (dropped, hf.recomputed(dropped)):
        torch.manual_seed(0)
        out = part(w, x)
        states.append(torch.get_rng_state())
        torch.autograd.grad(out.sum(), x)
        assert torch.equal(torch.get_rng_state(), states[-1])
    assert torch.equal(*states)


def test_arguments_and_results_may_be_any_trees() -> None:
    def part(pair: Any, *, by: float, scale: Tensor, places: Tensor) -> Any:
        w, x = pair
        h = torch.tanh(x @ w) * by * scale
        return {"h": h[places], "rest": (h.sum(), [h.exp()])}

    places = torch.tensor([2, 0])

    def loss_with(of: Any) -> Any:
        def loss(p: Any, x: Tensor) -> Tensor:
            out = of((p["w"], x), by=2.0, scale=p["s"], places=places)
            return out["h"].square().sum() + out["rest"][0] * out["rest"][1][0].mean()

        return loss

    p, x = {"w": randn(3, 3), "s": randn(3)}, randn(4, 3)
    for mode in MODES:
        found = matrix(hf.hvp(loss_with(hf.recomputed(part)), mode=mode)(p, x), p)
        assert relative_error(found, hessian(loss_with(part), p, x)) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", MODES)
def test_one_inside_another_will_do(mode: Mode) -> None:
    inner = hf.recomputed(hidden)
    outer = hf.recomputed(lambda w, x: inner(w, torch.sin(inner(w, x))))
    plain = loss_of(lambda w, x: hidden(w, torch.sin(hidden(w, x))))
    p, x = params(), randn(5, 4)
    found = matrix(hf.hvp(loss_of(outer), mode=mode)(p, x), p)
    assert relative_error(found, hessian(plain, p, x)) < TOLERANCE[mode]


def test_it_works_under_the_transforms_of_torch() -> None:
    w, x = randn(3, 3), randn(4, 3)

    def plain(w: Tensor) -> Tensor:
        return torch.tanh(torch.sin(x @ w) @ w).square().sum()

    part = hf.recomputed(plain)
    torch.testing.assert_close(torch.func.grad(part)(w), torch.func.grad(plain)(w))
    torch.testing.assert_close(torch.func.hessian(part)(w), torch.func.hessian(plain)(w))
    torch.testing.assert_close(torch.func.jacrev(part)(w), torch.func.jacrev(plain)(w))
    both = torch.stack([w, 2 * w])
    torch.testing.assert_close(torch.vmap(part)(both), torch.vmap(plain)(both))


def test_it_works_in_nested_forward_mode() -> None:
    w, v = randn(3, 3), randn(3, 3)

    def plain(w: Tensor) -> Tensor:
        return torch.tanh(w @ w)

    def derivative(f: Any) -> Any:
        return lambda w: torch.func.jvp(f, (w,), (v,))[1]

    part = hf.recomputed(plain)
    twice, thrice = derivative(derivative(plain)), derivative(derivative(derivative(plain)))
    torch.testing.assert_close(derivative(derivative(part))(w), twice(w))
    torch.testing.assert_close(derivative(derivative(derivative(part)))(w), thrice(w))
    # The cotangent of a sum is an expanded number.
    found = derivative(torch.func.grad(lambda w: part(w).sum()))(w)
    torch.testing.assert_close(found, derivative(torch.func.grad(lambda w: plain(w).sum()))(w))


@pytest.mark.parametrize("of", [hf.hvp, hf.ggnvp])
def test_the_kept_graph_holds_the_arguments_alone(of: Any) -> None:
    def deep(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.tanh(x @ w)
        return x

    def kept(part: Any) -> int:
        loss = hf.composed(lambda p, x: part(p["w"], x), lambda out, _: out.square().mean())
        return allocated(lambda: of(loss)({"w": torch.randn(4, 4)}, torch.randn(2000, 4))).kept

    assert kept(hf.recomputed(deep)) < kept(deep) / 4


def test_an_object_that_holds_tensors_is_no_argument() -> None:
    square = hf.recomputed(lambda x, of: torch.tanh(x * of.scale))

    def loss(params: Any, x: Tensor) -> Tensor:
        return square(x @ params["w"], SimpleNamespace(scale=params["w"].sum())).sum()

    params = {"w": torch.ones(3)}
    with pytest.raises(TypeError, match="a SimpleNamespace among the arguments .* would be lost"):
        hf.hvp(loss)(params, torch.ones(2, 3))
    fixed = SimpleNamespace(scale=torch.tensor(2.0))
    matvec = hf.hvp(lambda p, x: square(x @ p["w"], fixed).sum())(params, torch.ones(2, 3))
    assert matvec({"w": torch.ones(1, 3)})["w"].any()


def test_products_are_differentiated_and_mapped() -> None:
    plain, again = loss_of(hidden), loss_of(hf.recomputed(hidden))
    p, x = params(), randn(3, 5, 4)
    v = params()

    def quadratic(loss: hf.Loss, p: Any) -> Tensor:
        return hf.inner(v, hf.apply(hf.hvp(loss)(p, x), v))

    due = torch.func.grad(lambda p: quadratic(plain, p))(p)
    found = torch.func.grad(lambda p: quadratic(again, p))(p)
    assert relative_error(found["first"]["in"], due["first"]["in"]) < 1e-10
    stacked = tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), p)
    mapped = torch.vmap(lambda p: quadratic(again, p))(stacked)
    assert relative_error(mapped, torch.vmap(lambda p: quadratic(plain, p))(stacked)) < 1e-10
