"""Kronecker factors: where they are exact, what they estimate, and which is nearer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import net


def test_calls_of_a_module_are_positions_of_one_call() -> None:
    """A layer on two tensors, one after another, is the layer on both of them stacked."""

    class Halves(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.layer, self.head, self.together = nn.Linear(2, 3), nn.Linear(3, 3), together

        def forward(self, x: Tensor) -> Tensor:
            if self.together:
                z = self.layer(x.unflatten(1, (2, 2)))
            else:
                z = torch.stack([self.layer(x[:, :2]), self.layer(x[:, 2:])], 1)
            return self.head(torch.tanh(z).prod(1))

    for of in (
        hf.kronecker.kflr,
        hf.kronecker.ekfac,
        partial(hf.kronecker.kfac, seed=0, samples=3),
    ):
        for sharing in ("expand", "reduce"):
            one, other = (
                of(case.loss, case.model, sharing=sharing)(case.params, case.batch)
                for case in (net(partial(Halves, t), 4, examples=3) for t in (True, False))
            )
            for name in one:
                torch.testing.assert_close(one[name].dense(), other[name].dense())


def test_a_weight_that_is_used_by_a_function_too_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.layer(x)), self.layer.weight)

    case = net(Hidden, 3, examples=2)
    for of in (hf.kronecker.kflr, hf.kronecker.ekfac, hf.kronecker.kfac):
        with pytest.raises(ValueError, match=r"'layer.weight' is also used outside.*`hold`"):
            of(case.loss, case.model)(case.params, case.batch)


def test_a_weight_of_layers_of_different_kinds_is_refused() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(x)))

    model = Head().double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(
        NotImplementedError, match="'embedding' is a Embedding: hold such parameters"
    ):
        hf.kronecker.ekfac(loss, model)(params, (torch.tensor([0, 1]), torch.tensor([1, 2])))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 3), lambda: nn.MultiheadAttention(3, 1)])
def test_modules_that_return_several_tensors_are_refused(make) -> None:
    layer = make()
    model_fn, params = hf.functional(layer)
    loss = hf.supervised(lambda p, x: model_fn(p, (x, x, x))[0], F.mse_loss)
    if isinstance(layer, nn.LSTM):
        loss = hf.supervised(lambda p, x: model_fn(p, x)[0], F.mse_loss)
    with pytest.raises(
        NotImplementedError, match=rf"is a {type(layer).__name__}: hold such parameters"
    ):
        hf.kronecker.kflr(loss, layer)(params, (torch.ones(2, 4, 3), torch.zeros(2, 4, 3)))
