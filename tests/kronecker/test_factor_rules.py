"""Linear dependence of functions of torch on their parameters, against their Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hessfunc.kronecker.factor_rules import maps_of
from hessfunc.kronecker.linear_maps import OneHot
from hessfunc.kronecker.moments import weight_gradient

D = torch.float64
TOKENS = torch.tensor([[0, 3, 3], [1, 4, 2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


# Function, its arguments, and the places of the parameters among them.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (random(2, 3, 4), random(5, 4), random(5)), (1, 2)),
    "matmul": (torch.matmul, (random(2, 3, 4), random(4, 5)), (1,)),
    "bilinear": (
        F.bilinear,
        (random(2, 3, 4), random(2, 3, 2), random(5, 4, 2), random(5)),
        (2, 3),
    ),
    "addmm": (torch.addmm, (random(5), random(6, 4), random(4, 5)), (0, 2)),
    "conv1d, same": (
        F.conv1d,
        (random(2, 2, 7), random(4, 1, 4), random(4), 1, "same", 2, 2),
        (1, 2),
    ),
    "conv1d, valid": (F.conv1d, (random(2, 2, 7), random(4, 2, 3), random(4), 2, "valid"), (1, 2)),
    "conv2d": (
        F.conv2d,
        (random(2, 4, 6, 5), random(6, 2, 3, 2), random(6), (2, 1), (1, 0), (1, 2), 2),
        (1, 2),
    ),
    "conv3d": (F.conv3d, (random(2, 2, 3, 4, 3), random(3, 2, 2, 2, 2), None, 1, 1), (1,)),
    "conv_transpose1d": (
        F.conv_transpose1d,
        (random(2, 4, 5), random(4, 3, 3), random(6), 2, 1, 1, 2, 2),
        (1, 2),
    ),
    "conv_transpose2d": (
        F.conv_transpose2d,
        (random(2, 4, 3, 2), random(4, 3, 3, 2), random(3), (2, 1), (1, 0), (1, 0), 1, (1, 2)),
        (1, 2),
    ),
    "conv_transpose2d, padded": (
        F.conv_transpose2d,
        (random(2, 2, 4, 4), random(2, 3, 2, 2), None, 1, 2),
        (1,),
    ),
    "conv_transpose3d": (
        F.conv_transpose3d,
        (random(2, 2, 2, 3, 2), random(2, 3, 2, 1, 2), None, 2),
        (1,),
    ),
    "embedding": (F.embedding, (TOKENS, random(6, 4)), (1,)),
    "embedding, padding": (F.embedding, (TOKENS, random(6, 4), 3), (1,)),
    "embedding_bag": (F.embedding_bag, (TOKENS, random(6, 4)), (1,)),
    "embedding_bag, sums with weights and padding": (
        F.embedding_bag,
        (
            *(TOKENS.flatten(), random(6, 4), torch.tensor([0, 1, 1, 4])),
            *(None, 2.0, False, "sum", False, random(6), False, 3),
        ),
        (1,),
    ),
    "product": (torch.mul, (random(3, 4), random(2, 3, 4)), (0,)),
    "product, broadcast": (torch.mul, (random(2, 3, 4), random(3, 1)), (1,)),
    "sum": (torch.add, (random(2, 3, 4), random(1, 3, 4)), (1,)),
    "difference": (torch.sub, (random(2, 3, 4), random(1, 3, 4)), (1,)),
    "difference, first": (torch.sub, (random(4), random(2, 3, 4)), (0,)),
    "expand": (lambda x: x.expand(2, 3, 4), (random(1, 3, 1),), (0,)),
    "layer_norm": (F.layer_norm, (random(2, 3, 4), (3, 4), random(3, 4), random(3, 4)), (2, 3)),
    "rms_norm": (F.rms_norm, (random(2, 3, 4), (4,), random(4)), (2,)),
    "group_norm": (F.group_norm, (random(2, 4, 3), 2, random(4), random(4)), (2, 3)),
    "batch_norm": (
        F.batch_norm,
        (random(2, 3, 4), random(3), random(3).exp(), random(3), random(3)),
        (3, 4),
    ),
    "instance_norm": (F.instance_norm, (random(2, 3, 4), None, None, random(3), random(3)), (3, 4)),
    "prelu": (F.prelu, (random(2, 3, 4), random(3)), (1,)),
    "prelu of one weight": (F.prelu, (random(2, 3), random(1)), (1,)),
}


@pytest.mark.parametrize("call", CALLS)
def test_inputs_and_slopes_give_the_gradient(call: str) -> None:
    """``sum_n g_n x_n'`` in the order of the parameter is its gradient by autograd."""
    function, args, places = CALLS[call]
    given = [x.requires_grad_() if i in places else x for i, x in enumerate(args)]
    output = function(*given)
    cotangent = random(*output.shape, seed=9)
    gradients = torch.autograd.grad(output, [given[i] for i in places], cotangent)
    key = torch.Tensor.expand if call == "expand" else function
    made = {id(parameter): one for parameter, one in maps_of(key, output, given, {})}
    for place, gradient in zip(places, gradients, strict=True):
        one = made[id(given[place])]
        rows, inputs = one.slopes(cotangent), one.inputs()
        if isinstance(inputs, OneHot):
            assert inputs.indices.shape == (len(rows), rows.shape[-1])
            rows = rows.movedim(0, -1)[..., 0, :][None]
            inputs = OneHot(inputs.indices.mT, inputs.size)
        else:
            assert inputs.shape[:3] == (inputs.shape[0], *one.layout.sizes[::2])
        total = weight_gradient(rows, inputs)
        torch.testing.assert_close(one.layout.restored(total, gradient.shape), gradient)


def test_other_functions_and_shapes_have_no_maps() -> None:
    weight = random(3).requires_grad_()
    assert maps_of(torch.exp, weight.exp(), (weight,), {}) == []
    # Without an axis of rows, a sum over examples cannot be separated.
    assert maps_of(torch.add, weight + 1, (weight, 1), {}) == []
    matrix = random(3, 3).requires_grad_()
    assert maps_of(torch.matmul, matrix @ weight, (matrix, weight), {}) == []


# Function, its arguments, its keywords, and the places of the parameters among the arguments.
SCALED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "add": (torch.add, (random(2, 3), random(3)), {"alpha": 0.5}, (1,)),
    "Tensor.add": (Tensor.add, (random(3), random(2, 3)), {"alpha": 0.5}, (0,)),
    "sub": (torch.sub, (random(2, 3), random(3)), {"alpha": 0.5}, (1,)),
    "addmm": (
        torch.addmm,
        (random(5), random(6, 4), random(4, 5)),
        {"beta": 0.5, "alpha": 2.0},
        (0, 2),
    ),
    "addmm, one bias": (torch.addmm, (random(1), random(6, 4), random(4, 5)), {}, (0, 2)),
    "linear, one bias": (F.linear, (random(6, 4), random(5, 4), random(1)), {}, (1, 2)),
}


@pytest.mark.parametrize("call", SCALED)
def test_scales_and_broadcasted_biases_are_exact(call: str) -> None:
    function, args, options, places = SCALED[call]
    given = [x.requires_grad_() if i in places else x for i, x in enumerate(args)]
    output = function(*given, **options)
    cotangent = random(*output.shape, seed=9)
    gradients = torch.autograd.grad(output, [given[i] for i in places], cotangent)
    made = {id(parameter): one for parameter, one in maps_of(function, output, given, options)}
    for place, gradient in zip(places, gradients, strict=True):
        one = made[id(given[place])]
        inputs = one.inputs()
        assert isinstance(inputs, Tensor)
        total = weight_gradient(one.slopes(cotangent), inputs)
        torch.testing.assert_close(one.layout.restored(total, gradient.shape), gradient)


def test_a_call_with_unknown_arguments_or_shapes_has_no_maps() -> None:
    x, weight, vector = random(2, 4), random(4, 5), random(4)
    assert [w for w, _ in maps_of(torch.mm, x @ weight, (x,), {"mat2": weight})] == [weight]
    assert maps_of(torch.matmul, x @ weight, (x,), {"out_of_date": weight}) == []
    out = torch.empty(2, 4, dtype=D)
    assert maps_of(torch.add, x + vector, (x, vector), {"out": out}) == []
    assert maps_of(F.linear, F.linear(x, vector), (x, vector), {}) == []
    scalar = torch.tensor(2.0, dtype=D, requires_grad=True)
    assert maps_of(torch.mul, scalar * 2.0, (scalar, 2.0), {}) == []
    assert maps_of(torch.sub, scalar - 2.0, (scalar, 2.0), {"alpha": 2}) == []
