"""Functions that are computed in another way have torch's values and derivatives."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from tests.autograd.layers import (
    MODELS,
    assert_same_as_torch_alone,
    by_definition,
    made,
    plain_products,
)

pytestmark = pytest.mark.usefixtures("small_is_large")


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_torch(name, chunk_size):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    block = hf.random_like(params, 3, kind="normal", seed=1)
    expected = plain_products(model, inputs, targets, block)
    for transform, reference in zip((hf.hvp, hf.ggnvp), expected, strict=True):
        matvec = transform(loss, chunk_size=chunk_size)(params, (inputs.clone(), targets))
        # Twice: what is kept from the first product serves the second.
        for _ in range(2):
            found = torch.cat([each.flatten(1) for each in matvec(block).values()], dim=1)
            torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "two convs", "conv, norm", "norm first", "layer norm"])
def test_products_with_a_part_of_the_parameters_are_those_of_torch(name):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    whole = hf.hvp(loss)(params, (inputs, targets))
    for chosen in params:
        part, rest = hf.split(params, [chosen])
        vector = hf.random_like(part, 3, kind="normal", seed=1)
        zeros = {n: torch.zeros(3, *p.shape, dtype=p.dtype) for n, p in params.items()}
        expected = whole(zeros | vector)[chosen]
        held = hf.hold(loss, rest)
        for chunk_size in (1, 3):
            found = hf.hvp(held, chunk_size=chunk_size)(part, (inputs, targets))(vector)
            torch.testing.assert_close(found[chosen], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_torch(name):
    model, inputs, _ = made(name, torch.float32)
    expected = model(inputs.clone())
    with Replaced(SECOND_ORDER):
        found = model(inputs.clone())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv, norm", "layer norm", "gelu", "silu", "sigmoid", "tanh"])
def test_derivatives_of_the_third_order_are_those_of_torch(name):
    model, inputs, _ = made(name)
    leaves = list(model.parameters())

    def third(model):
        x = inputs.clone().requires_grad_()
        y = model(x).square().sum()
        for _ in range(2):
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            y = slope.square().sum()
        return torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True)

    # The fused layer norm's own is wrong by half in torch 2.13.
    with Replaced({F.layer_norm: by_definition}):
        expected = third(model)
    with Replaced(SECOND_ORDER):
        found = third(model)
    for each, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(each, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda y, t: (torch.sigmoid(y) - t).square().mean(),
        lambda y, t: F.layer_norm(y, y.shape[-1:]).sub(t).square().mean(),
        lambda y, t: F.gelu(y).sub(t).pow(4).mean(),
        lambda y, t: F.linear(y.flatten(1), torch.ones(2, y[0].numel()).to(y)).tanh().sum(),
    ],
    ids=["sigmoid", "layer norm", "gelu", "linear"],
)
@pytest.mark.filterwarnings("ignore:the criterion is not convex")
def test_a_criterion_may_be_curved_by_any_of_them(monkeypatch, criterion):
    model, inputs, targets = made("two convs")
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, criterion)
    assert_same_as_torch_alone(monkeypatch, loss, params, (inputs, targets))


def slope_net():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    return *hf.functional(model), x


@pytest.mark.parametrize("order", [1, 2])
def test_a_loss_may_take_derivatives_by_its_inputs(monkeypatch, order):
    model_fn, params, x = slope_net()

    def outputs(params, x):
        x = x.detach().requires_grad_()
        u = model_fn(params, x)
        for _ in range(order):
            (u,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
        return u

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    # The fused layer norm's own third derivative is wrong in torch 2.13.
    monkeypatch.setattr(F, "layer_norm", by_definition)
    assert_same_as_torch_alone(monkeypatch, loss, params, x)


def test_a_loss_may_take_a_block_of_derivatives(monkeypatch):
    model_fn, params, x = slope_net()

    def outputs(params, x):
        x = x.detach().requires_grad_()
        u = model_fn(params, x)
        eye = torch.eye(2, dtype=u.dtype)[:, None].expand(2, *u.shape)
        (slopes,) = torch.autograd.grad(u, x, eye, create_graph=True, is_grads_batched=True)
        return slopes

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    monkeypatch.setattr(F, "layer_norm", by_definition)
    assert_same_as_torch_alone(monkeypatch, loss, params, x)


def test_what_torch_lets_change_in_place_may_change():
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with Replaced(SECOND_ORDER):
        x = 2 * h
        y = torch.tanh(x)
        x.add_(1.0)
        torch.autograd.grad(y.sum(), h)
        z = F.layer_norm(2 * h, (4,))
        z.mul_(2.0)
        torch.autograd.grad(z.square().sum(), h)


@pytest.mark.parametrize("name", ["layer norm", "layer norm without weight", "gelu", "tanh"])
@pytest.mark.parametrize("transform", [hf.hvp, hf.ggnvp])
def test_a_matvec_that_is_dropped_leaves_nothing(name, transform):
    model, inputs, targets = made(name)
    model_fn, params = hf.functional(model)
    seen = []

    class Mark:
        pass

    def outputs(params, x):
        out = model_fn(params, x)
        mark = out.grad_fn.metadata["mark"] = Mark()
        seen.append(weakref.ref(mark))
        return out

    loss = hf.supervised(outputs, F.mse_loss)
    matvec = transform(loss)(params, (inputs, targets))
    matvec(hf.random_like(params, 2, seed=0))
    assert seen[0]() is not None
    del matvec
    gc.collect()
    assert seen[0]() is None
