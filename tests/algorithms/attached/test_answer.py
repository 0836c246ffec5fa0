"""What all answers with a graph have in common."""

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc import attached
from hessfunc.algorithms.attached.answer import answer
from hessfunc.trees import leaves
from tests.algorithms.attached.problem import BATCH, LOSS, PARAMS

MATVEC = hf.hvp(LOSS)(PARAMS, BATCH)
PAIRS = hf.lanczos(MATVEC, PARAMS, k=2, which="LA", seed=0)


def test_the_stated_derivative_is_used() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (found,) = answer([torch.tensor([5.0])], [3 * x], lambda g: [g[0] * torch.tensor([7.0, 1.0])])
    assert float(found.detach()) == 5
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert slope.tolist() == [21, 3]


def test_second_derivatives_are_refused() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    values = attached.eigenvalues(hf.hvp(LOSS, differentiable=True)(params, BATCH), PAIRS)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(values.sum(), leaves(params), create_graph=True)


def test_matvecs_without_a_graph_are_refused() -> None:
    with pytest.raises(ValueError, match="differentiable=True"):
        attached.eigenvalues(MATVEC, PAIRS)


def test_transforms_are_refused() -> None:
    def top(params: dict[str, Tensor]) -> Tensor:
        return attached.eigenvalues(hf.hvp(LOSS)(params, BATCH), PAIRS).sum()

    with pytest.raises(NotImplementedError, match="plain autograd"):
        torch.func.grad(top)(PARAMS)
