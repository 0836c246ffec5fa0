from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import NAMES, NO_FORWARD_MODE, case
from tests.reference import block_diagonal, gauss_newton, hessian, matrix, relative_error


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt2"])
def test_it_is_the_hessian_less_the_gauss_newton_matrix(name: str) -> None:
    found = case(name)
    dense = hessian(found.loss, found.params, found.batch)
    expected = dense - gauss_newton(found.loss, found.params, found.batch)
    product = matrix(hf.functional_hvp(found.loss)(found.params, found.batch), found.params)
    assert (product - expected).norm() < 1e-8 * dense.norm()


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_modes_agree(name: str, mode: Any) -> None:
    assert name not in NO_FORWARD_MODE
    found = case(name)
    product = hf.functional_hvp(found.loss, mode=mode)(found.params, found.batch)
    expected = hf.functional_hvp(found.loss)(found.params, found.batch)
    assert relative_error(matrix(product, found.params), matrix(expected, found.params)) < 1e-10


def test_a_layer_of_a_piecewise_linear_net_has_no_block() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
        batch = torch.randn(6, 3).double(), torch.randint(2, (6,))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    dense = matrix(hf.functional_hvp(loss)(params, batch), params)
    blocks = block_diagonal(dense, params)
    assert dense.norm() > 1e-3
    assert blocks.abs().max() < 1e-12


def test_a_linear_model_has_none() -> None:
    params = {"w": torch.linspace(-1, 1, 4).double()}
    loss = hf.supervised(lambda p, x: x @ p["w"], F.mse_loss)
    batch = torch.eye(4).double(), torch.zeros(4).double()
    assert not matrix(hf.functional_hvp(loss)(params, batch), params).any()


def test_it_needs_the_two_halves_of_the_loss() -> None:
    with pytest.raises(TypeError, match="two halves"):
        hf.functional_hvp(lambda params, batch: params.sum())
