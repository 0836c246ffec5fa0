"""Attention that can be differentiated twice, with torch's own values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfunc.autograd.attention import ATTENTION
from hessfunc.autograd.overrides import Replaced

MASK = torch.ones(5, 5, dtype=torch.bool).tril()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": MASK},
    "added mask": {"attn_mask": torch.where(MASK, 0.0, -2.0).double()},
    "scale": {"scale": 0.3},
}


def heads() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_second_derivatives_are_those_of_the_unfused_kernel(name: str) -> None:
    given, options = heads(), OPTIONS[name]
    found = []
    for context in (Replaced(ATTENTION), sdpa_kernel(SDPBackend.MATH)):
        with context:
            value = F.scaled_dot_product_attention(*given, **options)
        gradient = torch.autograd.grad(value.pow(3).sum(), given, create_graph=True)
        squares = sum(g.square().sum() for g in gradient)
        found.append([value, *torch.autograd.grad(squares, given)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_module_of_torch_is_differentiated_twice(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with Replaced(ATTENTION):
        out, _ = attention(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, attention(x, x, x)[0])
    (slope,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    (curved,) = torch.autograd.grad(slope.square().sum(), x)
    assert curved.abs().max() > 0


def test_autocast_rounds_the_arguments_of_the_whole_operation() -> None:
    query, key, value = (x.float() for x in heads())
    with torch.autocast("cpu", dtype=torch.bfloat16), Replaced(ATTENTION):
        found = F.scaled_dot_product_attention(query, key, value)
    rounded = [x.bfloat16() for x in (query, key, value)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*rounded)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
