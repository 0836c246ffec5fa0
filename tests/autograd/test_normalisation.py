"""Norms whose second derivatives take few passes."""

import copy

import pytest
import torch
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.autograd.normalisation import layer_norm
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from tests.autograd.layers import made, plain_products

pytestmark = pytest.mark.usefixtures("small_is_large")


def test_a_norm_that_is_trained_sees_its_batch():
    model, inputs, targets = made("conv, norm")
    model.train()
    model_fn, params = hf.functional(copy.deepcopy(model))
    loss = hf.supervised(model_fn, F.mse_loss)
    block = hf.random_like(params, 2, kind="normal", seed=1)
    expected, _ = plain_products(model, inputs, targets, block)
    found = hf.hvp(loss)(params, (inputs, targets))(block)
    found = torch.cat([each.flatten(1) for each in found.values()], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_signs_of_activations_are_those_of_torch():
    # The folded norm would round the inputs of a ReLU another way, and flip some that are near 0.
    (conv, norm, _), _, _ = made("conv, norm", torch.float32)
    inputs = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with Replaced(SECOND_ORDER):
        between = conv(inputs)
        ours = norm(between)
    torch.testing.assert_close(between, conv(inputs), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ours, norm(between))


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_has_the_derivatives_of_its_definition(affine: bool) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2 * affine)]

    def normalised(x: torch.Tensor, *scale: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (5,), *scale)

    torch.testing.assert_close(normalised(x, *scale), F.layer_norm(x, (5,), *scale))
    assert torch.autograd.gradcheck(normalised, [x, *scale])
    assert torch.autograd.gradgradcheck(normalised, [x, *scale])
