"""Smooth activations whose derivatives are kept."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hessfunc.autograd.elementwise import elementwise, gelu
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER

pytestmark = pytest.mark.usefixtures("small_is_large")


def test_complex_activations_are_left_to_torch():
    z = torch.randn(4, 4, dtype=torch.complex128, requires_grad=True)
    with Replaced(SECOND_ORDER):
        out = torch.tanh(z)
    assert "Tanh" in out.grad_fn.name()


ACTIVATIONS = {
    "silu": (elementwise(F.silu), F.silu),
    "tanh": (elementwise(torch.tanh), torch.tanh),
    "sigmoid": (elementwise(torch.sigmoid), torch.sigmoid),
    "gelu": (gelu, F.gelu),
    "gelu by tanh": (
        partial(gelu, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_three_orders_are_those_of_differences_and_of_torch(name: str) -> None:
    ours, plain = ACTIVATIONS[name]
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ours, [x])
    assert torch.autograd.gradgradcheck(ours, [x])
    found, wanted = ours(x), plain(x)
    assert "Mapped" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, wanted)
    for _ in range(3):
        found, wanted = (
            torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (found, wanted)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_small_activations_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessfunc.autograd.elementwise._LARGE", 100)
    x = torch.randn(99, requires_grad=True)
    assert "Mapped" not in type(ACTIVATIONS["tanh"][0](x).grad_fn).__name__
