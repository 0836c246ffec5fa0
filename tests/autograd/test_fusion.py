"""Layers that are made one, and what forbids it."""

import pytest
import torch

from hessfunc.autograd.fusion import Source, remember, source_of
from hessfunc.autograd.linear import Linear
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.second_order import SECOND_ORDER
from tests.autograd.layers import conv_norm

FORBIDDING = {
    "no_grad": lambda conv, x: torch.no_grad()(conv)(x),
    "detach": lambda conv, x: conv(x).detach(),
    "detach in place": lambda conv, x: conv(x).detach_(),
}


@pytest.mark.parametrize("name", FORBIDDING)
def test_a_norm_does_not_reach_past_what_ends_the_graph(name):
    conv, norm, _, x = conv_norm()
    with Replaced(SECOND_ORDER):
        out = norm(FORBIDDING[name](conv, x)).square().sum()
    (found,) = torch.autograd.grad(out, conv.weight, allow_unused=True)
    assert found is None


def test_a_hook_between_convolution_and_norm_is_heard():
    conv, norm, _, x = conv_norm()
    slopes = []
    for table in (SECOND_ORDER, {}):
        with Replaced(table):
            y = conv(x)
            y.register_hook(lambda g: 3 * g)
            slopes.append(torch.autograd.grad(norm(y).square().sum(), conv.weight)[0])
    torch.testing.assert_close(*slopes)


def test_what_changes_in_place_before_the_norm_is_not_made_one_with_it():
    conv, norm, _, x = conv_norm()
    x = x.clone()
    with Replaced(SECOND_ORDER):
        y = conv(x)
        x.mul_(3.0)
        out = norm(y).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, conv.weight)


def source(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Source:
    made = Source(Linear(), x, w, None)
    remember(y, made)
    return made


def test_a_source_is_known_as_long_as_nothing_has_changed() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    y = x @ w.mT
    made = source(y, x, w)
    assert source_of(y) is made
    assert source_of(x @ w.mT) is None
    x.mul_(2)
    assert source_of(y) is None


@pytest.mark.parametrize("watch", [lambda y: y.register_hook(print), lambda y: y.retain_grad()])
def test_a_gradient_that_someone_waits_for_forbids_it(watch) -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    y = x @ w.mT
    source(y, x, w)
    watch(y)
    assert source_of(y) is None
