"""Blocks beneath vmap, and graphs of cotangents alone."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd.bilinear import affine
from hessfunc.autograd.elementwise import gelu
from hessfunc.autograd.functorch import (
    Saved,
    batched,
    edges,
    final_gradient,
    is_final_gradient,
    is_last_product,
    last_product,
    linear_in_cotangents,
    on_blocks,
    pullback,
)
from hessfunc.autograd.linear import Linear
from hessfunc.autograd.normalisation import layer_norm
from hessfunc.memory import Footprint
from tests.autograd.layers import made

pytestmark = pytest.mark.usefixtures("small_is_large")


def test_a_graph_for_gauss_newton_products_holds_no_second_derivative():
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.ones(6, 4, requires_grad=True)
    for surroundings, differentiable in ((nullcontext, True), (linear_in_cotangents, False)):
        y = affine(Linear(), x, w, None)
        with surroundings():
            (slope,) = torch.autograd.grad(y, x, g, create_graph=True)
        (of_w,) = torch.autograd.grad(slope.sum(), w, allow_unused=True)
        assert (of_w is not None) == differentiable


def test_one_leaf_of_a_vector_may_be_mapped_over():
    model, inputs, targets = made("two convs")
    model_fn, params = hf.functional(model)
    matvec = hf.hvp(hf.supervised(model_fn, F.mse_loss), chunk_size=1)(params, (inputs, targets))
    vector = {name: leaf[0] for name, leaf in hf.random_like(params, 1, seed=0).items()}
    name = list(params)[-2]
    block = hf.random_like({name: params[name]}, 3, kind="normal", seed=1)[name]
    found = torch.vmap(lambda leaf: hf.apply(matvec, {**vector, name: leaf}))(block)
    for i, leaf in enumerate(block):
        expected = hf.apply(matvec, {**vector, name: leaf})
        for key in params:
            torch.testing.assert_close(found[key][i], expected[key])


def test_a_formula_sees_the_block_beneath_vmap() -> None:
    shapes = []

    def formula(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append((a.shape, b.shape))
        return a * b

    a, b = torch.randn(2, 3), torch.randn(3)
    # The probe axis is last in the given block, and leads in the formula.
    found = torch.vmap(lambda a: on_blocks(formula, a, b), in_dims=1)(a.mT.contiguous())
    torch.testing.assert_close(found, a * b)
    assert shapes == [((2, 3), (3,))]
    torch.testing.assert_close(on_blocks(formula, b, b), b * b)
    assert torch.vmap(lambda a: torch.tensor(batched(a)))(a).all()
    assert not batched(a, None)


def test_a_pullback_is_linear_and_may_be_called_again() -> None:
    x, unused = (torch.randn(3, requires_grad=True) for _ in range(2))
    y, z = x.sin(), 2 * x
    pulled = pullback([y, *edges([z])], [x, unused])
    g, h = torch.randn(3), torch.randn(3)
    for _ in range(2):
        by_x, by_unused = pulled([g, h])
        torch.testing.assert_close(by_x, g * x.detach().cos() + 2 * h)
        assert torch.equal(by_unused, torch.zeros(3))
    assert torch.equal(pullback([], [x])([])[0], torch.zeros(3))


def test_the_last_product_frees_the_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    pulled = pullback([x.sin()], [x])
    assert not is_last_product()
    with last_product():
        assert is_last_product()
        torch.testing.assert_close(pulled([torch.ones(3)])[0], x.detach().cos())
    with pytest.raises(RuntimeError, match="second time"):
        pulled([torch.ones(3)])


def test_saved_tensors_refuse_changes_and_uses_after_they_are_freed() -> None:
    x = torch.randn(3)
    saved = Saved(x)
    assert saved.tensors()[0] is x
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.tensors()
    saved.free()
    with pytest.raises(RuntimeError, match="after its final gradient"):
        saved.tensors()


@pytest.mark.parametrize("name", ["gelu", "layer_norm"])
def test_a_final_gradient_frees_what_only_derivatives_of_higher_order_need(name: str) -> None:
    layers = {"gelu": gelu, "layer_norm": lambda x: layer_norm(x, [64])}
    v = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    products, held = [], []
    for surroundings in (nullcontext, final_gradient):
        w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with Footprint() as memory:
            value = layers[name](w.clone()).square().sum()
            with surroundings():
                assert is_final_gradient() == (surroundings is final_gradient)
                gradient = torch.autograd.grad(value, w, create_graph=True)
            pulled = pullback(edges(gradient), [w])
            del value, gradient
            products.append(pulled([v])[0])
            held.append(memory.now)
    torch.testing.assert_close(*products)
    # The argument of the layer and the cotangent of its result.
    assert held[0] - held[1] == 2 * v.nbytes
