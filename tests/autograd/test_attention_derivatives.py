"""Derivatives of attention in chunks of queries, against autograd through all weights."""

import pytest
import torch
from torch.autograd import grad

from hessfunc.autograd.attention import math_attention
from hessfunc.autograd.attention_derivatives import Attention, Options
from tests.cases import waves


@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_of_chunks_are_those_of_all_weights(is_causal: bool) -> None:
    point = [waves(2, 5, 3), 1.5 * waves(2, 6, 3), waves(2, 6, 4)]
    g, tangents = waves(2, 5, 4), [waves(*x.shape).cos() for x in point]
    attention = Attention(Options(0.7, is_causal, 2), *point, None)

    leaves = [x.clone().requires_grad_() for x in (g, *point)]
    out = math_attention(*leaves[1:], None, 0.0, is_causal, scale=0.7)
    torch.testing.assert_close(attention.outputs(), out)
    gradient = grad(out, leaves[1:], leaves[0], create_graph=True)
    torch.testing.assert_close(attention.gradient(g), gradient)
    # The gradient of <gradient, tangents> by the cotangent is the tangent of the outputs.
    second = grad(gradient, leaves, tangents)
    (products,) = attention.second_derivative(g, [tuple(tangents)])
    torch.testing.assert_close(products, second)
    torch.testing.assert_close(attention.pushed([tuple(tangents)])[0], second[0])
