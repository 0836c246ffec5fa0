"""Nets, uneven batches, and dense matrices of the whole data set by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference import gradient, hessian, jacobian

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES = {
    f"{kind.__name__} {reduction}": kind(reduction=reduction)
    for kind in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
    for reduction in ("mean", "sum")
}


class Positions(nn.Module):
    """Several predictions for each example, with the classes along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


def net() -> nn.Sequential:
    """Net of 37 parameters."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def batches(loss: Loss, *, positions: int | None = None) -> list[Batch]:
    """Batches of 5 and 2 examples."""
    generator = torch.Generator().manual_seed(1)
    middle = () if positions is None else (positions,)
    data = []
    for count in (5, 2):
        inputs = torch.randn(count, *middle, 3, generator=generator).double()
        if isinstance(loss, nn.CrossEntropyLoss):
            targets = torch.randint(3, (count, *middle), generator=generator)
        else:
            targets = torch.rand(count, *middle, 3, generator=generator).double().round()
        data.append((inputs, targets))
    return data


def whole(data: Sequence[Batch]) -> Batch:
    """All examples as one batch."""
    inputs, targets = zip(*data, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def dense_hessian(model: nn.Module, loss: Loss, params: dict[str, Tensor], batch: Batch) -> Tensor:
    return hessian(
        lambda p, pair: loss(functional_call(model, p, (pair[0],)), pair[1]), params, batch
    )


def dense_jacobian(model: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return jacobian(lambda p: functional_call(model, p, (inputs,)), params)


def dense_ggn(model: nn.Module, loss: Loss, params: dict[str, Tensor], batch: Batch) -> Tensor:
    J = dense_jacobian(model, params, batch[0])
    outputs = functional_call(model, params, (batch[0],)).detach()
    return J.mT @ hessian(lambda f, _: loss(f, batch[1]), outputs, None) @ J


def dense_empirical(model: nn.Module, loss: Any, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """The sum or mean over the predictions of all examples of ``g g'``."""
    summed = type(loss)(reduction="sum")
    classes = isinstance(loss, nn.CrossEntropyLoss)

    def loss_of_term(p: dict[str, Tensor], t: int) -> Tensor:
        outputs = functional_call(model, p, (batch[0],))
        outputs = (outputs.movedim(1, -1) if classes else outputs).reshape(-1, 3)
        targets = batch[1].reshape(-1) if classes else batch[1].reshape(-1, 3)
        return summed(outputs[t], targets[t])

    terms = batch[1].numel() if classes else batch[1].numel() // 3
    gradients = torch.stack([gradient(loss_of_term, params, t) for t in range(terms)])
    divisor = batch[1].numel() if loss.reduction == "mean" else 1
    return gradients.mT @ gradients / divisor


def parameters(model: nn.Module, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """Parameters as they are passed, and their values by name in the same order."""
    named = dict(model.named_parameters())
    if kind in ("reversed", "subset"):
        names = {"reversed": list(named)[::-1], "subset": list(named)[1:3]}[kind]
        named = {name: named[name] for name in names}
    values = {name: p.detach() for name, p in named.items()}
    if kind == "dict":
        return named, values
    return (values if kind == "values" else list(named.values())), values


def matrix(A: Any) -> Tensor:
    return A @ torch.eye(A.shape[1], dtype=A.dtype)
