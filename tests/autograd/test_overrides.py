"""Functions are replaced where torch evaluates plainly."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hessfunc as hf
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from tests.autograd.layers import assert_same_as_torch_alone, made
from tests.reference import hessian, matrix, relative_error

pytestmark = pytest.mark.usefixtures("small_is_large")


def test_functions_that_torch_func_transforms_are_left_to_torch():
    model, inputs, targets = made("conv, norm")
    names, leaves = zip(*model.named_parameters(), strict=True)

    def loss(*found):
        out = functional_call(model, dict(zip(names, found, strict=True)), (inputs,))
        return F.mse_loss(out, targets)

    everywhere = tuple(range(len(leaves)))
    expected = torch.func.grad(loss, everywhere)(*leaves)
    with Replaced(SECOND_ORDER):
        found = torch.func.grad(loss, everywhere)(*leaves)
    for each, reference in itertools.zip_longest(found, expected):
        torch.testing.assert_close(each, reference)


@pytest.mark.parametrize("name", ["conv, norm", "norm of rows", "gelu"])
def test_autocast_is_left_to_torch(name):
    model, inputs, _ = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(inputs.clone())
        with Replaced(SECOND_ORDER):
            found = model(inputs.clone())
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_checkpointed_region_is_left_to_torch(monkeypatch):
    weights = {"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()}
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()

    def outputs(params, x):
        return checkpoint(lambda h: torch.tanh(h @ params["w"]), x, use_reentrant=False)

    loss = hf.composed(outputs, lambda u, _: u.square().mean())
    assert_same_as_torch_alone(monkeypatch, loss, weights, x)


def test_calls_of_every_form_are_taken():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    out = torch.empty(2, 3, 8, 8)
    with Replaced(SECOND_ORDER), torch.no_grad():
        assert torch.sigmoid(x.detach(), out=out) is out
    with Replaced(SECOND_ORDER):
        torch.testing.assert_close(F.conv2d(x, w, b, np.int64(2)), F.conv2d(x, w, b, 2))
        assert F.linear(torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 4)).shape == (2, 4)
        with pytest.raises(RuntimeError, match="approximate"):
            F.gelu(x, approximate="none at all")
        with torch.inference_mode():
            assert F.conv2d(x, w).shape == (2, 4, 6, 6)
        with fwAD.dual_level():
            dual = fwAD.make_dual(x.detach(), torch.ones_like(x))
            assert fwAD.unpack_dual(torch.tanh(F.conv2d(dual, w))).tangent is not None


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 1])


class Checkpointed(nn.Module):
    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.first.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(
            lambda y: torch.tanh(self.first(y)), x, use_reentrant=True
        )
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_of_constants_is_refused() -> None:
    model = Checkpointed()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    everything = dict(model.named_parameters())
    for curvature, at in (
        (hf.hvp(loss), params),
        (hf.hvp(loss, mode="forward"), params),
        (hf.hvp(loss, mode="difference"), params),
        (hf.ggnvp(loss), params),
        (hf.efvp(loss), params),
        (hf.hvp_by_backward(model, lambda b: F.cross_entropy(model(b[0]), b[1])), everything),
    ):
        with pytest.raises(NotImplementedError, match="use_reentrant=True has inputs that need no"):
            curvature(at, (X, Y))
    with pytest.raises(NotImplementedError, match="use_reentrant=True has inputs that need no"):
        hf.ggn_diagonal(loss, params, [(X, Y)])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_of_frozen_layers_is_right() -> None:
    model = Checkpointed(frozen=True)
    model_fn, params = hf.functional(model)
    fixed = torch.tanh(model.first(X)).detach()

    def plainly(p: Any, batch: Any) -> Tensor:
        return F.cross_entropy(F.linear(fixed, p["second.weight"], p["second.bias"]), Y)

    found = matrix(hf.hvp(hf.supervised(model_fn, F.cross_entropy))(params, (X, Y)), params)
    assert relative_error(found, hessian(plainly, params, None)) < 1e-10
