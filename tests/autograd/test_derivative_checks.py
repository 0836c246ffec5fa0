from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hessfunc.autograd.derivative_checks import (
    CustomCall,
    cotangent_error,
    input_error,
    is_wrong,
    value_error,
)


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class OfDetachedInput(Cube):
    """The derivative of the backward lacks its part in the input."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


class OfDetachedCotangent(Cube):
    """The derivative of the backward lacks its part in the cotangent."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g.detach()


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class OfAnotherFunction(Cube):
    """The backward is that of x^4 / 4."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x**3 * g


def call_of(function: type[Function]) -> CustomCall:
    return CustomCall(function, (torch.linspace(0.5, 2, 7),), (0,))


@pytest.mark.parametrize("function", [Cube, OfDetachedInput, OfAnotherFunction])
def test_a_backward_that_depends_on_its_cotangents(function: type[Function]) -> None:
    assert not is_wrong(call_of(function), cotangent_error)


@pytest.mark.parametrize("function", [OfDetachedCotangent, Once])
def test_a_backward_that_is_cut_from_its_cotangents(function: type[Function]) -> None:
    assert is_wrong(call_of(function), cotangent_error)


def test_a_backward_whose_derivative_by_the_input_is_lost() -> None:
    assert not is_wrong(call_of(Cube), input_error)
    assert is_wrong(call_of(OfDetachedInput), input_error)


def test_a_backward_of_another_function() -> None:
    assert not is_wrong(call_of(Cube), value_error)
    assert is_wrong(call_of(OfAnotherFunction), value_error)
