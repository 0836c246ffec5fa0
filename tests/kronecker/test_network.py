"""Models that cannot be decomposed into steps are refused by name."""

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.cases import CalledTwice, TiedHead
from tests.kronecker.cases import net


def refused(make, *shape: int, examples: int = 2, **options) -> None:
    case = net(make, *shape, examples=examples)
    hf.kronecker.hbp(case.loss, case.model, **options)(case.params, case.batch)


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * torch.sigmoid(y)


class OverExamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).flip(0)


class Untouched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (CalledTwice, ValueError, "'layer.weight' is used more than once"),
        (ByValue, NotImplementedError, "cannot be traced"),
        (OwnParameter, NotImplementedError, "'shift' is used outside a module"),
        (Gate, NotImplementedError, "at 'mul'.* product"),
        (Untouched, ValueError, "does not depend on parameter 'unused.weight'"),
        (OverExamples, NotImplementedError, "at 'flip': the output for one example alone"),
    ],
    ids=["twice", "by value", "own parameter", "gate", "unused", "over examples"],
)
def test_models_that_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refused(make, 3)


def test_tied_weights_are_refused() -> None:
    model = TiedHead().double()
    model_fn, params = hf.functional(model)
    tokens = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    loss = hf.supervised(lambda p, x: model_fn(p, x), lambda z, y: z.square().mean())
    with pytest.raises(ValueError, match="more than once"):
        hf.kronecker.hbp(loss, model)(params, (tokens, tokens))
