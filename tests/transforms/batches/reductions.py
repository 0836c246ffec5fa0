"""Batches of a small data set, and criteria whose reduction is not known."""

from typing import Any

import torch
from torch import Tensor, nn

import hessfunc as hf

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(7) % 2
BATCHES = [(X[:1], Y[:1]), (X[1:5], Y[1:5]), (X[5:], Y[5:])]


def net() -> tuple[nn.Module, Any, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, *hf.functional(model)


def per_row(reduction: str) -> Any:
    """A criterion that is not known to the library."""

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        each = (outputs.exp().sum(1) - outputs[range(len(targets)), targets]).square()
        return each.mean() if reduction == "mean" else each.sum()

    return criterion
