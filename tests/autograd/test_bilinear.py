"""Bilinear maps, their transposes, and derivatives of every order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessfunc.autograd.bilinear import Bilinear, Channels, affine
from hessfunc.autograd.convolution import Convolution
from hessfunc.autograd.linear import Linear

IMAGES, KERNELS = torch.Size((2, 3, 4, 5)), torch.Size((4, 3, 2, 2))
FORMS: dict[str, tuple[Bilinear, torch.Size, torch.Size]] = {
    "linear": (Linear(), torch.Size((6, 3)), torch.Size((4, 3))),
    "channels": (Channels(4), IMAGES, torch.Size((3,))),
    "convolution": (Convolution((1, 2), (1, 0), (1, 1), 1, IMAGES, KERNELS), IMAGES, KERNELS),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has no float64, in which derivatives are compared."""
    monkeypatch.setattr("hessfunc.autograd.linear.multiplied", torch.matmul)


def drawn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("name", FORMS)
def test_transposes_give_one_number_from_three_sides(name: str) -> None:
    form, of_x, of_w = FORMS[name]
    x, w = drawn(*of_x), drawn(*of_w)
    y = form.out(x, w)
    g, b = torch.randn_like(y), drawn(y.shape[1])
    inner = (g * y).sum()
    torch.testing.assert_close((x * form.left(g, w)).sum(), inner)
    torch.testing.assert_close((w * form.right(g, x)).sum(), inner)
    torch.testing.assert_close((b * form.gathered(g)).sum(), (g * form.spread(b)).sum())
    assert form.dims == y.dim()


@pytest.mark.parametrize("name", FORMS)
def test_the_tangent_is_the_derivative_along_a_block(name: str) -> None:
    form, of_x, of_w = FORMS[name]
    x, w, dx, dw = drawn(*of_x), drawn(*of_w), drawn(3, *of_x), drawn(3, *of_w)
    _, along = torch.func.vmap(
        lambda dx, dw: torch.func.jvp(lambda x, w: form.out(x, w), (x, w), (dx, dw))
    )(dx, dw)
    torch.testing.assert_close(form.tangent(x, w, dx, dw), along)
    torch.testing.assert_close(form.tangent(x, w, dx[0], dw), form.out(dx[0], w) + form.out(x, dw))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("biased", [True, False])
def test_an_affine_map_has_derivatives_of_the_second_and_third_order(
    name: str, biased: bool
) -> None:
    form, of_x, of_w = FORMS[name]
    x, w = drawn(*of_x, grad=True), drawn(*of_w, grad=True)
    b = drawn(form.out(x, w).shape[1], grad=True) if biased else None
    given = [t for t in (x, w, b) if t is not None]

    def cubed(*tensors: Tensor) -> Tensor:
        y = affine(form, tensors[0], tensors[1], tensors[2] if biased else None)
        return y.pow(3).sum()

    assert torch.autograd.gradcheck(cubed, given)
    assert torch.autograd.gradgradcheck(cubed, given, check_undefined_grad=False)
    gradient = torch.autograd.grad(cubed(*given), given, create_graph=True)
    squares = sum(g.square().sum() for g in gradient)
    curved = torch.autograd.grad(squares, given, create_graph=True)
    direction = [torch.randn_like(t) for t in given]
    inner = sum((c * d).sum() for c, d in zip(curved, direction, strict=True))
    third = torch.autograd.grad(inner, x)[0]
    assert bool(third.isfinite().all())


def test_a_known_value_is_not_computed_again() -> None:
    x, w = drawn(2, 3, grad=True), drawn(4, 3, grad=True)
    value = x.detach() @ w.detach().mT
    y = affine(Linear(), x, w, None, value=value)
    assert y.data_ptr() == value.data_ptr()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w.detach().sum(0).expand(2, 3))
